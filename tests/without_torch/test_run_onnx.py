"""Files of tools/export.py in tools/run_onnx.py, which has no PyTorch: as tools/predict.py has it."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from matplotlib import cbook
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image
from pycocotools import mask as rle

from crossformer_mm.compat import EXPORT, missing_torch
from crossformer_mm.errors import UserError
from crossformer_mm.without_torch.files import find_files
from crossformer_mm.without_torch.model import Model, ModelError, start_openvino
from crossformer_mm.without_torch.predict import predict_files
from crossformer_mm.without_torch.results import Ids

from ..helpers import ROOT, TINY_BACKBONE, TINY_SEGMENTOR, refusals, run_tool
from ..trainings import make_data

if missing_torch(EXPORT):
    pytest.skip(f'export: {missing_torch(EXPORT)}', allow_module_level=True)
pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')


PIPELINE = """
test_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale={scale}, keep_ratio=True),
    dict(type='Pack{kind}Inputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]))
"""
DETECTION = PIPELINE.format(scale=(160, 96), kind='Det')
RETINANET = (
    f'''
_base_ = {str(ROOT / 'configs/retinanet/cf_s_1x.py')!r}
model = dict(
    {TINY_BACKBONE},
    neck=dict(in_channels=[16], out_channels=8, num_outs=2),
    bbox_head=dict(in_channels=8, feat_channels=8, stacked_convs=1, num_classes=4,
                   anchor_generator=dict(strides=[4, 8])),
    test_cfg=dict(nms_pre=200, score_thr=0.54, max_per_img=100))
'''
    + DETECTION
)
MASK_RCNN = (
    f'''
_base_ = {str(ROOT / 'configs/mask_rcnn/cf_s_1x.py')!r}
model = dict(
    {TINY_BACKBONE},
    neck=dict(in_channels=[16], out_channels=8, num_outs=3),
    rpn_head=dict(in_channels=8, feat_channels=8, anchor_generator=dict(strides=[4, 8, 16])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=8, featmap_strides=[4, 8], finest_scale=16),
        mask_roi_extractor=dict(out_channels=8, featmap_strides=[4, 8], finest_scale=16),
        bbox_head=dict(in_channels=8, fc_out_channels=8, num_classes=4),
        mask_head=dict(in_channels=8, conv_out_channels=8, num_convs=1, num_classes=4)),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=50), rcnn=dict(max_per_img=20)))
'''
    + DETECTION
)
SEGMENTOR = TINY_SEGMENTOR + PIPELINE.format(scale=(96, 64), kind='Seg')
CLASSIFIER = f'''
_base_ = {str(ROOT / 'configs/imagenet/cf_s_300e.py')!r}
model = dict(
    data_preprocessor=dict(num_classes=6),
    {TINY_BACKBONE},
    neck=dict(in_channels=16), head=dict(in_channels=16, num_classes=6), train_cfg=None)
test_dataloader = dict(dataset=dict(
    data_root='', metainfo=dict(classes=tuple('abcdef')), pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='ResizeEdge', scale=40, edge='short', backend='pillow', interpolation='bicubic'),
        dict(type='CenterCrop', crop_size=32),
        dict(type='PackInputs')]))
'''
CONFIGS = dict(retinanet=RETINANET, mask_rcnn=MASK_RCNN, segmentor=SEGMENTOR)
OPTIONS = dict(mask_rcnn=['--resize-inside'])
OF_ONE_COLOUR = (3, 4)  # ids of c.png and d_dark.png
CLASSES = dict(retinanet='abcd', mask_rcnn='abcd', segmentor='abcde')


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> Path:
    """Images of several shapes, among them the smallest and a long one; and a file that is none."""
    folder = tmp_path_factory.mktemp('photos')
    random = np.random.default_rng(0)
    for name, (height, width) in dict(
        a=(60, 80), b=(75, 51), c=(1, 1), d_dark=(64, 64), e=(30, 400), f=(96, 160), g=(4000, 30)
    ).items():
        coarse = random.integers(256, size=(height // 9 + 2, width // 9 + 2, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
        cv2.imwrite(str(folder / f'{name}.png'), image * (name != 'd_dark'))
    (folder / 'none.jpg').write_bytes(b'no image')
    return folder


def spread(model: torch.nn.Module) -> None:
    """Change random weights so that scores reach from below thresholds to near 1."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() > 1 and not name.startswith('backbone.'):
                parameter.normal_(std=1.2 / parameter[0].numel() ** 0.5)
            if name.endswith(('retina_reg.weight', 'rpn_reg.weight', 'fc_reg.weight')):
                parameter.mul_(0.1)
            if name.endswith('retina_cls.bias'):
                parameter.fill_(-3)
            if name == 'head.fc.weight':
                parameter.mul_(4)


class Exported:
    """A small model as checkpoint and as file, and what both predict of the photos."""

    def __init__(self, kind: str, folder: Path, photos: Path):
        self.config, weights = folder / f'{kind}.py', folder / f'{kind}.pth'
        self.config.write_text(CONFIGS[kind])
        cfg = Config.fromfile(self.config)
        init_default_scope(cfg.default_scope)
        model = MODELS.build(cfg.model)
        spread(model)
        meta = dict(dataset_meta=dict(classes=tuple(CLASSES[kind])))
        torch.save(dict(state_dict=model.state_dict(), meta=meta), weights)
        self.file, self.photos = folder / f'{kind}.onnx', photos
        arguments = (self.config, weights, '--out', self.file, '--shape', 64, 64, '--threads', 1)
        assert run_tool('export.py', *arguments, *OPTIONS.get(kind, ())) == 0
        self.torch, self.onnx = folder / 'torch', folder / 'onnx'
        files = sorted(photos.iterdir())
        if kind == 'segmentor':  # of one pixel MMSegmentation draws no label map
            files = [file for file in files if file.name != 'c.png']
        assert run_tool('predict.py', self.config, weights, *files, '--out', self.torch) == 1
        assert run_tool('run_onnx.py', self.file, *files, '--out', self.onnx, '--threads', 1) == 1

    def both(self, name: str):
        return [json.loads((folder / name).read_text()) for folder in (self.torch, self.onnx)]


@pytest.fixture(scope='module')
def exported(tmp_path_factory, photos):
    made = {}

    def get(kind: str) -> Exported:
        if kind not in made:
            made[kind] = Exported(kind, tmp_path_factory.mktemp(kind), photos)
        return made[kind]

    return get


def assert_one_to_one(theirs, ours, alike):
    """One to one, in any order of almost equal scores. In an image of one colour, boxes at many
    places have the same score, and which of them are kept is open."""
    assert len(theirs) == len(ours)
    left = list(ours)
    for wanted in theirs:
        if wanted['image_id'] in OF_ONE_COLOUR:
            continue
        near = [
            one
            for one in left
            if all(one[key] == wanted[key] for key in ('image_id', 'category_id'))
            and abs(one['score'] - wanted['score']) < 1e-5
            and alike(one, wanted)
        ]
        assert near, wanted
        left.remove(near[0])


def assert_same_boxes(theirs, ours):
    assert_one_to_one(
        theirs,
        ours,
        lambda one, other: np.abs(np.subtract(one['bbox'], other['bbox'])).max() < 0.05,
    )


def masks_are_alike(one, other) -> bool:
    one, other = one['segmentation'], other['segmentation']
    if one['size'] != other['size']:
        return False
    return rle.iou([one], [other], [False]) >= 0.999 or not rle.area(one) + rle.area(other)


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


def copy_to_server(folder: Path, *files: str) -> None:
    """Copy what the page on deployment says."""
    shutil.copytree(ROOT / 'crossformer_mm/without_torch', folder / 'without_torch')
    for file in files:
        shutil.copy(ROOT / file, folder)


def test_a_copy_runs_without_the_repository_and_imports_nothing_of_pytorch(
    exported, photos, tmp_path
):
    copy_to_server(tmp_path, 'tools/run_onnx.py')
    (tmp_path / 'a.png').write_bytes((photos / 'a.png').read_bytes())
    command = ['run_onnx.py', str(exported('retinanet').file), 'a.png']
    alone = dict(cwd=tmp_path, env={**os.environ, 'PYTHONPATH': ''})
    subprocess.run([sys.executable, *command], check=True, **alone)
    assert (tmp_path / 'predictions/pictures/a.jpg').is_file()
    code = f"""
import sys, cv2
sys.path.insert(0, {str(tmp_path)!r})
from run_onnx import Model
found = Model({str(exported('retinanet').file)!r})(cv2.imread({str(photos / 'a.png')!r}))
print(sorted(found), [one for one in ('torch', 'mmcv', 'mmengine', 'crossformer_mm') if one in sys.modules])"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, **alone)
    assert done.stdout.strip() == "['boxes', 'labels', 'scores'] []", done.stderr


@pytest.mark.parametrize(
    'tool, folder',
    [
        ('run_onnx.py', '.'),
        ('tools/run_onnx.py', 'crossformer_mm'),
        ('site-packages/crossformer_mm/.mim/tools/run_onnx.py', 'site-packages/crossformer_mm'),
    ],
    ids=['copied', 'in the repository', 'installed'],
)
def test_the_command_finds_its_modules_wherever_it_is(tmp_path, tool, folder):
    (tmp_path / tool).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / 'tools/run_onnx.py', tmp_path / tool)
    shutil.copytree(ROOT / 'crossformer_mm/without_torch', tmp_path / folder / 'without_torch')
    done = subprocess.run(
        [sys.executable, tmp_path / tool, 'none.onnx', __file__],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': ''},
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "error: model: file 'none.onnx' does not exist."


def answers_differ(one: dict, other: dict) -> bool:
    return len(one['scores']) != len(other['scores']) or not np.allclose(
        one['scores'], other['scores'], atol=1e-3
    )


@pytest.mark.parametrize('provider', ['cpu', 'openvino'])
def test_each_thread_gets_the_answer_of_its_image(exported, photos, provider):
    if provider == 'openvino':
        pytest.importorskip('openvino')
    model = Model(exported('retinanet').file, provider, 1)
    images = [cv2.imread(str(photos / f'{name}.png')) for name in 'abef']
    alone = [model(image) for image in images]
    assert all(answers_differ(alone[0], other) for other in alone[1:])
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(model, images * 4))
    for wanted, found in zip(alone * 4, together):
        assert not answers_differ(wanted, found)


def test_no_two_calls_share_a_request_of_openvino(monkeypatch, tmp_path):
    """With a stand-in: a request returns what it holds when the last of four threads has come."""
    all_there = threading.Barrier(4)

    class Request:
        def infer(self, given):
            self.held = given['image']
            all_there.wait(20)
            return [self.held]

    class Compiled:
        inputs = outputs = [
            SimpleNamespace(any_name='image', element_type=SimpleNamespace(to_string=str))
        ]
        shared = Request()
        create_infer_request = Request

        def __call__(self, given):
            return self.shared.infer(given)

    core = SimpleNamespace(
        read_model=lambda file: SimpleNamespace(get_rt_info=lambda key: SimpleNamespace(value={})),
        compile_model=lambda *arguments: Compiled(),
    )
    monkeypatch.setitem(sys.modules, 'openvino', SimpleNamespace(Core=lambda: core))
    _, _, compute, _ = start_openvino('model.onnx', 1)
    with ThreadPoolExecutor(4) as threads:
        answers = threads.map(lambda number: compute(dict(image=np.array(number))), range(4))
    assert [int(answer[0]) for answer in answers] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    'image, found',
    [
        (None, 'None, which cv2.imread returns for a file that it cannot read'),
        (np.zeros((9, 8), np.uint8), 'uint8 (9, 8)'),
        (np.zeros((9, 8, 1), np.uint8), 'uint8 (9, 8, 1)'),
        (np.zeros((9, 8, 4), np.uint8), 'uint8 (9, 8, 4)'),
        (np.zeros((3, 9, 8), np.uint8), 'uint8 (3, 9, 8)'),
        (np.zeros((1, 9, 8, 3), np.uint8), 'uint8 (1, 9, 8, 3)'),
        (np.zeros((0, 8, 3), np.uint8), 'uint8 (0, 8, 3)'),
        (np.zeros((9, 8, 3), np.uint16), 'uint16 (9, 8, 3)'),
        (np.zeros((9, 8, 3), np.float32), 'float32 (9, 8, 3)'),
        (np.zeros((9, 8, 3), np.int64), 'int64 (9, 8, 3)'),
        (np.zeros((9, 8, 3), np.uint8).tolist(), 'a list'),
        ('photo.jpg', 'a str'),
    ],
    ids=str,
)
def test_a_model_takes_colour_images_of_8_bits_only(exported, image, found):
    model = Model(exported('retinanet').file)
    with pytest.raises(ModelError) as raised:
        model(image)
    said = str(raised.value)
    assert said.startswith('image: it must be an array of uint8 (height, width, 3)')
    assert said.endswith(f'{found}.') and '\n' not in said


def test_a_model_takes_views_and_arrays_that_are_read_only(exported, photos):
    model = Model(exported('retinanet').file)
    image = cv2.imread(str(photos / 'a.png'))
    wanted = model(image)
    view = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    image.setflags(write=False)
    for given in (image, view):
        assert not answers_differ(wanted, model(given))


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


def test_an_error_keeps_what_was_predicted_before(exported, photos, tmp_path, monkeypatch):
    predict, calls = Model.__call__, []

    def fail_at_third(model, image):
        calls.append(image)
        if len(calls) == 3:
            raise RuntimeError('a fault of the runtime')
        return predict(model, image)

    model = Model(exported('retinanet').file)
    monkeypatch.setattr(Model, '__call__', fail_at_third)
    with pytest.raises(RuntimeError, match='a fault of the runtime'):
        predict_files(model, find_files([str(photos)], tmp_path), tmp_path, None, 0.3)
    listed = json.loads((tmp_path / 'images.json').read_text())
    assert [one['file_name'] for one in listed['images']] == ['a.png', 'b.png']
    assert json.loads((tmp_path / 'results.bbox.json').read_text())


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


def test_an_image_without_objects_has_no_boxes(exported):
    model = Model(exported('mask_rcnn').file)
    run_before = model.run

    def of_no_size(given):  # no anchor reaches into an image of one pixel far enough
        return run_before(dict(image=np.zeros((1, 3, 1, 1), np.uint8)))

    model.run = of_no_size
    found = model(np.zeros((1, 1, 3), np.uint8))
    assert {name: len(values) for name, values in found.items()}.keys() >= {'boxes', 'masks'}
    assert found['masks'].shape[1:] == (1, 1)


def test_a_file_of_one_size_in_int8(output_of, refusal_of, exported, photos, tmp_path):
    """On data of shapes, of which random weights know nothing: an AP of 0 is said, too."""
    make_data(tmp_path / 'shapes', train=1, val=2, size=64)
    config, file = exported('retinanet').config, tmp_path / 'model.onnx'
    arguments = ('--fixed-shape', 64, 96, '--int8', '--data-root', tmp_path / 'shapes/coco')
    options = "test_dataloader.dataset.metainfo.classes=('disk','square','triangle','star')"
    arguments += ('--cfg-options', options)
    printed = output_of('export.py', config, '--out', file, '--threads', 1, *arguments)
    assert re.search(r'int8: AP \d\.\d{3} before, \d\.\d{3} after \([+-]\d\.\d{3}\), on 2', printed)
    assert '1 x 64 x 96: relative difference' in printed
    model = Model(file)
    found = model(cv2.imread(str(photos / 'e.png')))  # 30 x 400, made smaller and filled up
    assert model.about['fixed_shape'] == [64, 96] and set(found) == {'boxes', 'scores', 'labels'}
    assert (found['boxes'] >= 0).all() and (found['boxes'] <= [400, 30, 400, 30]).all()
    for arguments, said in {
        '--fixed-shape 0 9': 'must be two numbers',
        '--fixed-shape 64 96 --resize-inside': 'of any size',
        '--int8 --float16': 'give one',
        '--int8': '--data-root',
    }.items():
        assert said in refusal_of('export.py', config, '--out', file, arguments)


def test_what_weights_of_fewer_bits_cost_is_said_by_the_libraries_metrics(photos, tmp_path):
    """Here with what was annotated in place of what a model finds, or with half of it."""
    from crossformer_mm.export.smaller import metric_of

    make_data(tmp_path, train=1, val=3, size=64)
    names = ('disk', 'square', 'triangle', 'star')

    def data_of(scope: str, dataset: dict):
        init_default_scope(scope)
        return DATASETS.build(dict(test_mode=True, pipeline=[], **dataset))

    coco = dict(ann_file='annotations/instances_val2017.json', data_prefix=dict(img='val2017/'))
    coco.update(type='CocoDataset', data_root=str(tmp_path / 'coco'), metainfo=dict(classes=names))
    boxes = data_of('mmdet', coco)
    truths = iter([boxes.get_data_info(index)['instances'] for index in range(3)] * 2)

    def found(share: float):
        objects = next(truths)
        objects = objects[: max(1, int(share * len(objects)))]
        return dict(
            boxes=np.array([one['bbox'] for one in objects], np.float32),
            scores=np.ones(len(objects), np.float32),
            labels=np.array([one['bbox_label'] for one in objects]),
        )

    assert metric_of('mmdet', boxes, lambda image: found(1.0)) == ('AP', 1.0)
    assert 0 < metric_of('mmdet', boxes, lambda image: found(0.5))[1] < 1

    ade = dict(type='BaseSegDataset', data_root=str(tmp_path / 'ade'), reduce_zero_label=True)
    ade.update(img_suffix='.jpg', seg_map_suffix='.png', metainfo=dict(classes=('none', *names)))
    ade['data_prefix'] = dict(img_path='images/validation', seg_map_path='annotations/validation')
    maps = data_of('mmseg', ade)
    infos = [maps.get_data_info(index) for index in range(3)]
    truths = iter([cv2.imread(info['seg_map_path'], cv2.IMREAD_UNCHANGED) for info in infos])
    # 0 of a label map is "other", and becomes 255, which no metric counts.
    name, value = metric_of('mmseg', maps, lambda _: dict(labels=next(truths).astype(int) - 1))
    assert (name, value) == ('mIoU', 1.0)

    pytest.importorskip('mmpretrain')

    class Classes(list):
        def get_data_info(self, index):
            return self[index]

    classes = Classes(dict(img_path=str(photos / 'a.png'), gt_label=label) for label in (0, 1))
    scores = np.array([0.9, 0.1], np.float32)
    accuracy = metric_of('mmpretrain', classes, lambda _: dict(scores=scores))
    assert accuracy == ('top-1 accuracy', 0.5)


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


def test_the_service_answers_over_http(exported, photos, tmp_path):
    """In a process of its own, from copied files, with a real port."""
    for package in ('fastapi', 'uvicorn', 'httpx', 'python_multipart'):
        pytest.importorskip(package)
    import httpx

    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    copy_to_server(tmp_path, 'examples/service.py')
    server = subprocess.Popen(
        [sys.executable, '-m', 'uvicorn', 'service:app', '--port', str(port)],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': '', 'MODEL': str(exported('mask_rcnn').file)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in server.stderr:
            if 'running on' in line:
                break
        with httpx.Client(base_url=f'http://127.0.0.1:{port}', timeout=60) as client:
            image = (photos / 'a.png').read_bytes()
            found = client.post('/predict', files=dict(image=image)).json()['objects']
            assert client.get('/about').json()['classes'] == ['a', 'b', 'c', 'd']
            refused = client.post('/predict', files=dict(image=b'no image'))
            assert refused.status_code == 415 and 'is no image' in refused.json()['detail']
    finally:
        server.kill()
        server.communicate()
    theirs, _ = exported('mask_rcnn').both('results.bbox.json')
    theirs = [one for one in theirs if one['image_id'] == 1]
    assert len(found) == len(theirs) > 0
    assert np.abs(np.subtract(
        [one['score'] for one in found], [one['score'] for one in theirs]
    )).max() < 1e-5  # fmt: skip
    assert set(found[0]) == {'label', 'score', 'box', 'area'}


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
