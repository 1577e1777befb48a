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
PUBLISHED = json.loads((CONFIGS.parent / 'docs' / 'model_zoo.json').read_text())


MODEL_PATHS, BASELINES = (
    [CONFIGS / f'{name}.py' for name in PUBLISHED[kind]] for kind in ('models', 'baselines')
)
IMAGENET = [path for path in MODEL_PATHS if path.parent.name == 'imagenet']
ZOO = [path for path in MODEL_PATHS if path not in IMAGENET]
ALL = ZOO + IMAGENET + BASELINES
DEMO = sorted(CONFIGS.glob('demo/*.py'))

# The published FLOPs of these show other groups than those of all the rest.
WIDE = {f'semantic_fpn/{name}_80k' for name in ('cf_s', 'cf_b', 'cf_l', 'cfpp_s')}
WIDE |= {'mask_rcnn/cf_s_3x', 'mask_rcnn/cf_b_3x', 'cascade_mask_rcnn/cf_s_3x'}
FAMILIES = {'cf': '', 'cfpp': 'pp-'}
# Of classifiers: long distance attention, group sizes, intervals.
GROUPS = {
    'cf': ('interval', (7, 7, 7, 7), (8, 4, 2, 1)),
    'cfpp': ('block', (4, 4, 14, 7), (4, 2, 1, 1)),
}
NO_DECAY = dict(norm_decay_mult=0.0, bias_decay_mult=0.0)


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(''))


def cases(paths: list):
    return pytest.mark.parametrize('path', paths, ids=name_of)


def steps_of(pipeline: list) -> dict:
    return {step.type: step for step in pipeline}


def test_every_zoo_config_has_published_results():
    there = {
        path
        for path in CONFIGS.glob('*/*.py')
        if path.parent.name not in ('_base_', 'demo', 'ablation')
        and not path.stem.endswith('_fsdp')
    }  # of the same recipe, sharded
    assert there == set(ALL)


@cases(BASELINES)
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


@cases(ZOO + DEMO)
def test_heads_take_what_the_backbone_gives(path):
    cfg = Config.fromfile(path)
    backbone = MODELS.build(cfg.model.backbone)
    taker = cfg.model.get('neck') or cfg.model.decode_head
    assert tuple(taker.in_channels) == backbone.out_channels
    if 'auxiliary_head' in cfg.model:
        auxiliary = cfg.model.auxiliary_head
        assert auxiliary.in_channels == backbone.out_channels[auxiliary.in_index]


@cases(ZOO)
def test_zoo_uses_the_setting_of_the_published_results(path):
    backbone = Config.fromfile(path).model.backbone
    family, size, _ = path.stem.split('_')
    assert backbone.arch == FAMILIES[family] + size
    assert backbone.lda == 'interval'
    wide = name_of(path) in WIDE
    assert tuple(backbone.group_size) == ((14, 14, 7, 7) if wide else (7, 7, 7, 7))
    assert tuple(backbone.interval) == ((16, 8, 2, 1) if wide else (8, 4, 2, 1))
    assert not {'out_norm', 'cooling'} & set(backbone)  # as the architecture has it


@cases(ALL + DEMO)
def test_configs_stand_on_their_own(path):
    assert Config.fromfile(path).custom_imports.imports == ['crossformer_mm']


def test_no_config_inherits_from_another_package():
    assert not [path for path in CONFIGS.rglob('*.py') if '::' in path.read_text()]


def check_optimizer(cfg: Config, batch: int, paramwise: dict, **options) -> None:
    """AdamW with these options, for this total batch of eight GPUs."""
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', **options)
    assert cfg.optim_wrapper.get('paramwise_cfg', {}) == paramwise
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == batch


def check_coco_schedule(cfg: Config, epochs: int, milestones: list) -> None:
    assert 'clip_grad' not in cfg.optim_wrapper
    assert cfg.train_cfg.max_epochs == epochs
    warmup, steps = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end, warmup.by_epoch) == (0.001, 500, False)
    assert (steps.milestones, steps.gamma, steps.end) == (milestones, 0.1, epochs)


def check_poly_schedule(cfg: Config, begin: int, end: int, power: float) -> None:
    assert cfg.train_cfg.max_iters == end
    poly = cfg.param_scheduler[-1]
    assert (poly.type, poly.power, poly.begin, poly.end) == ('PolyLR', power, begin, end)


@cases([path for path in ZOO if '1x' in path.stem])
def test_coco_1x_recipe(path):
    cfg = Config.fromfile(path)
    check_optimizer(cfg, 16, {}, lr=1e-4, weight_decay=1e-4)
    check_coco_schedule(cfg, 12, [8, 11])
    steps = steps_of(cfg.train_pipeline)
    assert steps['Resize'].scale == (1333, 800) and steps['Resize'].keep_ratio
    assert steps['RandomFlip'].prob == 0.5


@cases([path for path in ZOO if '3x' in path.stem])
def test_coco_3x_recipe(path):
    cfg = Config.fromfile(path)
    check_optimizer(cfg, 16, NO_DECAY, lr=1e-4, weight_decay=0.05)
    check_coco_schedule(cfg, 36, [27, 33])
    steps = steps_of(cfg.train_dataloader.dataset.pipeline)
    resize = steps['RandomChoiceResize']
    assert resize.scales == [(1333, shorter) for shorter in range(480, 801, 32)]
    assert resize.keep_ratio and steps['RandomFlip'].prob == 0.5
    assert steps_of(cfg.test_dataloader.dataset.pipeline)['Resize'].scale == (1333, 800)


@cases([path for path in ZOO if '80k' in path.stem])
def test_semantic_fpn_recipe(path):
    cfg = Config.fromfile(path)
    check_optimizer(cfg, 16, {}, lr=1e-4, weight_decay=1e-4)
    check_poly_schedule(cfg, 0, 80000, 0.9)
    assert len(cfg.param_scheduler) == 1
    assert (cfg.model.neck.out_channels, cfg.model.decode_head.channels) == (256, 128)


@cases([path for path in ZOO if '160k' in path.stem])
def test_upernet_recipe(path):
    cfg = Config.fromfile(path)
    no_decay = dict(norm_decay_mult=0.0)
    check_optimizer(cfg, 16, no_decay, lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01)
    check_poly_schedule(cfg, 1500, 160000, 1.0)
    warmup, _ = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end) == (1e-6, 1500)
    steps = steps_of(cfg.train_pipeline)
    resize = steps['RandomResize']
    assert (resize.scale, resize.ratio_range) == ((2048, 512), (0.5, 2.0))
    assert steps['RandomCrop'].crop_size == (512, 512)
    sizes, flips = cfg.tta_pipeline[1].transforms[:2]
    assert [size.scale[1] / 512 for size in sizes] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert [flip.prob for flip in flips] == [0.0, 1.0]
    head, auxiliary = cfg.model.decode_head, cfg.model.auxiliary_head
    assert (head.channels, head.pool_scales) == (512, (1, 2, 3, 6))
    assert (auxiliary.channels, auxiliary.loss_decode.loss_weight) == (256, 0.4)


@cases(IMAGENET)
def test_imagenet_recipe(path):
    cfg = Config.fromfile(path)
    backbone = cfg.model.backbone
    family, size, _ = path.stem.split('_')
    assert backbone.arch == FAMILIES[family] + size and backbone.init_cfg is None
    assert 'drop_path_rate' not in backbone  # as the architecture has it
    groups = (backbone.lda, tuple(backbone.group_size), tuple(backbone.interval))
    assert groups == GROUPS[family]
    channels = MODELS.build(backbone).out_channels
    assert channels == (cfg.model.neck.in_channels,) == (cfg.model.head.in_channels,)

    options = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)
    check_optimizer(cfg, 1024, NO_DECAY, **options)
    assert cfg.train_cfg.max_epochs == 300
    warmup, cosine = cfg.param_scheduler
    assert (warmup.type, warmup.start_factor, warmup.end) == ('LinearLR', 1e-3, 20)
    assert (cosine.type, cosine.begin, cosine.end) == ('CosineAnnealingLR', 20, 300)
    assert cosine.eta_min == 1e-5
    augments = {part.type: part.alpha for part in cfg.model.train_cfg.augments}
    assert augments == dict(Mixup=0.8, CutMix=1.0)
    smoothing = dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')
    assert cfg.model.head.loss == smoothing
    steps = steps_of(cfg.train_dataloader.dataset.pipeline)
    augment = steps['RandAugment']
    assert (augment.policies, augment.num_policies) == ('timm_increasing', 2)
    assert (augment.magnitude_level, augment.magnitude_std) == (9, 0.5)
    assert steps['RandomErasing'].erase_prob == 0.25
    assert steps['RandomResizedCrop'].scale == 224
    (ema,) = cfg.custom_hooks
    assert (ema.type, ema.momentum) == ('mmengine.EMAHook', 4e-5)
    test = steps_of(cfg.test_dataloader.dataset.pipeline)
    assert (test['ResizeEdge'].scale, test['CenterCrop'].crop_size) == (256, 224)


@pytest.mark.parametrize(
    'config, decay, norms, biases',
    [
        ('upernet/cf_s_160k', 0.01, 0.0, 0.01),
        ('imagenet/cf_s_300e', 0.05, 0.0, 0.0),
        ('mask_rcnn/cf_s_3x', 0.05, 0.0, 0.0),
        ('mask_rcnn/cf_s_1x', 1e-4, 1e-4, 1e-4),
    ],
)
def test_weight_decay_of_norms_and_biases(config, decay, norms, biases):
    cfg = Config.fromfile(CONFIGS / f'{config}.py')
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


@cases(ALL)
def test_every_recipe_stands_once(path):
    names = {node.targets[0].id for node in ast.parse(path.read_text()).body}
    assert names <= {'_base_', 'model'}, f'{path} has more than a model of its own'
