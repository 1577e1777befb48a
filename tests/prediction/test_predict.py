"""tools/predict.py: the same predictions as the libraries', written whole, bad files named."""

import json
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from crossformer_mm.engine import mixed_precision

from ..helpers import (
    CLASSES,
    DEMO_DETECTOR,
    DEMO_SEGMENTOR,
    ROOT,
    metrics,
    needs_bfloat16,
    random_model,
    read_json,
    refusals,
)


def failing_third(function, error) -> mock.Mock:
    """A function whose third call raises."""
    return mock.Mock(wraps=function, side_effect=[mock.DEFAULT, mock.DEFAULT, error])


def files_in(folder: Path) -> set:
    return {str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()}


class TestDetector:
    def test_results_score_as_in_evaluation(self, predict, output_of, shapes, detector, tmp_path):
        images = shapes / 'coco' / 'val2017'
        first = predict(detector, images, out='first')
        assert 'WARNING' not in first.said
        names = {i: f'{i:012d}.png' for i in range(1, 6)}
        listed = [(one['id'], one['file_name']) for one in first.index['images']]
        assert listed == [*names.items()]
        assert [one['name'] for one in first.index['categories']] == list(CLASSES)
        assert not first.index['skipped']
        # Ground truth that these predictions partly meet, with ids as irregular as COCO's.
        found = read_json(first.out / 'results.segm.json')
        found = [one for one in found if rle.area(one['segmentation']) > 20]
        truth, coco = tmp_path / 'truth.json', COCO()
        images_of = [
            dict(id=100 - 7 * i, file_name=name, height=96, width=96) for i, name in names.items()
        ]
        categories = [dict(id=10 * i, name=name) for i, name in enumerate(CLASSES, start=1)]
        coco.dataset = dict(images=images_of, categories=categories)
        coco.createIndex()
        objects = [
            dict(one, image_id=100 - 7 * one['image_id'], category_id=10 * one['category_id'])
            for one in found[::3]
        ]
        content = coco.loadRes(objects).dataset
        truth.write_text(json.dumps(content, default=lambda number: number.tolist()))

        second = predict(detector, images, '--ann-file', truth, out='second')
        output_of(
            'test.py', *detector, f'--data-root {shapes}/coco --work-dir {tmp_path}/test --cfg-options',
            f'test_dataloader.dataset.ann_file={truth} test_evaluator.ann_file={truth}',
        )  # fmt: skip
        said, coco = metrics(tmp_path / 'test'), COCO(str(truth))
        for kind in ('bbox', 'segm'):
            scored = COCOeval(coco, coco.loadRes(str(second.out / f'results.{kind}.json')), kind)
            scored.evaluate()
            scored.accumulate()
            scored.summarize()
            assert scored.stats[1] > 0.05  # there is something to compare
            for metric, value in zip(('', '_50', '_75', '_s', '_m', '_l'), scored.stats):
                assert said[f'coco/{kind}_mAP{metric}'] == pytest.approx(value, abs=6e-4)
        pictures = {name.replace('png', 'jpg') for name in names.values()}
        assert files_in(second.out / 'pictures') == pictures

    def test_bad_files_are_named_and_the_others_predicted(self, predict, shapes, detector, photos):
        (photos / 'below').mkdir()
        whole = (shapes / 'coco/val2017/000000000001.png').read_bytes()
        (photos / 'a.png').write_bytes(whole[: len(whole) // 2])
        (photos / 'b.png').write_bytes(whole)
        (photos / 'b.jpg').write_text('no image')
        other = cv2.imread(str(shapes / 'coco/val2017/000000000002.png'))
        cv2.imwrite(str(photos / 'below/c.bmp'), other)
        (photos / 'd.mp4').write_text('no video')
        (photos / 'notes.txt').write_text('not looked at')
        found = predict(detector, photos, expect=1)
        for name in ('a.png', 'b.jpg', 'd.mp4'):
            assert f"error: '{name}' was skipped: it is" in found.said
        assert '2 images predicted' in found.said and '3 files skipped' in found.said
        # Ids count bad files too, so that repairing one changes no other.
        ids = [(one['id'], one['file_name']) for one in found.index['images']]
        assert ids == [(3, 'b.png'), (4, 'below/c.bmp')] and found.ids == {3, 4}
        assert found.names('skipped') == ['a.png', 'b.jpg', 'd.mp4']
        lists = {'images.json', 'results.bbox.json', 'results.segm.json'}
        assert files_in(found.out) == lists | {'pictures/b.png.jpg', 'pictures/below/c.jpg'}

    def test_an_interrupted_run_leaves_only_whole_files(
        self, predict, shapes, detector, monkeypatch
    ):
        images = shapes / 'coco/val2017'
        out = predict(detector, images / '000000000001.png').out
        monkeypatch.setattr(cv2, 'imencode', failing_third(cv2.imencode, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            predict(detector, images)
        # no result of before, for it would be taken for that of now
        assert files_in(out) == {f'pictures/00000000000{i}.jpg' for i in (1, 2)}

    @needs_bfloat16
    def test_batches_and_bfloat16(self, predict, shapes, detector, photos):
        image = cv2.imread(str(shapes / 'coco/val2017/000000000003.png'))
        for name, width in (('a', 96), ('b', 96), ('c', 60)):
            cv2.imwrite(str(photos / f'{name}.png'), cv2.resize(image, (width, 96)))
        one, batched, reduced = (
            predict(detector, photos, options, out=f'out {options}').boxes
            for options in ('', '--batch-size 3', '--bf16')
        )
        assert len(one) == len(batched) > 0
        for a, b in zip(one, batched):
            assert a['image_id'] == b['image_id'] and a['category_id'] == b['category_id']
            np.testing.assert_allclose(a['bbox'], b['bbox'], atol=1e-2)
        scores, rounded = ([box['score'] for box in boxes] for boxes in (one, reduced))
        assert rounded != scores and max(rounded) == pytest.approx(max(scores), abs=0.05)

    def test_threshold_is_that_of_the_pictures(self, predict, shapes, image, detector):
        file, drawn, found = shapes / 'coco/val2017/000000000001.png', {}, {}
        for threshold in (0, 1):
            done = predict(detector, file, out=str(threshold), threshold=threshold)
            picture = cv2.imread(str(done.out / 'pictures/000000000001.jpg'))
            drawn[threshold], found[threshold] = cv2.absdiff(picture, image).mean(), done.boxes
        assert drawn[1] < drawn[0] / 2  # older matplotlib blurs the image itself
        assert found[0] == found[1] != []


class TestSegmentor:
    def test_label_maps_equal_those_of_evaluation(
        self, predict, output_of, shapes, segmentor, tmp_path
    ):
        found = predict(segmentor, f'{shapes}/ade/images/validation/*.jpg', threshold=None)
        maps = tmp_path / 'maps'
        options = f'--data-root {shapes}/ade --work-dir {tmp_path} --out {maps}'
        output_of('test.py', *segmentor, options)
        # 0 is "other" in ADE20K's label maps, as in these
        names = [(one['id'], one['name']) for one in found.index['categories']]
        assert names == [*enumerate(('background', *CLASSES), start=1)]
        assert len(found.index['images']) == 5
        seen = set()
        for entry in found.index['images']:
            file = Path(entry['label_map'])
            labels, other = (
                cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
                for path in (found.out / file, maps / file.name)
            )
            assert labels.shape == (entry['height'], entry['width']) and (labels == other).all()
            seen |= set(np.unique(labels))
        assert len(seen) > 2


@pytest.mark.parametrize(
    'meta',
    [
        dict(CLASSES=('w', 'x', 'y', 'z'), PALETTE=[[9, 9, 9]] * 4),
        dict(dataset_meta=dict(classes=['w', 'x', 'y', 'z'])),
    ],
)
def test_names_are_those_of_the_checkpoint(predict, shapes, tmp_path, meta):
    checkpoint = random_model(DEMO_DETECTOR, tmp_path / 'named.pth', meta)
    found = predict((DEMO_DETECTOR, checkpoint), shapes / 'coco/val2017/000000000001.png')
    assert [one['name'] for one in found.index['categories']] == ['w', 'x', 'y', 'z']


REFUSED = '''
DETECTOR nowhere.jpg -> images: 'nowhere.jpg' is no file, no folder and matches nothing.
DETECTOR no/*.jpg -> images: 'no/*.jpg' is no file
DETECTOR configs -> folder 'configs' holds no images or videos
DETECTOR IMAGE --batch-size 0 -> --batch-size must be at least 1, got 0.
DETECTOR IMAGE --device gpu -> --device: 'gpu' cannot be used:
DETECTOR IMAGE --score-thr 30 -> --score-thr must be from 0 to 1, got 30.0.
DETECTOR IMAGE --ann-file README.md -> --ann-file: 'README.md' is no file of COCO
DETECTOR IMAGE --out README.md -> --out: 'README.md' is a file.
DETECTOR IMAGE --out README.md/out -> --out: folder 'README.md/out' could not be
SEGMENTOR IMAGE --score-thr 0.5 -> --score-thr is of detectors
SEGMENTOR IMAGE --ann-file README.md -> --ann-file is of detectors
'''


@pytest.mark.parametrize('command, said', refusals(REFUSED))
def test_what_cannot_work_is_said_in_one_sentence(
    refusal_of, shapes, detector, segmentor, command, said
):
    config, arguments = command.split(maxsplit=1)
    arguments = arguments.replace('IMAGE', f'{shapes}/coco/val2017/000000000001.png')
    model = dict([detector, segmentor])[config]
    assert said in refusal_of('predict.py', config, model, arguments)
    assert not (ROOT / 'predictions').exists()  # nothing is left of a refusal


def test_bfloat16_is_refused_where_it_is_slow(refusal_of, detector, shapes, monkeypatch):
    monkeypatch.setattr(mixed_precision, 'multiplies_bfloat16', lambda: False)
    said = refusal_of('predict.py', *detector, shapes, '--device cpu --bf16')
    assert said.startswith('--bf16: this processor has no')


def test_a_checkpoint_that_does_not_fit_is_refused(refusal_of, shapes, random_detector):
    image = shapes / 'coco/val2017/000000000001.png'
    said = refusal_of('predict.py', DEMO_SEGMENTOR, random_detector, image)
    assert f"Checkpoint '{random_detector}' does not fit this model: missing" in said


def test_names_must_be_known_for_every_class(refusal_of, shapes, tmp_path):
    # Names of the config, and not of what the checkpoint was trained on.
    checkpoint = random_model(DEMO_DETECTOR, tmp_path / 'x.pth', {})
    names = '--cfg-options test_dataloader.dataset.metainfo.classes=one,two'
    said = refusal_of('predict.py', DEMO_DETECTOR, checkpoint, shapes / 'coco/val2017', names)
    assert '4 classes' in said and 'names of 2' in said


@TRANSFORMS.register_module()
class MistakenTransform(BaseTransform):
    """A user's own, of a test pipeline."""

    def transform(self, results: dict) -> dict:
        raise ZeroDivisionError('a mistake of mine')


def test_a_transform_that_fails_is_not_taken_for_a_broken_image(
    predict, shapes, random_segmentor, tmp_path
):
    config = tmp_path / 'config.py'
    config.write_text(f"""
_base_ = {str(ROOT / DEMO_SEGMENTOR)!r}
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='mmengine.MistakenTransform'),
                 dict(type='PackSegInputs')]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
""")
    image = shapes / 'ade/images/validation/000000000001.jpg'
    said = predict((config, random_segmentor), image, threshold=None, expect=1).said
    assert f"'{image.name}' can be read, but the config's test pipeline could not" in said
    assert said.strip().splitlines()[-1] == 'ZeroDivisionError: a mistake of mine'
    assert 'Traceback' in said and 'cut short' not in said


@pytest.mark.parametrize('error', [torch.cuda.OutOfMemoryError('full'), RuntimeError('a fault')])
def test_an_error_of_the_model_keeps_what_was_predicted_before(
    predict, shapes, quick, monkeypatch, error
):
    """With the names that PyTorch 2.1 has."""
    from mmdet.apis import DetInferencer

    failing = failing_third(DetInferencer.forward, error)
    monkeypatch.setattr(
        DetInferencer, 'forward', lambda *args, **options: failing(*args, **options)
    )
    monkeypatch.delattr(torch, 'OutOfMemoryError', raising=False)
    expect, last = {
        'full': (
            2,
            "error: --batch-size: 1 images like '000000000003.png' do not fit into the memory of cpu.",
        ),
        'a fault': (1, 'RuntimeError: a fault'),
    }[str(error)]
    found = predict(quick(), shapes / 'coco/val2017', expect=expect)
    assert found.said.strip().splitlines()[-1] == last
    assert len(found.index['images']) == 2 and found.ids == {1, 2}
