"""tools/predict.py: the same predictions as the libraries', written whole, bad files named."""

import json
from pathlib import Path

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
    needs_bfloat16,
    random_model,
    read_json,
    refusals,
)

# For speed: a hundred labels take a second to draw.
UNDRAWN = ('--score-thr', 1)


class TestDetector:
    def test_results_score_as_in_evaluation(self, output_of, shapes, random_detector, tmp_path):
        images = shapes / 'coco' / 'val2017'
        printed = output_of(
            'predict.py',
            f'{DEMO_DETECTOR} {random_detector} {images} --out {tmp_path}/first',
            *UNDRAWN,
        )
        assert 'WARNING' not in printed
        index = read_json(tmp_path / 'first' / 'images.json')
        names = [f'{i:012d}.png' for i in range(1, 6)]
        assert [(image['id'], image['file_name']) for image in index['images']] == list(
            enumerate(names, start=1)
        )
        assert [c['name'] for c in index['categories']] == list(CLASSES) and not index['skipped']
        # Ground truth that these predictions partly meet, with ids as irregular as COCO's.
        found = [
            o
            for o in read_json(tmp_path / 'first' / 'results.segm.json')
            if rle.area(o['segmentation']) > 20
        ]
        annotations = [
            dict(
                id=i,
                image_id=100 - 7 * o['image_id'],
                category_id=10 * o['category_id'],
                iscrowd=0,
                area=float(rle.area(o['segmentation'])),
                segmentation=o['segmentation'],
                bbox=rle.toBbox(o['segmentation']).tolist(),
            )
            for i, o in enumerate(found[::3], start=1)
        ]
        truth = tmp_path / 'truth.json'
        truth.write_text(
            json.dumps(
                dict(
                    images=[
                        dict(id=100 - 7 * i, file_name=name, height=96, width=96)
                        for i, name in enumerate(names, start=1)
                    ],
                    categories=[
                        dict(id=10 * i, name=name) for i, name in enumerate(CLASSES, start=1)
                    ],
                    annotations=annotations,
                )
            )
        )

        out = tmp_path / 'second'
        output_of(
            'predict.py',
            f'{DEMO_DETECTOR} {random_detector} {images} --out {out}',
            *UNDRAWN,
            '--ann-file',
            truth,
        )
        output_of(
            'test.py',
            f'{DEMO_DETECTOR} {random_detector} --data-root {shapes}/coco --work-dir {tmp_path} --cfg-options',
            f'test_dataloader.dataset.ann_file={truth} test_evaluator.ann_file={truth}',
        )
        (said,) = tmp_path.glob('2*/2*.json')
        said, coco = read_json(said), COCO(str(truth))
        for kind in ('bbox', 'segm'):
            scored = COCOeval(coco, coco.loadRes(str(out / f'results.{kind}.json')), kind)
            scored.evaluate()
            scored.accumulate()
            scored.summarize()
            assert scored.stats[1] > 0.05  # there is something to compare
            for index, metric in enumerate(['', '_50', '_75', '_s', '_m', '_l']):
                assert said[f'coco/{kind}_mAP{metric}'] == pytest.approx(
                    scored.stats[index], abs=6e-4
                )
        pictures = sorted(path.name for path in (out / 'pictures').iterdir())
        assert pictures == [name.replace('png', 'jpg') for name in names]

    def test_bad_files_are_named_and_the_others_predicted(
        self, output_of, shapes, random_detector, tmp_path
    ):
        folder, out = tmp_path / 'photos', tmp_path / 'out'
        (folder / 'below').mkdir(parents=True)
        whole = (shapes / 'coco/val2017/000000000001.png').read_bytes()
        (folder / 'a.png').write_bytes(whole[: len(whole) // 2])
        (folder / 'b.png').write_bytes(whole)
        (folder / 'b.jpg').write_text('no image')
        (folder / 'below' / 'c.bmp').write_bytes(
            cv2.imencode('.bmp', cv2.imread(str(shapes / 'coco/val2017/000000000002.png')))[1]
        )
        (folder / 'd.mp4').write_text('no video')
        (folder / 'notes.txt').write_text('not looked at')
        said = output_of(
            'predict.py',
            f'{DEMO_DETECTOR} {random_detector} {folder} --out {out}',
            *UNDRAWN,
            expect=1,
        )
        for name in ('a.png', 'b.jpg', 'd.mp4'):
            assert f"error: '{name}' was skipped: it is" in said
        assert '2 images predicted' in said and '3 files skipped' in said
        index = read_json(out / 'images.json')
        # Ids count bad files too, so that repairing one changes no other.
        assert [(i['id'], i['file_name']) for i in index['images']] == [
            (3, 'b.png'),
            (4, 'below/c.bmp'),
        ]
        assert [one['file_name'] for one in index['skipped']] == ['a.png', 'b.jpg', 'd.mp4']
        assert {one['image_id'] for one in read_json(out / 'results.bbox.json')} == {3, 4}
        written = {path.relative_to(out).as_posix() for path in out.rglob('*') if path.is_file()}
        assert written == {
            'images.json',
            'results.bbox.json',
            'results.segm.json',
            'pictures/b.png.jpg',
            'pictures/below/c.jpg',
        }

    def test_an_interrupted_run_leaves_only_whole_files(
        self, output_of, shapes, random_detector, tmp_path, monkeypatch
    ):
        images = shapes / 'coco' / 'val2017'
        output_of(
            'predict.py',
            f'{DEMO_DETECTOR} {random_detector} {images}/000000000001.png --out {tmp_path}',
            *UNDRAWN,
        )
        encode, calls = cv2.imencode, []

        def stop_at_third(*arguments):
            calls.append(0)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return encode(*arguments)

        monkeypatch.setattr(cv2, 'imencode', stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            output_of(
                'predict.py', DEMO_DETECTOR, random_detector, images, '--out', tmp_path, *UNDRAWN
            )
        # no result of before, for it would be taken for that of now
        assert [path.name for path in sorted(tmp_path.rglob('*')) if path.is_file()] == [
            '000000000001.jpg',
            '000000000002.jpg',
        ]

    @needs_bfloat16
    def test_batches_and_bfloat16(self, output_of, shapes, random_detector, tmp_path):
        photos = tmp_path / 'photos'
        photos.mkdir()
        image = cv2.imread(str(shapes / 'coco/val2017/000000000003.png'))
        for name, width in (('a', 96), ('b', 96), ('c', 60)):
            cv2.imwrite(str(photos / f'{name}.png'), cv2.resize(image, (width, 96)))
        boxes = {}
        for options in ((), ('--batch-size', 3), ('--bf16',)):
            out = tmp_path / 'out' / ''.join(map(str, options))
            output_of(
                'predict.py',
                f'{DEMO_DETECTOR} {random_detector} {photos} --out {out}',
                *UNDRAWN,
                *options,
            )
            boxes[options] = read_json(out / 'results.bbox.json')
        one, batched, reduced = boxes.values()
        assert len(one) == len(batched) > 0
        for a, b in zip(one, batched):
            assert a['image_id'] == b['image_id'] and a['category_id'] == b['category_id']
            np.testing.assert_allclose(a['bbox'], b['bbox'], atol=1e-2)
        scores, rounded = ([box['score'] for box in boxes] for boxes in (one, reduced))
        assert rounded != scores and max(rounded) == pytest.approx(max(scores), abs=0.05)

    def test_threshold_is_that_of_the_pictures(self, output_of, shapes, random_detector, tmp_path):
        image, drawn, found = shapes / 'coco/val2017/000000000001.png', {}, {}
        for threshold in ('0', '1'):
            out = tmp_path / threshold
            output_of(
                'predict.py',
                f'{DEMO_DETECTOR} {random_detector} {image} --out {out} --score-thr {threshold}',
            )
            difference = cv2.absdiff(
                cv2.imread(str(out / 'pictures/000000000001.jpg')), cv2.imread(str(image))
            )
            drawn[threshold], found[threshold] = (
                difference.mean(),
                read_json(out / 'results.bbox.json'),
            )
        assert drawn['1'] < drawn['0'] / 2  # older matplotlib blurs the image itself
        assert found['0'] == found['1'] != []


class TestSegmentor:
    def test_label_maps_equal_those_of_evaluation(
        self, output_of, shapes, random_segmentor, tmp_path
    ):
        output_of(
            'predict.py',
            f'{DEMO_SEGMENTOR} {random_segmentor} {shapes}/ade/images/validation/*.jpg --out {tmp_path}/out',
        )
        output_of(
            'test.py',
            f'{DEMO_SEGMENTOR} {random_segmentor} --data-root {shapes}/ade --work-dir {tmp_path} --out',
            f'{tmp_path}/maps',
        )
        index = read_json(tmp_path / 'out' / 'images.json')
        # 0 is "other" in ADE20K's label maps, as in these
        assert [(c['id'], c['name']) for c in index['categories']] == list(
            enumerate(('background', *CLASSES), start=1)
        )
        assert len(index['images']) == 5
        seen = set()
        for entry in index['images']:
            labels = cv2.imread(str(tmp_path / 'out' / entry['label_map']), cv2.IMREAD_UNCHANGED)
            other = cv2.imread(
                str(tmp_path / 'maps' / Path(entry['label_map']).name), cv2.IMREAD_UNCHANGED
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
def test_names_are_those_of_the_checkpoint(output_of, shapes, tmp_path, meta):
    checkpoint = random_model(DEMO_DETECTOR, tmp_path / 'named.pth', meta)
    output_of(
        'predict.py',
        f'{DEMO_DETECTOR} {checkpoint} {shapes}/coco/val2017/000000000001.png --out {tmp_path}/out',
        *UNDRAWN,
    )
    index = read_json(tmp_path / 'out' / 'images.json')
    assert [c['name'] for c in index['categories']] == ['w', 'x', 'y', 'z']


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
    refusal_of, shapes, random_detector, random_segmentor, command, said
):
    config, arguments = command.split(maxsplit=1)
    checkpoint = random_detector if config == DEMO_DETECTOR else random_segmentor
    arguments = arguments.replace('IMAGE', f'{shapes}/coco/val2017/000000000001.png')
    assert said in refusal_of('predict.py', config, checkpoint, arguments)
    assert not (ROOT / 'predictions').exists()  # nothing is left of a refusal


def test_bfloat16_is_refused_where_it_is_slow(refusal_of, random_detector, shapes, monkeypatch):
    monkeypatch.setattr(mixed_precision, 'multiplies_bfloat16', lambda: False)
    command = f'{DEMO_DETECTOR} {random_detector} {shapes} --device cpu --bf16'
    assert refusal_of('predict.py', command).startswith('--bf16: this processor has no')


def test_a_checkpoint_that_does_not_fit_is_refused(refusal_of, shapes, random_detector):
    image = shapes / 'coco/val2017/000000000001.png'
    said = refusal_of('predict.py', DEMO_SEGMENTOR, random_detector, image)
    assert f"Checkpoint '{random_detector}' does not fit this model: missing" in said


def test_names_must_be_known_for_every_class(refusal_of, shapes, tmp_path):
    # Names of the config, and not of what the checkpoint was trained on.
    checkpoint = random_model(DEMO_DETECTOR, tmp_path / 'x.pth', {})
    said = refusal_of(
        'predict.py',
        f'{DEMO_DETECTOR} {checkpoint} {shapes}/coco/val2017/000000000001.png --cfg-options',
        'test_dataloader.dataset.metainfo.classes=one,two',
    )
    assert '4 classes' in said and 'names of 2' in said


@TRANSFORMS.register_module()
class MistakenTransform(BaseTransform):
    """A user's own, of a test pipeline."""

    def transform(self, results: dict) -> dict:
        raise ZeroDivisionError('a mistake of mine')


def test_a_transform_that_fails_is_not_taken_for_a_broken_image(
    output_of, shapes, random_segmentor, tmp_path
):
    (tmp_path / 'config.py').write_text(f"""
_base_ = {str(ROOT / DEMO_SEGMENTOR)!r}
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='mmengine.MistakenTransform'),
                 dict(type='PackSegInputs')]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
""")
    image = shapes / 'ade/images/validation/000000000001.jpg'
    said = output_of(
        'predict.py',
        f'{tmp_path}/config.py {random_segmentor} {image} --out {tmp_path}/out',
        expect=1,
    )
    assert f"'{image.name}' can be read, but the config's test pipeline could not" in said
    assert said.strip().splitlines()[-1] == 'ZeroDivisionError: a mistake of mine'
    assert 'Traceback' in said and 'cut short' not in said


@pytest.mark.parametrize('error', [torch.cuda.OutOfMemoryError('full'), RuntimeError('a fault')])
def test_an_error_of_the_model_keeps_what_was_predicted_before(
    output_of, shapes, quick, tmp_path, monkeypatch, error
):
    """With the names that PyTorch 2.1 has."""
    from mmdet.apis import DetInferencer

    forward, calls = DetInferencer.forward, []

    def fail_at_third(self, *arguments, **options):
        calls.append(0)
        if len(calls) == 3:
            raise error
        return forward(self, *arguments, **options)

    monkeypatch.setattr(DetInferencer, 'forward', fail_at_third)
    monkeypatch.delattr(torch, 'OutOfMemoryError', raising=False)
    full = not str(error) == 'a fault'
    images = shapes / 'coco/val2017'
    said = output_of(
        'predict.py', *quick(), f'{images} --out {tmp_path}', *UNDRAWN, expect=2 if full else 1
    ).strip()
    last = (
        "error: --batch-size: 1 images like '000000000003.png' do not fit into the memory of cpu."
    )
    assert said.splitlines()[-1] == (last if full else 'RuntimeError: a fault')
    assert len(read_json(tmp_path / 'images.json')['images']) == 2
    assert {one['image_id'] for one in read_json(tmp_path / 'results.bbox.json')} == {1, 2}
