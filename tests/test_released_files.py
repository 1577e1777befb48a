"""Files of the structure that the authors released, in whole models and through the tools."""

import pickle
import re
from collections import OrderedDict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

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
    backbone = CrossFormer(
        arch, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth'))
    ).eval()
    backbone.init_weights()
    with torch.no_grad():
        for feature, expected in zip(backbone(image), donor(image), strict=True):
            assert torch.equal(feature, expected)


# Parameters of the heads as MMDetection 2.8 and MMSegmentation 0.12 name them.
BOTH = ('weight', 'bias')
NECK = [
    f'neck.{convs}.{i}.conv.{p}'
    for convs in ('lateral_convs', 'fpn_convs')
    for i in range(4)
    for p in BOTH
]
HEADS = {
    'configs/mask_rcnn/cf_s_1x.py': NECK
    + [
        f'{name}.{p}'
        for p in BOTH
        for name in (
            'rpn_head.rpn_conv',
            'rpn_head.rpn_cls',
            'rpn_head.rpn_reg',
            'roi_head.bbox_head.fc_cls',
            'roi_head.bbox_head.fc_reg',
            'roi_head.bbox_head.shared_fcs.0',
            'roi_head.bbox_head.shared_fcs.1',
            *(f'roi_head.mask_head.convs.{i}.conv' for i in range(4)),
            'roi_head.mask_head.upsample',
            'roi_head.mask_head.conv_logits',
        )
    ],
    'configs/retinanet/cf_s_1x.py': None,
    'configs/upernet/cf_s_160k.py': None,
}
HEADS['configs/retinanet/cf_s_1x.py'] = [
    f'neck.{convs}.{i}.conv.{p}'
    for convs, count in (('lateral_convs', 3), ('fpn_convs', 5))
    for i in range(count)
    for p in BOTH
] + [
    f'bbox_head.{name}.{p}'
    for p in BOTH
    for name in (
        'retina_cls',
        'retina_reg',
        *(f'{branch}_convs.{i}.conv' for branch in ('cls', 'reg') for i in range(4)),
    )
]
HEADS['configs/upernet/cf_s_160k.py'] = [
    f'{head}.conv_seg.{p}' for p in BOTH for head in ('decode_head', 'auxiliary_head')
] + [
    f'{name}.{key}'
    for key in (
        'conv.weight',
        *(f'bn.{p}' for p in (*BOTH, 'running_mean', 'running_var', 'num_batches_tracked')),
    )
    for name in (
        'auxiliary_head.convs.0',
        'decode_head.bottleneck',
        'decode_head.fpn_bottleneck',
        *(f'decode_head.psp_modules.{i}.1' for i in range(4)),
        *(f'decode_head.{convs}.{i}' for convs in ('lateral_convs', 'fpn_convs') for i in range(3)),
    )
]


@pytest.mark.parametrize('config', HEADS)
def test_parameters_of_heads_have_the_names_they_had(config):
    with torch.device('meta'):
        model = model_of(config)
    heads = {key for key in model.state_dict() if not key.startswith('backbone.')}
    assert heads == set(HEADS[config])


@pytest.mark.parametrize('buffers', [earlier, later])
@pytest.mark.parametrize('config', [DEMO_DETECTOR, DEMO_SEGMENTOR])
def test_whole_models_give_equal_outputs(tmp_path, config, buffers):
    donor = model_of(config)
    torch.save(openmmlab_file(donor, buffers), tmp_path / 'file.pth')
    model = model_of(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    checkpoint = read_checkpoint(str(tmp_path / 'file.pth'))
    fit_checkpoint(model, checkpoint, 'file')
    assert checkpoint['state_dict'].keys() == donor.state_dict().keys()
    for value, expected in zip(outputs(model), outputs(donor), strict=True):
        assert torch.equal(value, expected)


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
    kept = pickle.loads(out.read_bytes())
    return [
        np.concatenate(
            [
                one['pred_instances'][key].flatten().float().numpy()
                for key in ('bboxes', 'scores', 'labels')
            ]
        )
        for one in kept
    ]


@pytest.fixture(scope='module')
def donors():
    """A detector and a segmentor with random weights."""
    return {config: model_of(config) for config in (DEMO_DETECTOR, DEMO_SEGMENTOR)}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    shapes = make_data(tmp_path_factory.mktemp('data') / 'shapes', train=1, val=4, size=96)
    return {DEMO_DETECTOR: shapes / 'coco', DEMO_SEGMENTOR: shapes / 'ade'}


@pytest.mark.parametrize(
    'config, meta',
    [(DEMO_DETECTOR, DETECTION), (DEMO_SEGMENTOR, dict(SEGMENTATION, CLASSES=('disk', 'square')))],
)
def test_evaluation_gives_equal_predictions(tmp_path, donors, data, config, meta):
    donor = donors[config]
    ours = save(tmp_path, dict(state_dict=donor.state_dict(), meta={}), 'ours.pth')
    theirs = save(tmp_path, openmmlab_file(donor, later, **meta), 'theirs.pth')
    kept = {}
    for file in (ours, theirs):
        work = tmp_path / file.stem
        work.mkdir()
        kept[file] = evaluate(config, file, data[config], work)
    assert len(kept[ours]) == 4 and sum(one.size for one in kept[ours]) > 100
    for one, expected in zip(kept[theirs], kept[ours], strict=True):
        assert np.array_equal(one, expected)


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
        (
            dict(missing=['roi_head.bbox_head.fc_cls.bias']),
            'missing roi_head.bbox_head.fc_cls.bias',
        ),
        (
            dict(missing=['backbone.layers.1.blocks.0.norm1.bias']),
            'missing backbone.layers.1.blocks.0',
        ),
        (dict(extra=torch.ones(2)), 'unexpected extra'),
        (
            dict(shape=['rpn_head.rpn_cls.bias']),
            'of another shape rpn_head.rpn_cls.bias ((7,) in the file, (3,) here)',
        ),
    ],
)
def test_what_does_not_fit_is_named(donors, change, expected):
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        fit_checkpoint(donors[DEMO_DETECTOR], changed(donors[DEMO_DETECTOR], **change), 'file')


def test_evaluation_of_a_partly_random_model_is_refused(refused, donors):
    said = refused(changed(donors[DEMO_DETECTOR], missing=['roi_head.bbox_head.fc_cls.bias']))
    assert 'missing roi_head.bbox_head.fc_cls.bias' in said and '--allow-partial' in said


def test_a_partial_model_is_evaluated_if_told_to(donors, data, tmp_path):
    parts = dict(missing=['rpn_head.rpn_cls.bias'], shape=['rpn_head.rpn_reg.bias'])
    file = save(tmp_path, changed(donors[DEMO_DETECTOR], **parts, extra=torch.ones(2)))
    kept = evaluate(DEMO_DETECTOR, file, data[DEMO_DETECTOR], tmp_path, '--allow-partial')
    assert len(kept) == 4


def test_everything_that_does_not_fit_is_logged(donors, monkeypatch):
    lines = []
    monkeypatch.setattr('crossformer_mm.openmmlab.print_log', lambda line, *_: lines.append(line))
    missing = [f'roi_head.mask_head.convs.{i}.conv.weight' for i in range(4)]
    content = changed(donors[DEMO_DETECTOR], missing=missing, extra=torch.ones(2))
    fit_checkpoint(donors[DEMO_DETECTOR], content, 'file', None)
    assert [line.split(': ')[1] for line in lines] == [
        'missing ' + ', '.join(missing),
        'unexpected extra',
    ]
    assert 'extra' not in content['state_dict']


def test_weights_of_a_backbone_alone_are_refused(refused, donors):
    said = refused(imagenet_file(donors[DEMO_DETECTOR].backbone, earlier))
    assert 'model.backbone.init_cfg.checkpoint' in said


def test_weights_of_nothing_alike_are_refused_even_in_part(donors):
    with pytest.raises(CheckpointError, match='holds nothing of this model'):
        fit_checkpoint(
            donors[DEMO_DETECTOR], dict(state_dict={'fc.bias': torch.ones(3)}), 'file', None
        )


@pytest.mark.parametrize('content', [[], {}, dict(state_dict={}), torch.ones(2)])
def test_no_weights_is_said(donors, content):
    with pytest.raises(CheckpointError, match='holds no weights'):
        fit_checkpoint(donors[DEMO_DETECTOR], content, 'file')


def test_training_from_another_backbone_is_refused(refused, donors):
    content = changed(donors[DEMO_DETECTOR], missing=['backbone.layers.1.blocks.0.norm1.bias'])
    said = refused(content, 'load_from={}', 'train.py')
    assert 'missing backbone.layers.1.blocks.0.norm1.bias' in said


def test_going_on_from_a_file_without_training_state_is_refused(refused, donors):
    content = openmmlab_file(donors[DEMO_DETECTOR], earlier)
    said = refused(content, 'resume=True load_from={}', 'train.py')
    assert 'holds no state of a training (message_hub)' in said


def test_training_may_start_from_other_heads(donors):
    content = changed(donors[DEMO_DETECTOR], shape=['roi_head.bbox_head.fc_cls.bias'])
    fit_checkpoint(donors[DEMO_DETECTOR], content, 'file', required='backbone.')
    assert 'roi_head.bbox_head.fc_cls.bias' not in content['state_dict']


@pytest.mark.parametrize('tool', ['train.py', 'test.py'])
def test_truncated_files_are_refused_by_the_tools(refusal_of, donors, data, tmp_path, tool):
    path = save(tmp_path, openmmlab_file(donors[DEMO_DETECTOR], earlier), 'bad.pth')
    path.write_bytes(path.read_bytes()[:1000])
    checkpoint = f'--resume {path}' if tool == 'train.py' else path
    paths = f'--work-dir {tmp_path} --data-root {data[DEMO_DETECTOR]}'
    said = refusal_of(tool, f'{DEMO_DETECTOR} {checkpoint} {paths}')
    assert str(path) in said and 'cut short' in said
