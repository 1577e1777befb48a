"""Files of tools/export.py in tools/run_onnx.py, which has no PyTorch: as tools/predict.py has it."""

import json
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from matplotlib import cbook
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from crossformer_mm.errors import UserError
from crossformer_mm.without_torch.model import Model
from crossformer_mm.without_torch.results import Ids

from ..helpers import refusals
from .exported import (
    CLASSIFIER,
    CONFIGS,
    LISTED,
    assert_one_to_one,
    assert_same_boxes,
    masks_are_alike,
    spread,
)


def test_there_are_images_with_no_few_and_the_most_boxes(exported):
    _, ours = exported('retinanet').both('results.bbox.json')
    found = Counter(one['image_id'] for one in ours)
    counts = [found[image] for image in range(1, 8)]
    assert 0 in counts and max(counts) == 100 and any(0 < count < 100 for count in counts)


@pytest.mark.parametrize('kind', ['retinanet', 'mask_rcnn'])
def test_boxes_are_those_of_predict(exported, kind):
    theirs, ours = exported(kind).both('results.bbox.json')
    assert_same_boxes(theirs, ours)
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
    files = [
        sorted(path.relative_to(folder) for path in folder.rglob('*') if path.is_file())
        for folder in (exported(kind).torch, exported(kind).onnx)
    ]
    assert files[0] == files[1]
    for name in files[1]:
        if name.parts[0] == 'pictures':
            shape = cv2.imread(str(exported(kind).onnx / name)).shape
            assert shape == cv2.imread(str(exported(kind).photos / f'{name.stem}.png')).shape


def test_label_maps_are_those_of_predict(exported):
    same = total = 0
    for path in sorted((exported('segmentor').onnx / 'labels').iterdir()):
        ours = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        theirs = cv2.imread(
            str(exported('segmentor').torch / 'labels' / path.name), cv2.IMREAD_UNCHANGED
        )
        assert ours.shape == theirs.shape and ours.min() >= 1
        same, total = same + (ours == theirs).sum(), total + ours.size
    assert same / total >= 0.9999


def test_label_maps_of_a_photo_are_those_of_predict(output_of, exported, tmp_path):
    """With resizing inside, from the size of a photo that Matplotlib carries."""
    files = [cbook.get_sample_data('grace_hopper.jpg', asfileobj=False)]
    kind, file = exported('segmentor'), tmp_path / 'model.onnx'
    scale = ['--cfg-options', 'test_dataloader.dataset.pipeline.1.scale=(256,128)']
    weights = kind.config.with_suffix('.pth')
    arguments = ['--out', file, '--threads', 1, '--resize-inside', '--shape', 64, 64, *scale]
    output_of('export.py', kind.config, weights, *arguments)
    output_of('predict.py', kind.config, weights, *files, '--out', tmp_path / 'torch', *scale)
    output_of('run_onnx.py', file, *files, '--out', tmp_path / 'onnx', '--threads', 1)
    maps = sorted((tmp_path / 'torch/labels').rglob('*.png'))
    assert len(maps) == len(files)
    for path in maps:
        theirs = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        ours = tmp_path / 'onnx/labels' / path.relative_to(tmp_path / 'torch/labels')
        ours = cv2.imread(str(ours), cv2.IMREAD_UNCHANGED)
        assert ours.shape == theirs.shape and len(np.unique(theirs)) > 2
        assert (ours == theirs).mean() >= 0.9999


def test_scores_of_a_classifier_are_those_of_mmpretrain(output_of, photos, tmp_path):
    """With its own pipeline, which resizes by Pillow and crops; and with a batch."""
    pytest.importorskip('mmpretrain')
    from mmengine.dataset import Compose, pseudo_collate

    onnxruntime = pytest.importorskip('onnxruntime')
    (tmp_path / 'classifier.py').write_text(CLASSIFIER)
    cfg = Config.fromfile(tmp_path / 'classifier.py')
    init_default_scope('mmpretrain')
    model = MODELS.build(cfg.model).eval()
    spread(model)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'weights.pth')
    file = tmp_path / 'model.onnx'
    arguments = [tmp_path / 'classifier.py', tmp_path / 'weights.pth', '--out', file, '--threads']
    output_of('export.py', *arguments, 1, '--shape', 32, 32)
    files = sorted(photos.iterdir())
    output_of('run_onnx.py', file, *files, '--out', tmp_path / 'out', expect=1)
    listed = json.loads((tmp_path / 'out/images.json').read_text())
    assert [one['file_name'] for one in listed['skipped']] == ['none.jpg']
    init_default_scope('mmpretrain')  # the tools begin without one
    pipeline, results = Compose(cfg.test_dataloader.dataset.pipeline), []
    for image in listed['images']:
        packed = pipeline(dict(img_path=str(photos / image['file_name']), gt_label=0))
        with torch.no_grad():
            (sample,) = model.test_step(pseudo_collate([packed]))
        scores, labels = sample.pred_score.sort(descending=True)
        results += zip([image['id']] * 5, labels[:5].tolist(), scores[:5].tolist())
    ours = json.loads((tmp_path / 'out/results.classes.json').read_text())
    assert len(ours) == len(results) == 35 and len({one['category_id'] for one in ours}) > 3
    for one, (image, label, score) in zip(ours, results):
        assert (one['image_id'], one['category_id']) == (image, label)
        assert abs(one['score'] - score) < 1e-5
    images = torch.randint(256, (3, 3, 40, 33), dtype=torch.uint8)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    (scores,) = session.run(['scores'], dict(image=images.numpy()))
    with torch.no_grad():
        inputs = model.data_preprocessor(dict(inputs=list(images.flip(1))), False)['inputs']
        wanted = model(inputs, mode='tensor').softmax(1)
    np.testing.assert_allclose(scores, wanted.numpy(), atol=1e-5)


def test_a_segmentor_takes_batches(exported):
    import onnxruntime

    file = exported('segmentor').file
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    images = np.random.default_rng(0).integers(256, size=(3, 3, 40, 33), dtype=np.uint8)
    size = np.array([50, 41])
    (together,) = session.run(['labels'], dict(image=images, size=size))
    assert together.shape == (3, 50, 41)
    for image, labels in zip(images, together):
        (alone,) = session.run(['labels'], dict(image=image[None], size=size))
        assert (alone[0] == labels).mean() >= 0.999


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
    weights = config.with_suffix('.pth')
    step = 'test_dataloader.dataset.pipeline.0'
    options = ['--cfg-options', f'{step}.color_type=color_ignore_orientation']
    options.append(f'{step}.to_float32=True')
    output_of('export.py', config, weights, '--out', file, '--threads', 1, *options)
    output_of('predict.py', f'{config} {weights} {tmp_path} --out {tmp_path}/torch', *options)
    output_of('run_onnx.py', file, tmp_path / 'turned.jpg', '--out', tmp_path / 'onnx')
    theirs, ours = (
        json.loads((tmp_path / name / 'results.bbox.json').read_text())
        for name in ('torch', 'onnx')
    )
    assert_same_boxes(theirs, ours)
    (listed,) = json.loads((tmp_path / 'onnx/images.json').read_text())['images']
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

    cfg = Config.fromfile(exported('retinanet').config)
    init_default_scope('mmdet')
    module = WholeDetector(MODELS.build(cfg.model).eval())
    model = Model(exported('retinanet').file)
    pipeline = cfg.test_dataloader.dataset.pipeline
    check_from_files(module, pipeline, model)
    pipeline[0][option] = wrong
    with pytest.raises(Differs) as raised:
        check_from_files(module, pipeline, model)
    assert said in str(raised.value)


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
    listed = json.loads((out / 'images.json').read_text())
    assert [one['file_name'] for one in listed['images']] == ['a.png', 'b.png', 'long.png']
    assert [one['file_name'] for one in listed['skipped']] == ['a.png', 'long.png']
    assert all('could not be written' in one['reason'] for one in listed['skipped'])
    assert {one['image_id'] for one in json.loads((out / 'results.bbox.json').read_text())} >= {2}
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
            ours, theirs = (
                cv2.imread(str(folder / 'labels/a.png'), cv2.IMREAD_UNCHANGED)
                for folder in (tmp_path / kind, exported(kind).torch)
            )
            assert (ours == theirs).mean() >= 0.999
        else:
            theirs, _ = exported(kind).both('results.bbox.json')
            ours = json.loads((tmp_path / kind / 'results.bbox.json').read_text())
            assert_same_boxes([one for one in theirs if one['image_id'] == 1], ours)


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
