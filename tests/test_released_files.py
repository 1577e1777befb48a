"""Files of the structure that the authors released, in whole models and through the tools."""

import pickle
import re
from collections import OrderedDict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from crossformer_mm import CrossFormer
from crossformer_mm.checkpoint import CheckpointError, fit_checkpoint, read_checkpoint

from .authors import (
    DETECTION,
    SEGMENTATION,
    earlier,
    imagenet_file,
    later,
    no_buffers,
    openmmlab_file,
)
from .helpers import DEMO_DETECTOR, DEMO_SEGMENTOR, model_of, outputs, run_tool
from .trainings import make_data

pytestmark = pytest.mark.usefixtures('own_loaders')
# As in the demo, but without what published models have not.
PUBLISHED = 'model.backbone.out_norm=False'


@pytest.mark.parametrize('buffers', [no_buffers, earlier, later])
@pytest.mark.parametrize('arch', ['s', 'pp-s'])
def test_imagenet_file_gives_equal_features(tmp_path, small, arch, buffers):
    donor, image = small(arch), torch.rand(1, 3, 65, 97)
    torch.save(imagenet_file(donor, buffers), tmp_path / 'file.pth')
    pretrained = dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth'))
    backbone = CrossFormer(arch, init_cfg=pretrained).eval()
    backbone.init_weights()
    torch.testing.assert_close(backbone(image), donor(image), rtol=0, atol=0)


# Layers of the heads as MMDetection 2.8 and MMSegmentation 0.12 name them, by how many there are.
LAYERS = {
    'configs/mask_rcnn/cf_s_1x.py': {
        4: 'neck.lateral_convs.{}.conv neck.fpn_convs.{}.conv roi_head.mask_head.convs.{}.conv',
        2: 'roi_head.bbox_head.shared_fcs.{}',
        1: 'rpn_head.rpn_conv rpn_head.rpn_cls rpn_head.rpn_reg roi_head.bbox_head.fc_cls '
        'roi_head.bbox_head.fc_reg roi_head.mask_head.upsample roi_head.mask_head.conv_logits',
    },
    'configs/retinanet/cf_s_1x.py': {
        5: 'neck.fpn_convs.{}.conv',
        4: 'bbox_head.cls_convs.{}.conv bbox_head.reg_convs.{}.conv',
        3: 'neck.lateral_convs.{}.conv',
        1: 'bbox_head.retina_cls bbox_head.retina_reg',
    },
    'configs/upernet/cf_s_160k.py': {1: 'decode_head.conv_seg auxiliary_head.conv_seg'},
}
UPERNETS_WITH_NORM = {
    4: 'decode_head.psp_modules.{}.1',
    3: 'decode_head.lateral_convs.{} decode_head.fpn_convs.{}',
    1: 'auxiliary_head.convs.0 decode_head.bottleneck decode_head.fpn_bottleneck',
}
BOTH = ('weight', 'bias')
NORM = (*BOTH, 'running_mean', 'running_var', 'num_batches_tracked')


def parameters(layers: dict, parts) -> set:
    return {
        f'{name.format(number)}.{part}'
        for count, names in layers.items()
        for name in names.split()
        for number in range(count)
        for part in parts
    }


@pytest.mark.parametrize('config', LAYERS)
def test_parameters_of_heads_have_the_names_they_had(config):
    with torch.device('meta'):
        model = model_of(config)
    expected = parameters(LAYERS[config], BOTH)
    if 'upernet' in config:
        parts = ['conv.weight', *(f'bn.{part}' for part in NORM)]
        expected |= parameters(UPERNETS_WITH_NORM, parts)
    assert {key for key in model.state_dict() if not key.startswith('backbone.')} == expected


@pytest.mark.parametrize('buffers', [earlier, later])
@pytest.mark.parametrize('config', [DEMO_DETECTOR, DEMO_SEGMENTOR])
def test_whole_models_give_equal_outputs(tmp_path, config, buffers):
    donor = model_of(config)
    torch.save(openmmlab_file(donor, buffers), tmp_path / 'file.pth')
    model = model_of(config)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    checkpoint = read_checkpoint(str(tmp_path / 'file.pth'))
    fit_checkpoint(model, checkpoint, 'file')
    assert checkpoint['state_dict'].keys() == donor.state_dict().keys()
    torch.testing.assert_close(outputs(model), outputs(donor), rtol=0, atol=0)


def save(tmp_path, content, name='file.pth') -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def evaluate(config, checkpoint, data, work, options='') -> list:
    """Predictions that tools/test.py keeps of each image; in this process, for speed."""
    out = work / ('maps' if config == DEMO_SEGMENTOR else 'predictions.pkl')
    paths = f'--data-root {data} --work-dir {work} --out {out}'
    settings = f'--cfg-options {PUBLISHED} test_dataloader.batch_size=2'
    assert run_tool('test.py', f'{config} {checkpoint} {paths} {options} {settings}') == 0
    if config == DEMO_SEGMENTOR:
        return [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in sorted(out.glob('*.png'))]
    kept = [image['pred_instances'] for image in pickle.loads(out.read_bytes())]
    parts = ('bboxes', 'scores', 'labels')
    return [torch.cat([one[key].flatten().float() for key in parts]).numpy() for one in kept]


@pytest.fixture(scope='module')
def detector():
    return model_of(DEMO_DETECTOR)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    shapes = make_data(tmp_path_factory.mktemp('data') / 'shapes', train=1, val=4, size=96)
    return {DEMO_DETECTOR: shapes / 'coco', DEMO_SEGMENTOR: shapes / 'ade'}


@pytest.mark.parametrize(
    'config, meta',
    [(DEMO_DETECTOR, DETECTION), (DEMO_SEGMENTOR, dict(SEGMENTATION, CLASSES=('disk', 'square')))],
)
def test_evaluation_gives_equal_predictions(tmp_path, data, config, meta):
    donor, kept = model_of(config), {}
    ours = dict(state_dict=donor.state_dict(), meta={})
    theirs = openmmlab_file(donor, later, **meta)
    for name, content in (('ours', ours), ('theirs', theirs)):
        work = tmp_path / name
        work.mkdir()
        kept[name] = evaluate(config, save(work, content), data[config], work)
    assert len(kept['ours']) == 4 and sum(one.size for one in kept['ours']) > 100
    for one, expected in zip(kept['theirs'], kept['ours'], strict=True):
        np.testing.assert_array_equal(one, expected)


@pytest.fixture
def refused(refusal_of, data, tmp_path):
    """Runs a tool on the demo's detector and a file with some content; the sentence names it."""

    def run(content, options='', tool='test.py') -> str:
        path = save(tmp_path, content)
        checkpoint = path if tool == 'test.py' else ''
        paths = f'--work-dir {tmp_path}/work --data-root {data[DEMO_DETECTOR]}'
        settings = f'--cfg-options {PUBLISHED} {options.format(path)}'
        said = refusal_of(tool, f'{DEMO_DETECTOR} {checkpoint} {paths} {settings}')
        assert str(path) in said
        return said

    return run


CLASSIFIER = 'roi_head.bbox_head.fc_cls.bias'
NORM_OF_BLOCK = 'backbone.layers.1.blocks.0.norm1.bias'


def changed(model, missing=(), shape=(), **more) -> dict:
    state = OrderedDict(model.state_dict(), **more)
    for key in missing:
        del state[key]
    for key in shape:
        state[key] = torch.zeros(7)
    return openmmlab_file(model, earlier) | dict(state_dict=state)


@pytest.mark.parametrize(
    'change, expected',
    [
        (dict(extra=torch.ones(2)), 'unexpected extra'),
        (
            dict(shape=['rpn_head.rpn_cls.bias']),
            'of another shape rpn_head.rpn_cls.bias ((7,) in the file, (3,) here)',
        ),
    ],
)
def test_what_does_not_fit_is_named(detector, change, expected):
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        fit_checkpoint(detector, changed(detector, **change), 'file')


def test_evaluation_of_a_partly_random_model_is_refused(refused, detector):
    said = refused(changed(detector, missing=[CLASSIFIER]))
    assert f'missing {CLASSIFIER}' in said and '--allow-partial' in said


def test_a_partial_model_is_evaluated_if_told_to(detector, data, tmp_path):
    parts = dict(missing=['rpn_head.rpn_cls.bias'], shape=['rpn_head.rpn_reg.bias'])
    file = save(tmp_path, changed(detector, **parts, extra=torch.ones(2)))
    kept = evaluate(DEMO_DETECTOR, file, data[DEMO_DETECTOR], tmp_path, '--allow-partial')
    assert len(kept) == 4


def test_everything_that_does_not_fit_is_logged(detector, monkeypatch):
    lines = []
    monkeypatch.setattr('crossformer_mm.openmmlab.print_log', lambda line, *_: lines.append(line))
    missing = [f'roi_head.mask_head.convs.{i}.conv.weight' for i in range(4)]
    content = changed(detector, missing=missing, extra=torch.ones(2))
    fit_checkpoint(detector, content, 'file', None)
    assert [line.split(': ')[1] for line in lines] == [
        'missing ' + ', '.join(missing),
        'unexpected extra',
    ]
    assert 'extra' not in content['state_dict']


def test_weights_of_a_backbone_alone_are_refused(refused, detector):
    said = refused(imagenet_file(detector.backbone, earlier))
    assert 'model.backbone.init_cfg.checkpoint' in said


def test_weights_of_nothing_alike_are_refused_even_in_part(detector):
    content = dict(state_dict={'fc.bias': torch.ones(3)})
    with pytest.raises(CheckpointError, match='holds nothing of this model'):
        fit_checkpoint(detector, content, 'file', None)


@pytest.mark.parametrize('content', [[], {}, dict(state_dict={}), torch.ones(2)])
def test_no_weights_is_said(detector, content):
    with pytest.raises(CheckpointError, match='holds no weights'):
        fit_checkpoint(detector, content, 'file')


def test_training_from_another_backbone_is_refused(refused, detector):
    content = changed(detector, missing=[NORM_OF_BLOCK])
    said = refused(content, 'load_from={}', 'train.py')
    assert f'missing {NORM_OF_BLOCK}' in said


def test_going_on_from_a_file_without_training_state_is_refused(refused, detector):
    content = openmmlab_file(detector, earlier)
    said = refused(content, 'resume=True load_from={}', 'train.py')
    assert 'holds no state of a training (message_hub)' in said


def test_training_may_start_from_other_heads(detector):
    content = changed(detector, shape=[CLASSIFIER])
    fit_checkpoint(detector, content, 'file', required='backbone.')
    assert CLASSIFIER not in content['state_dict']


@pytest.mark.parametrize('tool', ['train.py', 'test.py'])
def test_truncated_files_are_refused_by_the_tools(refusal_of, detector, data, tmp_path, tool):
    path = save(tmp_path, openmmlab_file(detector, earlier), 'bad.pth')
    path.write_bytes(path.read_bytes()[:1000])
    checkpoint = f'--resume {path}' if tool == 'train.py' else path
    paths = f'--work-dir {tmp_path} --data-root {data[DEMO_DETECTOR]}'
    said = refusal_of(tool, f'{DEMO_DETECTOR} {checkpoint} {paths}')
    assert str(path) in said and 'cut short' in said
