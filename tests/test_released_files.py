"""Files of the structure that the authors released, in whole models and through the tools."""

import pickle
import re
from collections import OrderedDict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader

from crossformer_mm import CrossFormer
from crossformer_mm.checkpoint import CheckpointError, fit_checkpoint, read_checkpoint

from .test_tools import DETECTOR, ROOT, SEGMENTOR, sentence, shapes  # noqa: F401
from .tool_process import run_as_main

# As in the demo, but without what published models have not.
PUBLISHED = ['model.backbone.out_norm=False']


def model_of(config: str, *options: str):
    """A model in evaluation mode in which every parameter and statistic matters."""
    cfg = Config.fromfile(ROOT / config)
    cfg.merge_from_dict(dict(option.split('=') for option in options))
    cfg.merge_from_dict({'model.backbone.out_norm': False})
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                noise = 0.02 * torch.randn_like(value)
                value.add_(noise.abs() if key.endswith('running_var') else noise)
    return model


def earlier(block: str) -> dict:
    """Buffers of a block in files of the authors' earlier code."""
    return {
        f'{block}.attn.biases': torch.zeros(169, 2),
        f'{block}.attn.relative_position_index': torch.zeros(49, 49).long(),
    }


def later(block: str) -> dict:
    """Buffers that their later code may add."""
    return {**earlier(block), f'{block}.attn_mask': torch.zeros(64, 49, 49)}


def no_buffers(block: str) -> dict:
    return {}


def with_buffers(state: dict, buffers) -> OrderedDict:
    """Weights with a set of buffers in each block. No `_metadata`: mmcv of then dropped it."""
    blocks = {key.split('.attn.qkv')[0] for key in state if '.attn.qkv' in key}
    return OrderedDict(
        state, **{key: value for block in blocks for key, value in buffers(block).items()}
    )


def imagenet_file(backbone, buffers) -> dict:
    """A file as the authors' main.py saves it; the last channels depend on the architecture."""
    state = with_buffers(backbone.state_dict(), buffers)
    channels = backbone.out_channels[-1]
    state.update(
        {
            'norm.weight': torch.ones(channels),
            'norm.bias': torch.zeros(channels),
            'head.weight': torch.zeros(1000, channels),
            'head.bias': torch.zeros(1000),
        }
    )
    optimizer = torch.optim.AdamW(backbone.parameters())
    return dict(
        model=state,
        optimizer=optimizer.state_dict(),
        max_accuracy=82.5,
        epoch=299,
        lr_scheduler=dict(decay_t=9382, t_initial=375300, lr_min=1e-5, base_values=[1e-3]),
        config=OrderedDict(AMP_OPT_LEVEL='O1', MODEL=OrderedDict(NAME='crossformer')),
        amp=dict(loss_scaler0=dict(loss_scale=65536.0, unskipped=12)),
    )


def openmmlab_file(model, buffers, **meta) -> dict:
    """A file as MMDetection 2.8 and MMSegmentation 0.12 save it."""
    state = with_buffers(model.state_dict(), buffers)
    return dict(
        meta=dict(
            mmcv_version='1.2.7',
            env_info='sys.platform: linux',
            seed=None,
            config="model = dict(type='MaskRCNN')\n",
            epoch=12,
            iter=87960,
            time='Thu Aug  5 12:00:00 2021',
            hook_msgs=dict(),
            **meta,
        ),
        state_dict=state,
        optimizer=dict(state={}, param_groups=[]),
    )


DETECTION = dict(mmdet_version='2.8.0')
SEGMENTATION = dict(mmseg_version='0.12.0')


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


def outputs(model) -> list:
    """Tensors of what a model makes of an image, before any of it is thrown away."""

    def tensors(value):
        return (
            [value]
            if torch.is_tensor(value)
            else [tensor for part in value for tensor in tensors(part)]
        )

    image = torch.rand(1, 3, 65, 97, generator=torch.Generator().manual_seed(0))
    shape = dict(img_shape=(65, 97), ori_shape=(65, 97), scale_factor=(1.0, 1.0))
    with torch.no_grad():
        return tensors(model(image, [DetDataSample(metainfo=shape)], mode='tensor'))


@pytest.mark.parametrize('buffers', [earlier, later])
@pytest.mark.parametrize('config', [DETECTOR, SEGMENTOR])
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


def evaluate(monkeypatch, config, checkpoint, data, work, *options) -> list:
    """Predictions that tools/test.py keeps of each image; in this process, for speed."""
    out = work / ('maps' if config == SEGMENTOR else 'predictions.pkl')
    arguments = [
        config,
        checkpoint,
        '--data-root',
        data,
        '--work-dir',
        work,
        '--out',
        out,
        *options,
        '--cfg-options',
        *PUBLISHED,
        'test_dataloader.batch_size=2',
    ]
    monkeypatch.chdir(ROOT)
    run_as_main('tools/test.py', *arguments)
    if config == SEGMENTOR:
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


@pytest.fixture(autouse=True)
def own_loaders():
    """Tools settle for good how mmengine reads; other tests want it as it was."""
    schemes = dict(CheckpointLoader._schemes)
    yield
    CheckpointLoader._schemes = schemes


@pytest.fixture(scope='module')
def donors():
    """A detector and a segmentor with random weights."""
    return {config: model_of(config) for config in (DETECTOR, SEGMENTOR)}


@pytest.fixture(scope='module')
def data(shapes):  # noqa: F811
    return {DETECTOR: shapes / 'coco', SEGMENTOR: shapes / 'ade'}


@pytest.mark.parametrize(
    'config, meta',
    [(DETECTOR, DETECTION), (SEGMENTOR, dict(SEGMENTATION, CLASSES=('disk', 'square')))],
)
def test_evaluation_gives_equal_predictions(monkeypatch, tmp_path, donors, data, config, meta):
    donor = donors[config]
    ours = save(tmp_path, dict(state_dict=donor.state_dict(), meta={}), 'ours.pth')
    theirs = save(tmp_path, openmmlab_file(donor, later, **meta), 'theirs.pth')
    kept = {}
    for file in (ours, theirs):
        work = tmp_path / file.stem
        work.mkdir()
        kept[file] = evaluate(monkeypatch, config, file, data[config], work)
    assert len(kept[ours]) == 4 and sum(one.size for one in kept[ours]) > 100
    for one, expected in zip(kept[theirs], kept[ours], strict=True):
        assert np.array_equal(one, expected)


def refused(
    capsys, monkeypatch, donors, data, tmp_path, content, *options, tool='test.py', config=DETECTOR
) -> str:
    path = save(tmp_path, content)
    arguments = [config, path] if tool == 'test.py' else [config]
    options = ['--cfg-options', *PUBLISHED, *(str(option).format(path) for option in options)]
    said = sentence(
        capsys,
        monkeypatch,
        tool,
        *arguments,
        '--work-dir',
        tmp_path / 'work',
        '--data-root',
        data[config],
        *options,
    )
    assert str(path) in said
    return said


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
        fit_checkpoint(donors[DETECTOR], changed(donors[DETECTOR], **change), 'file')


def test_evaluation_of_a_partly_random_model_is_refused(
    capsys, monkeypatch, donors, data, tmp_path
):
    content = changed(donors[DETECTOR], missing=['roi_head.bbox_head.fc_cls.bias'])
    said = refused(capsys, monkeypatch, donors, data, tmp_path, content)
    assert 'missing roi_head.bbox_head.fc_cls.bias' in said and '--allow-partial' in said


def test_a_partial_model_is_evaluated_if_told_to(monkeypatch, donors, data, tmp_path):
    file = save(
        tmp_path,
        changed(
            donors[DETECTOR],
            missing=['rpn_head.rpn_cls.bias'],
            shape=['rpn_head.rpn_reg.bias'],
            extra=torch.ones(2),
        ),
    )
    assert (
        len(evaluate(monkeypatch, DETECTOR, file, data[DETECTOR], tmp_path, '--allow-partial')) == 4
    )


def test_everything_that_does_not_fit_is_logged(donors, monkeypatch):
    lines = []
    monkeypatch.setattr('crossformer_mm.checkpoint.print_log', lambda line, *_: lines.append(line))
    missing = [f'roi_head.mask_head.convs.{i}.conv.weight' for i in range(4)]
    content = changed(donors[DETECTOR], missing=missing, extra=torch.ones(2))
    fit_checkpoint(donors[DETECTOR], content, 'file', None)
    assert [line.split(': ')[1] for line in lines] == [
        'missing ' + ', '.join(missing),
        'unexpected extra',
    ]
    assert 'extra' not in content['state_dict']


def test_weights_of_a_backbone_alone_are_refused(capsys, monkeypatch, donors, data, tmp_path):
    content = imagenet_file(donors[DETECTOR].backbone, earlier)
    said = refused(capsys, monkeypatch, donors, data, tmp_path, content)
    assert 'model.backbone.init_cfg.checkpoint' in said


def test_weights_of_nothing_alike_are_refused_even_in_part(donors):
    with pytest.raises(CheckpointError, match='holds nothing of this model'):
        fit_checkpoint(donors[DETECTOR], dict(state_dict={'fc.bias': torch.ones(3)}), 'file', None)


@pytest.mark.parametrize('content', [[], {}, dict(state_dict={}), torch.ones(2)])
def test_no_weights_is_said(donors, content):
    with pytest.raises(CheckpointError, match='holds no weights'):
        fit_checkpoint(donors[DETECTOR], content, 'file')


def test_training_from_another_backbone_is_refused(capsys, monkeypatch, donors, data, tmp_path):
    content = changed(donors[DETECTOR], missing=['backbone.layers.1.blocks.0.norm1.bias'])
    said = refused(
        capsys, monkeypatch, donors, data, tmp_path, content, 'load_from={}', tool='train.py'
    )
    assert 'missing backbone.layers.1.blocks.0.norm1.bias' in said


def test_going_on_from_a_file_without_training_state_is_refused(
    capsys, monkeypatch, donors, data, tmp_path
):
    content = openmmlab_file(donors[DETECTOR], earlier)
    said = refused(
        capsys,
        monkeypatch,
        donors,
        data,
        tmp_path,
        content,
        'resume=True',
        'load_from={}',
        tool='train.py',
    )
    assert 'holds no state of a training (message_hub)' in said


def test_training_may_start_from_other_heads(donors):
    content = changed(donors[DETECTOR], shape=['roi_head.bbox_head.fc_cls.bias'])
    fit_checkpoint(donors[DETECTOR], content, 'file', required='backbone.')
    assert 'roi_head.bbox_head.fc_cls.bias' not in content['state_dict']


@pytest.mark.parametrize('tool', ['train.py', 'test.py'])
def test_truncated_files_are_refused_by_the_tools(
    capsys, monkeypatch, donors, data, tmp_path, tool
):
    path = save(tmp_path, openmmlab_file(donors[DETECTOR], earlier), 'bad.pth')
    path.write_bytes(path.read_bytes()[:1000])
    arguments = ['--resume', path] if tool == 'train.py' else [path]
    said = sentence(
        capsys,
        monkeypatch,
        tool,
        DETECTOR,
        *arguments,
        '--work-dir',
        tmp_path,
        '--data-root',
        data[DETECTOR],
    )
    assert str(path) in said and 'cut short' in said
