"""The configs of the papers' ablations differ from the published model in what they name."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from ..helpers import ROOT, build_model

ABLATION = ROOT / 'configs' / 'ablation'
PUBLISHED = ROOT / 'configs' / 'imagenet' / 'cf_s_300e.py'

# Per config: the options that differ from the published model's.
VARIANTS = {
    'embedding_4': {'patch_sizes', 'merge_sizes'},
    'embedding_4_8': {'patch_sizes'},
    'embedding_4_8_16_32': set(),
    'attention_short': {'lda'},
    'attention_interval': set(),
    'attention_block': {'lda'},
    'attention_shifted': {'lda'},
    'position_dynamic': set(),
    'position_dynamic_residual': {'position_bias'},
    'position_relative': {'position_bias'},
    'position_absolute': {'position_bias'},
    'position_none': {'position_bias'},
}


def dpb_parameters() -> int:
    total = 0
    for stage, (depth, heads) in enumerate(zip((2, 2, 6, 2), (3, 6, 12, 24))):
        p = 96 * 2**stage // 16
        total += depth * (3 * p + 2 * (2 * p + p * p + p) + 2 * p + (p + 1) * heads)
    return total


def conv(channels: int, kernels: dict) -> int:
    """Weights of convolutions, given the outputs of each kernel; biases are always as many."""
    return sum(channels * kernel**2 * outputs for kernel, outputs in kernels.items())


FIRST = {4: 48, 8: 24, 16: 12, 32: 12}
# Parameters of the backbone that each variant has more (or less) than the published model.
DIFFERENCES = {
    'embedding_4': conv(3, {4: 96})
    - conv(3, FIRST)
    + sum(conv(c, {2: 2 * c}) - conv(c, {2: c, 4: c}) for c in (96, 192, 384)),
    'embedding_4_8': conv(3, {4: 48, 8: 48}) - conv(3, FIRST),
    'position_relative': 169 * (2 * 3 + 2 * 6 + 6 * 12 + 2 * 24) - dpb_parameters(),
    'position_absolute': 56 * 56 * 96 - dpb_parameters(),
    'position_none': -dpb_parameters(),
}


DEFAULT = dict(
    patch_sizes=(4, 8, 16, 32), merge_sizes=((2, 4),) * 3, lda='interval', position_bias='dynamic'
)


def parameters_of(path: Path) -> int:
    with torch.device('meta'):
        backbone = MODELS.build(Config.fromfile(path).model.backbone)
    return sum(parameter.numel() for parameter in backbone.parameters())


def test_every_variant_has_a_config():
    assert {path.stem for path in ABLATION.glob('*.py')} == set(VARIANTS)


@pytest.mark.parametrize('name', VARIANTS)
def test_a_variant_differs_in_what_it_is_named_for(name):
    variant, published = (
        Config.fromfile(path).to_dict() for path in (ABLATION / f'{name}.py', PUBLISHED)
    )
    ours, theirs = ({**DEFAULT, **cfg['model'].pop('backbone')} for cfg in (variant, published))
    assert {key for key in ours if ours[key] != theirs[key]} == VARIANTS[name]
    assert variant == published


@pytest.mark.parametrize('name', VARIANTS)
def test_a_variant_has_the_parameters_of_its_parts(name):
    difference = parameters_of(ABLATION / f'{name}.py') - parameters_of(PUBLISHED)
    assert difference == DIFFERENCES.get(name, 0)


@pytest.mark.parametrize('name', VARIANTS)
def test_a_variant_trains(name):
    """Its classifier, with a smaller architecture: each parameter gets a gradient."""
    from mmpretrain.structures import DataSample

    cfg = Config.fromfile(ABLATION / f'{name}.py')
    cfg.merge_from_dict({'model.neck.in_channels': 256, 'model.head.in_channels': 256})
    cfg.model.backbone.arch = dict(embed_dims=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
    model = build_model(cfg).train()
    model.init_weights()
    samples = [DataSample().set_gt_label(label) for label in (3, 7)]
    batch = model.data_preprocessor(
        dict(inputs=torch.randint(0, 256, (2, 3, 96, 96)), data_samples=samples), training=True
    )
    model(**batch, mode='loss')['loss'].backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
