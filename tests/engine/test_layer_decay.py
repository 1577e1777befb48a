"""Learning rates that decay from layer to layer, for detectors and classifiers."""

import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from crossformer_mm.engine import ConfigError

from ..helpers import ROOT
from ..trainings import ONE_STAGE, write_config

ARCH = dict(embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
# By hand: steps below the deepest of seven layers, and of six stages; each has half the learning rate
# of the next.
STEPS = {
    'backbone.patch_embed.projs.0.weight': (6, 5),
    'backbone.patch_embed.norm.bias': (6, 5),
    'backbone.layers.0.blocks.0.attn.qkv.weight': (5, 4),
    'backbone.layers.0.downsample.reductions.0.weight': (5, 4),
    'backbone.layers.1.blocks.0.attn.pos.pos1.2.weight': (4, 3),
    'backbone.layers.2.blocks.0.mlp.fc1.weight': (3, 2),
    'backbone.layers.2.blocks.1.norm2.weight': (2, 2),
    'backbone.layers.2.downsample.norm.weight': (2, 2),
    'backbone.layers.3.blocks.0.mlp.fc2.bias': (1, 1),
}
OURS = 'LayerDecayOptimWrapperConstructor'
MMPRETRAINS = 'LearningRateDecayOptimWrapperConstructor'


def detector():
    """A detector, and parameters after the backbone's layers."""
    init_default_scope('mmdet')
    backbone = dict(type='CrossFormer', arch=ARCH, out_norm=True)
    cfg = Config.fromfile(ROOT / 'configs/retinanet/cf_s_1x.py').model
    cfg.backbone, cfg.neck.in_channels = backbone, [32, 64, 128]
    return MODELS.build(cfg), ['neck.fpn_convs.0.conv.weight', 'backbone.norm3.weight']


def classifier():
    pytest.importorskip('mmpretrain')
    init_default_scope('mmpretrain')
    cfg = Config.fromfile(ROOT / 'configs/imagenet/cf_s_300e.py').model
    cfg.backbone.arch, cfg.head.in_channels, cfg.neck.in_channels = ARCH, 128, 128
    return MODELS.build(cfg), ['head.fc.weight']


def learning_rates(model, constructor: str = OURS, **paramwise_cfg) -> dict:
    """The learning rate of each parameter by name; the largest is 2."""
    optimizer = dict(type='AdamW', lr=2.0, weight_decay=0.1)
    settings = dict(constructor=constructor, paramwise_cfg=paramwise_cfg)
    wrapper = build_optim_wrapper(model, dict(optimizer=optimizer, **settings))
    rates = {id(p): group['lr'] for group in wrapper.param_groups for p in group['params']}
    return {name: rates[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    'build, constructor',
    [(detector, OURS), (classifier, OURS), (classifier, MMPRETRAINS)],
    ids=['detector', 'classifier', "MMPretrain's own"],
)
def test_each_layer_learns_more_slowly_than_the_next(build, constructor):
    model, last = build()
    rates = learning_rates(model, constructor, layer_decay_rate=0.5)
    for name, (steps, _) in {**STEPS, **dict.fromkeys(last, (0, 0))}.items():
        assert rates[name] == 2.0 * 0.5**steps, name
    assert set(rates.values()) == {2.0 * 0.5**steps for steps in range(7)}


def test_layers_may_be_stages():
    model, last = detector()
    options = dict(layer_decay_rate=0.5, decay_type='stage_wise')
    rates = learning_rates(model, **options, custom_keys=dict(neck=dict(lr_mult=3.0)))
    for name, (_, steps) in {**STEPS, **dict.fromkeys(last, (0, 0))}.items():
        assert rates[name] == 2.0 * 0.5**steps * (3 if name.startswith('neck') else 1), name


@pytest.mark.parametrize(
    'options, expected',
    [
        ({}, 'layer_decay_rate must be a number over 0 and at most 1, got None'),
        (dict(layer_decay_rate=1.5), 'got 1.5'),
        (dict(layer_decay_rate=0.9, decay_type='wise'), "or 'stage_wise', got 'wise'"),
        (dict(decay_rate=0.9, num_layers=12), "'decay_rate' is no option"),
    ],
)
def test_wrong_options_are_named(options, expected):
    with pytest.raises(ConfigError, match=expected):
        learning_rates(detector()[0], **options)


def test_mmdetections_constructor_is_refused_with_the_one_that_works(refusal_of, data, tmp_path):
    theirs = dict(
        constructor='LearningRateDecayOptimizerConstructor',
        paramwise_cfg=dict(decay_rate=0.9, decay_type='layer_wise', num_layers=6),
    )
    config = write_config(ONE_STAGE, tmp_path / 'decay.py', data, optim_wrapper=theirs)
    said = refusal_of('train.py', config, '--work-dir', tmp_path)
    assert f"use '{OURS}'" in said
