"""Files of tools/export.py in tools/run_onnx.py, which has no PyTorch: as tools/predict.py has it."""

import json
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from matplotlib import cbook
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from crossformer_mm.errors import UserError
from crossformer_mm.without_torch.model import Model
from crossformer_mm.without_torch.results import Ids

from ..helpers import build_model, read_json, refusals, run_onnx
from .exported import CLASSIFIER, CONFIGS, LISTED, assert_one_to_one, masks_are_alike, spread

NAMES = 'torch', 'onnx'  # of the folders of what predict.py and run_onnx.py write


def read_labels(path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def test_there_are_images_with_no_few_and_the_most_boxes(exported):
    _, ours = exported('retinanet').both('results.bbox.json')
    found = Counter(one['image_id'] for one in ours)
    counts = [found[image] for image in range(1, 8)]
    assert 0 in counts and max(counts) == 100 and any(0 < count < 100 for count in counts)


@pytest.mark.parametrize('kind', ['retinanet', 'mask_rcnn'])
def test_boxes_are_those_of_predict(exported, kind):
    theirs, ours = exported(kind).both('results.bbox.json')
    assert_one_to_one(theirs, ours)
    assert len(ours) > 60


def test_masks_are_those_of_predict(exported):
    boxes, _ = exported('mask_rcnn').both('results.bbox.json')
    theirs, ours = exported('mask_rcnn').both('results.segm.json')
    assert len(ours) == len(boxes)
    assert_one_to_one(theirs, ours, masks_are_alike)


@pytest.mark.parametrize('kind', ['retinanet', 'segmentor'])
def test_lists_and_pictures_are_those_of_predict(exported, kind):
    theirs, ours = exported(kind).both('images.json')
    assert ours == theirs and len(ours['images']) == 7 - (kind == 'segmentor')
    assert [one['file_name'] for one in ours['skipped']] == ['none.jpg']
    folders, photos = (exported(kind).torch, exported(kind).onnx), exported(kind).photos
    files, same = (
        {path.relative_to(folder) for path in folder.rglob('*') if path.is_file()}
        for folder in folders
    )
    assert files == same
    for picture in folders[1].glob('pictures/*'):
        shape = cv2.imread(str(picture)).shape
        assert shape == cv2.imread(str(photos / f'{picture.stem}.png')).shape


def test_label_maps_are_those_of_predict(exported):
    same = total = 0
    for path in (exported('segmentor').onnx / 'labels').iterdir():
        ours = read_labels(path)
        theirs = read_labels(exported('segmentor').torch / 'labels' / path.name)
        assert ours.shape == theirs.shape and ours.min() >= 1
        same, total = same + (ours == theirs).sum(), total + ours.size
    assert same / total >= 0.9999


def test_label_maps_of_a_photo_are_those_of_predict(output_of, exported, tmp_path):
    """With resizing inside, from the size of a photo that Matplotlib carries."""
    photo = cbook.get_sample_data('grace_hopper.jpg', asfileobj=False)
    kind, file = exported('segmentor'), tmp_path / 'model.onnx'
    scale = '--cfg-options test_dataloader.dataset.pipeline.1.scale=(256,128)'
    model = kind.config, kind.config.with_suffix('.pth')
    output_of('export.py', *model, '--threads 1 --resize-inside --shape 64 64 --out', file, scale)
    output_of('predict.py', *model, [photo], '--out', tmp_path / 'torch', scale)
    output_of('run_onnx.py', file, [photo], '--threads 1 --out', tmp_path / 'onnx')
    theirs, ours = (read_labels(tmp_path / f'{n}/labels/grace_hopper.png') for n in NAMES)
    assert ours.shape == theirs.shape and len(np.unique(theirs)) > 2
    assert (ours == theirs).mean() >= 0.9999


def test_scores_of_a_classifier_are_those_of_mmpretrain(output_of, photos, tmp_path):
    """With its own pipeline, which resizes by Pillow and crops; and with a batch."""
    pytest.importorskip('mmpretrain')
    from mmengine.dataset import Compose, pseudo_collate

    config, weights, file = (tmp_path / name for name in ('c.py', 'weights.pth', 'model.onnx'))
    config.write_text(CLASSIFIER)
    model = build_model(config)
    spread(model)
    torch.save(dict(state_dict=model.state_dict()), weights)
    output_of('export.py', config, weights, '--threads 1 --shape 32 32 --out', file)
    output_of('run_onnx.py', file, photos, '--out', tmp_path / 'out', expect=1)
    listed = read_json(tmp_path / 'out/images.json')
    assert [one['file_name'] for one in listed['skipped']] == ['none.jpg']
    init_default_scope('mmpretrain')  # the tools begin without one
    pipeline = Compose(Config.fromfile(config).test_dataloader.dataset.pipeline)
    results = []
    for image in listed['images']:
        packed = pipeline(dict(img_path=str(photos / image['file_name']), gt_label=0))
        with torch.no_grad():
            (sample,) = model.test_step(pseudo_collate([packed]))
        scores, labels = sample.pred_score.sort(descending=True)
        results += zip([image['id']] * 5, labels[:5].tolist(), scores[:5].tolist())
    ours = read_json(tmp_path / 'out/results.classes.json')
    assert len(ours) == len(results) == 35 and len({one['category_id'] for one in ours}) > 3
    for one, (image, label, score) in zip(ours, results):
        assert (one['image_id'], one['category_id']) == (image, label)
        assert abs(one['score'] - score) < 1e-5
    images = torch.randint(256, (3, 3, 40, 33), dtype=torch.uint8)
    (scores,) = run_onnx(file, ['scores'], image=images)
    with torch.no_grad():
        inputs = model.data_preprocessor(dict(inputs=list(images.flip(1))), False)['inputs']
        wanted = model(inputs, mode='tensor').softmax(1)
    torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=1e-7)


def test_a_segmentor_takes_batches(exported):
    file, size = exported('segmentor').file, torch.tensor([50, 41])
    images = torch.randint(256, (3, 3, 40, 33), dtype=torch.uint8)
    (together,) = run_onnx(file, ['labels'], image=images, size=size)
    assert together.shape == (3, 50, 41)
    for image, labels in zip(images, together):
        (alone,) = run_onnx(file, ['labels'], image=image[None], size=size)
        assert (alone[0] == labels).float().mean() >= 0.999


def test_the_file_says_all_that_a_user_needs(exported):
    import onnx

    found = {}
    for kind in CONFIGS:
        proto = onnx.load(exported(kind).file)
        assert {one.domain for one in proto.opset_import} == {''}  # standard operators alone
        assert not proto.functions
        found[kind] = {one.key: json.loads(one.value) for one in proto.metadata_props}
        assert found[kind].keys() <= LISTED
    about = found['mask_rcnn']
    assert about['task'] == 'instances' and about['classes'] == ['a', 'b', 'c', 'd']
    rule = dict(width=160, height=96, keep_ratio=True, interpolation='bilinear', backend='cv2')
    assert about['resize'] is None and about['resize_inside'] == rule
    assert 'after' not in about['input'] and 'after resize' in found['retinanet']['input']
    assert found['retinanet']['resize'] == rule and 'resize_inside' not in found['retinanet']
    assert about['thresholds'] == dict(score=0.05, nms_iou=0.5, most_boxes=20)
    assert about['mask_threshold'] == 0.5 and len(about['palette']) >= 4
    assert list(about['outputs']) == ['boxes', 'scores', 'labels', 'masks']
    assert len(about['checkpoint_sha256']) == 64 and about['crossformer_mm']
    assert found['segmentor']['first_value'] == 1 and found['retinanet']['task'] == 'boxes'


def test_images_are_loaded_as_the_test_pipeline_does(output_of, exported, tmp_path):
    """A photo whose orientation the pipeline leaves out, resized in floats."""
    random = np.random.default_rng(0)
    coarse = random.integers(256, size=(8, 10, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    photo = Image.fromarray(cv2.resize(coarse, (80, 60)))
    photo.save(tmp_path / 'turned.jpg', exif=turned)
    config, file = exported('retinanet').config, tmp_path / 'model.onnx'
    model = config, config.with_suffix('.pth')
    step = 'test_dataloader.dataset.pipeline.0'
    options = f'--cfg-options {step}.color_type=color_ignore_orientation {step}.to_float32=True'
    output_of('export.py', *model, '--out', file, '--threads 1', options)
    output_of('predict.py', *model, tmp_path, '--out', tmp_path / 'torch', options)
    output_of('run_onnx.py', file, tmp_path / 'turned.jpg', '--out', tmp_path / 'onnx')
    theirs, ours = (read_json(tmp_path / name / 'results.bbox.json') for name in NAMES)
    assert_one_to_one(theirs, ours)
    (listed,) = read_json(tmp_path / 'onnx/images.json')['images']
    assert (listed['height'], listed['width']) == (60, 80) and len(ours) > 5
    model = Model(file)
    assert model.about['load'] == dict(color_type='color_ignore_orientation', to_float32=True)
    assert 'float' in model.inputs['image']


@pytest.mark.parametrize(
    'option, wrong, said',
    [
        ('color_type', 'color_ignore_orientation', "the pixels of 'turned.jpg'"),
        ('color_type', 'grayscale', "the pixels of 'colour.png'"),
        ('to_float32', True, "the resized pixels of 'colour.png'"),
    ],
)
def test_the_check_of_an_export_begins_with_image_files(exported, option, wrong, said):
    """A pipeline that loads otherwise than the file says is found."""
    from crossformer_mm.export.from_files import Differs, check_from_files
    from crossformer_mm.export.models import WholeDetector

    config = exported('retinanet').config
    module, model = WholeDetector(build_model(config)), Model(exported('retinanet').file)
    pipeline = Config.fromfile(config).test_dataloader.dataset.pipeline
    check_from_files(module, pipeline, model)
    pipeline[0][option] = wrong
    with pytest.raises(Differs, match=said):
        check_from_files(module, pipeline, model)


def test_what_cannot_be_written_is_skipped_and_the_rest_is_kept(
    output_of, exported, photos, tmp_path
):
    """A picture of more pixels a side than JPEG has, and one where a folder is."""
    for name in 'ab':
        (tmp_path / f'{name}.png').write_bytes((photos / f'{name}.png').read_bytes())
    cv2.imwrite(str(tmp_path / 'long.png'), np.zeros((1, 65501, 3), np.uint8))
    out = tmp_path / 'out'
    (out / 'pictures/a.jpg').mkdir(parents=True)
    output_of('run_onnx.py', exported('retinanet').file, f'{tmp_path} --out {out}', expect=1)
    listed = read_json(out / 'images.json')
    assert [one['file_name'] for one in listed['images']] == ['a.png', 'b.png', 'long.png']
    assert [one['file_name'] for one in listed['skipped']] == ['a.png', 'long.png']
    assert all('could not be written' in one['reason'] for one in listed['skipped'])
    assert {one['image_id'] for one in read_json(out / 'results.bbox.json')} >= {2}
    assert cv2.imread(str(out / 'pictures/b.jpg')) is not None


def test_annotations_name_images_by_the_end_of_their_paths(tmp_path):
    def ids_of(*listed: str, files=('cam0/frame.png', 'cam1/frame.png')):
        known = [dict(id=number, file_name=name) for number, name in enumerate(listed, start=7)]
        (tmp_path / 'known.json').write_text(json.dumps(dict(images=known, categories=[])))
        ids = Ids(str(tmp_path / 'known.json'), [])
        return ids.annotated([tmp_path / file for file in files], files)

    assert ids_of('cam0/frame.png', 'cam1/frame.png') == [7, 8]
    assert ids_of('cam0/frame.png', 'cam1/frame.png', files=['cam1/frame.png']) == [8]
    for listed, said in (
        (['frame.png'], 'are one image in it'),
        (['frame.png', 'frame.png'], "lists the image 'frame.png' more than once"),
        (['cam0/frame.png'], 'names no image'),
    ):
        with pytest.raises(UserError, match=said):
            ids_of(*listed)


@pytest.mark.parametrize('how, most', [('to_float16', 0.8), ('to_int8', 1.0)])
def test_smaller_weights_return_almost_the_same(exported, photos, tmp_path, how, most):
    from crossformer_mm.export import smaller

    file = exported('segmentor').file
    small = tmp_path / 'small.onnx'
    small.write_bytes(file.read_bytes())
    getattr(smaller, how)(small)
    assert small.stat().st_size < most * file.stat().st_size  # of a small model, much is no weight
    image = cv2.imread(str(photos / 'f.png'))
    labels = [Model(path)(image)['labels'] for path in (file, small)]
    assert 0.9 < (labels[0] == labels[1]).mean()


def test_openvino_returns_the_same(output_of, exported, tmp_path):
    pytest.importorskip('openvino')
    for kind in CONFIGS:
        options = f'--out {tmp_path}/{kind} --provider openvino --threads 1'
        output_of('run_onnx.py', exported(kind).file, exported(kind).photos / 'a.png', options)
        if kind == 'segmentor':
            folders = tmp_path / kind, exported(kind).torch
            ours, theirs = (read_labels(folder / 'labels/a.png') for folder in folders)
            assert (ours == theirs).mean() >= 0.999
        else:
            theirs, _ = exported(kind).both('results.bbox.json')
            ours = read_json(tmp_path / kind / 'results.bbox.json')
            assert_one_to_one([one for one in theirs if one['image_id'] == 1], ours)


@pytest.mark.parametrize(
    'arguments, sentence',
    refusals("""
none.onnx a.png -> model: file 'none.onnx' does not exist.
a.png a.png -> cannot be loaded
a.png nothing* -> images: 'nothing*' is no file, no folder and matches nothing.
a.png a.png --score-thr 2 -> --score-thr must be from 0 to 1, got 2.0.
a.png a.png --out a.png -> is a file.
"""),
)
def test_what_cannot_work_is_said_in_one_sentence(refusal_of, photos, arguments, sentence):
    assert sentence in refusal_of('run_onnx.py', arguments, folder=photos)
