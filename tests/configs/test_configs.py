"""The configs build the published models and state the published recipes."""

import ast
import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from crossformer_mm import CrossFormer

from ..helpers import ONE_STAGE, ROOT

CONFIGS = ROOT / 'configs'
PUBLISHED = json.loads((CONFIGS.parent / 'docs' / 'published.json').read_text())


def paths_of(names) -> list:
    return [CONFIGS / f'{name}.py' for name in names]


ZOO, IMAGENET = (
    paths_of(name for name in PUBLISHED['models'] if name.startswith('imagenet/') == classifies)
    for classifies in (False, True)
)
BASELINES = paths_of(PUBLISHED['baselines'])
ALL = ZOO + IMAGENET + BASELINES
DEMO = sorted(CONFIGS.glob('demo/*.py'))

# The published FLOPs of these show other groups than those of all the rest.
WIDE = {
    'mask_rcnn/cf_s_3x',
    'mask_rcnn/cf_b_3x',
    'cascade_mask_rcnn/cf_s_3x',
    'semantic_fpn/cf_s_80k',
    'semantic_fpn/cf_b_80k',
    'semantic_fpn/cf_l_80k',
    'semantic_fpn/cfpp_s_80k',
}
FAMILIES = {'cf': '', 'cfpp': 'pp-'}


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(''))


def test_every_zoo_config_has_published_results():
    there = {
        path
        for path in CONFIGS.glob('*/*.py')
        if path.parent.name not in ('_base_', 'demo', 'ablation')
        and not path.stem.endswith('_fsdp')
    }  # of the same recipe, sharded
    assert there == set(ALL)


@pytest.mark.parametrize('path', BASELINES, ids=name_of)
def test_a_baseline_differs_in_the_backbone_alone(path):
    """And in the channels of what takes its features."""
    ours, theirs = (
        Config.fromfile(file).to_dict()
        for file in (path.with_name(f"cf_s_{path.stem.split('_')[-1]}.py"), path)
    )
    init_default_scope(ours['default_scope'])
    del ours['model']['backbone']
    backbone = MODELS.build(theirs['model'].pop('backbone'))
    assert not isinstance(backbone, CrossFormer)
    taker = ours['model'].get('neck') or ours['model']['decode_head']
    taker['in_channels'] = [feature.shape[1] for feature in backbone(torch.zeros(1, 3, 64, 64))]
    assert ours == theirs


@pytest.mark.parametrize('path', ZOO + DEMO, ids=name_of)
def test_heads_take_what_the_backbone_gives(path):
    cfg = Config.fromfile(path)
    backbone = CrossFormer(
        **{key: value for key, value in cfg.model.backbone.items() if key != 'type'}
    )
    taker = cfg.model.get('neck') or cfg.model.decode_head
    assert tuple(taker.in_channels) == backbone.out_channels
    if 'auxiliary_head' in cfg.model:
        auxiliary = cfg.model.auxiliary_head
        assert auxiliary.in_channels == backbone.out_channels[auxiliary.in_index]


@pytest.mark.parametrize('path', ZOO, ids=name_of)
def test_zoo_uses_the_setting_of_the_published_results(path):
    backbone = Config.fromfile(path).model.backbone
    family, size, _ = path.stem.split('_')
    assert backbone.arch == FAMILIES[family] + size
    assert backbone.lda == 'interval'
    wide = name_of(path) in WIDE
    assert tuple(backbone.group_size) == ((14, 14, 7, 7) if wide else (7, 7, 7, 7))
    assert tuple(backbone.interval) == ((16, 8, 2, 1) if wide else (8, 4, 2, 1))
    assert not {'out_norm', 'cooling'} & set(backbone)  # as the architecture has it


@pytest.mark.parametrize('path', ALL + DEMO, ids=name_of)
def test_configs_stand_on_their_own(path):
    cfg = Config.fromfile(path)
    assert cfg.custom_imports.imports == ['crossformer_mm']
    for file in CONFIGS.rglob('*.py'):
        bases = [
            ast.literal_eval(node.value)
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.Assign) and node.targets[0].id == '_base_'
        ]
        assert '::' not in str(bases), f'{file} inherits from another package'


@pytest.mark.parametrize('path', [p for p in ZOO if '1x' in p.stem], ids=name_of)
def test_coco_1x_recipe(path):
    cfg = Config.fromfile(path)
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=1e-4, weight_decay=1e-4)
    assert 'clip_grad' not in cfg.optim_wrapper
    assert cfg.train_cfg.max_epochs == 12
    warmup, steps = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end, warmup.by_epoch) == (0.001, 500, False)
    assert (steps.milestones, steps.gamma) == ([8, 11], 0.1)
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    resize = next(step for step in cfg.train_pipeline if step.type == 'Resize')
    assert resize.scale == (1333, 800) and resize.keep_ratio
    assert next(step for step in cfg.train_pipeline if step.type == 'RandomFlip').prob == 0.5


@pytest.mark.parametrize('path', [p for p in ZOO if '3x' in p.stem], ids=name_of)
def test_coco_3x_recipe(path):
    cfg = Config.fromfile(path)
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=1e-4, weight_decay=0.05)
    assert cfg.optim_wrapper.paramwise_cfg == dict(norm_decay_mult=0.0, bias_decay_mult=0.0)
    assert 'clip_grad' not in cfg.optim_wrapper
    assert cfg.train_cfg.max_epochs == 36
    warmup, steps = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end, warmup.by_epoch) == (0.001, 500, False)
    assert (steps.milestones, steps.gamma, steps.end) == ([27, 33], 0.1, 36)
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    pipeline = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    resize = pipeline['RandomChoiceResize']
    assert resize.scales == [(1333, shorter) for shorter in range(480, 801, 32)]
    assert resize.keep_ratio and pipeline['RandomFlip'].prob == 0.5
    test = {step.type: step for step in cfg.test_dataloader.dataset.pipeline}
    assert test['Resize'].scale == (1333, 800)


@pytest.mark.parametrize('path', [p for p in ZOO if '80k' in p.stem], ids=name_of)
def test_semantic_fpn_recipe(path):
    cfg = Config.fromfile(path)
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=1e-4, weight_decay=1e-4)
    assert cfg.train_cfg.max_iters == 80000
    (poly,) = cfg.param_scheduler
    assert (poly.type, poly.power, poly.begin, poly.end) == ('PolyLR', 0.9, 0, 80000)
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.model.neck.out_channels == 256
    assert cfg.model.decode_head.channels == 128


@pytest.mark.parametrize('path', [p for p in ZOO if '160k' in p.stem], ids=name_of)
def test_upernet_recipe(path):
    cfg = Config.fromfile(path)
    assert cfg.optim_wrapper.optimizer == dict(
        type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01
    )
    assert cfg.optim_wrapper.paramwise_cfg == dict(norm_decay_mult=0.0)
    assert cfg.train_cfg.max_iters == 160000
    warmup, poly = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end) == (1e-6, 1500)
    assert (poly.type, poly.power, poly.begin, poly.end) == ('PolyLR', 1.0, 1500, 160000)
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    resize = next(step for step in cfg.train_pipeline if step.type == 'RandomResize')
    assert (resize.scale, resize.ratio_range) == ((2048, 512), (0.5, 2.0))
    assert next(step for step in cfg.train_pipeline if step.type == 'RandomCrop').crop_size == (
        512,
        512,
    )
    sizes, flips = cfg.tta_pipeline[1].transforms[:2]
    assert [size.scale[1] / 512 for size in sizes] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert [flip.prob for flip in flips] == [0.0, 1.0]
    assert cfg.model.decode_head.channels == 512
    assert cfg.model.decode_head.pool_scales == (1, 2, 3, 6)
    auxiliary = cfg.model.auxiliary_head
    assert (auxiliary.channels, auxiliary.loss_decode.loss_weight) == (256, 0.4)


@pytest.mark.parametrize('path', IMAGENET, ids=name_of)
def test_imagenet_recipe(path):
    cfg = Config.fromfile(path)
    backbone = cfg.model.backbone
    family, size, _ = path.stem.split('_')
    assert backbone.arch == FAMILIES[family] + size and backbone.init_cfg is None
    assert 'drop_path_rate' not in backbone  # as the architecture has it
    assert (backbone.lda, tuple(backbone.group_size), tuple(backbone.interval)) == dict(
        cf=('interval', (7, 7, 7, 7), (8, 4, 2, 1)), cfpp=('block', (4, 4, 14, 7), (4, 2, 1, 1))
    )[family]
    channels = CrossFormer(
        **{key: value for key, value in backbone.items() if key != 'type'}
    ).out_channels
    assert channels == (cfg.model.neck.in_channels,) == (cfg.model.head.in_channels,)

    assert cfg.optim_wrapper.optimizer == dict(
        type='AdamW', lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05
    )
    assert cfg.optim_wrapper.paramwise_cfg == dict(norm_decay_mult=0.0, bias_decay_mult=0.0)
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 1024
    assert cfg.train_cfg.max_epochs == 300
    warmup, cosine = cfg.param_scheduler
    assert (warmup.type, warmup.start_factor, warmup.end) == ('LinearLR', 1e-3, 20)
    assert (cosine.type, cosine.begin, cosine.end, cosine.eta_min) == (
        'CosineAnnealingLR',
        20,
        300,
        1e-5,
    )
    assert {part.type: part.alpha for part in cfg.model.train_cfg.augments} == dict(
        Mixup=0.8, CutMix=1.0
    )
    assert cfg.model.head.loss == dict(
        type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'
    )
    pipeline = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    augment = pipeline['RandAugment']
    assert (
        augment.policies,
        augment.num_policies,
        augment.magnitude_level,
        augment.magnitude_std,
    ) == ('timm_increasing', 2, 9, 0.5)
    assert pipeline['RandomErasing'].erase_prob == 0.25
    assert pipeline['RandomResizedCrop'].scale == 224
    (ema,) = cfg.custom_hooks
    assert (ema.type, ema.momentum) == ('mmengine.EMAHook', 4e-5)
    test = {step.type: step for step in cfg.test_dataloader.dataset.pipeline}
    assert (test['ResizeEdge'].scale, test['CenterCrop'].crop_size) == (256, 224)


@pytest.mark.parametrize(
    'config, decay, biases',
    [
        ('upernet/cf_s_160k', 0.01, 0.01),
        ('imagenet/cf_s_300e', 0.05, 0.0),
        ('mask_rcnn/cf_s_3x', 0.05, 0.0),
        ('mask_rcnn/cf_s_1x', 1e-4, 1e-4),
    ],
)
def test_weight_decay_of_norms_and_biases(config, decay, biases):
    cfg = Config.fromfile(CONFIGS / f'{config}.py')
    norms = decay if config.endswith('1x') else 0.0
    model = CrossFormer(**ONE_STAGE)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    decays = {
        id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']
    }
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            norm = isinstance(module, torch.nn.LayerNorm)
            expected = norms if norm else biases if name == 'bias' else decay
            assert decays[id(parameter)] == expected


@pytest.mark.parametrize('path', ALL, ids=name_of)
def test_every_recipe_stands_once(path):
    names = {node.targets[0].id for node in ast.parse(path.read_text()).body}
    assert names <= {'_base_', 'model'}, f'{path} has more than a model of its own'
