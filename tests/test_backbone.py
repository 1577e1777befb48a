"""Promises of the backbone: its options, shapes and values."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from mmengine.registry import MODELS

from crossformer_mm import ARCHITECTURES, CrossFormer

from .conftest import SMALL
from .helpers import FLOAT16, ONE_STAGE, ROOT, needs_float16
from .oracle import assert_equals_plain, out_sides, parameters_of, plain_features

# Sizes of image that leave ragged edges, small maps or single positions somewhere.
RAGGED = [(1, 1), (1, 75), (67, 2), (61, 83), (97, 130), (224, 40)]


# Architectures and names


@pytest.mark.parametrize(
    'arch, millions',
    [
        ('t', 27.26),
        ('s', 29.89),
        ('b', 51.20),
        ('l', 90.94),
        ('pp-s', 22.81),
        ('pp-b', 51.22),
        ('pp-l', 90.97),
        ('pp-h', 94.94),
    ],
)
def test_architecture_has_the_published_number_of_parameters(arch, millions):
    with torch.device('meta'):
        backbone = CrossFormer(arch)
    count = sum(parameter.numel() for parameter in backbone.parameters())
    assert abs(count / 1e6 - millions) <= 0.01


def test_every_architecture_is_counted_above():
    assert set(ARCHITECTURES) == {'t', 's', 'b', 'l', 'pp-s', 'pp-b', 'pp-l', 'pp-h'}


def test_parameters_have_the_names_of_the_authors():
    expected = {f'patch_embed.{name}' for name in ('norm', *(f'projs.{i}' for i in range(4)))}
    for stage, depth in enumerate(SMALL['depths']):
        for block in range(depth):
            prefix = f'layers.{stage}.blocks.{block}'
            expected |= {
                f'{prefix}.{name}'
                for name in (
                    'norm1',
                    'norm2',
                    'attn.qkv',
                    'attn.proj',
                    'mlp.fc1',
                    'mlp.fc2',
                    'attn.pos.pos_proj',
                    'attn.pos.pos1.0',
                    'attn.pos.pos1.2',
                    'attn.pos.pos2.0',
                    'attn.pos.pos2.2',
                    'attn.pos.pos3.0',
                    'attn.pos.pos3.2',
                )
            }
    expected |= {
        f'layers.{stage}.downsample.{name}'
        for stage in range(3)
        for name in ('norm', 'reductions.0', 'reductions.1')
    }
    # In stage 2, of four blocks, the third is followed by a cooling layer.
    expected |= {f'layers.2.blocks.2.{name}' for name in ('ex_conv', 'ex_ln')}
    state = CrossFormer(SMALL, cooling=True).state_dict()
    assert set(state) == {f'{name}.{part}' for name in expected for part in ('weight', 'bias')}


@pytest.mark.parametrize(
    'depth, cooled',
    [(1, []), (2, []), (3, []), (4, [2]), (6, [2]), (7, [2, 5]), (18, [2, 5, 8, 11, 14])],
)
def test_cooling_follows_every_third_block_but_the_last(depth, cooled):
    arch = dict(embed_dims=16, depths=(depth,), num_heads=(1,))
    backbone = CrossFormer(**{**ONE_STAGE, 'arch': arch}, cooling=True)
    blocks = backbone.layers[0].blocks
    assert [i for i, block in enumerate(blocks) if hasattr(block, 'ex_conv')] == cooled


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_cooling_is_of_the_pp_architectures_unless_said(arch):
    def cools(**options):
        with torch.device('meta'):
            return any('ex_conv' in key for key in CrossFormer(arch, **options).state_dict())

    assert cools() == arch.startswith('pp-')
    assert cools(cooling=True) and not cools(cooling=False)


# Shapes


@pytest.mark.parametrize('height, width', [*RAGGED, (1, 64), (31, 37), (32, 32), (33, 127)])
@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1, 2, 3), (3,), (0,), (2, 0), [1]])
@torch.no_grad()
def test_any_size_gives_every_chosen_stage_its_shape(height, width, out_indices):
    backbone = CrossFormer(SMALL, out_indices=out_indices)
    features = backbone(torch.randn(2, 3, height, width))
    rows, columns = out_sides(height), out_sides(width)
    assert [tuple(f.shape) for f in features] == [
        (2, 32 * 2**i, rows[i], columns[i]) for i in out_indices
    ]
    assert all(f.is_contiguous() for f in features)


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1, 3), (2, 0)])
def test_out_channels_and_strides_are_those_of_the_features(out_indices):
    backbone = CrossFormer(SMALL, out_indices=out_indices)
    features = backbone(torch.randn(1, 3, 64, 64))
    assert backbone.out_channels == tuple(f.shape[1] for f in features)
    assert backbone.out_strides == tuple(64 // f.shape[2] for f in features)


def test_strides_follow_the_kernels():
    backbone = CrossFormer(SMALL, patch_sizes=(2, 4), merge_sizes=((2,), (3, 5), (1, 3)))
    assert backbone.out_strides == (2, 4, 12, 12)
    assert [f.shape[2] for f in backbone(torch.randn(1, 3, 48, 24))] == [24, 12, 4, 4]


def test_fewer_out_indices_give_the_same_features_with_fewer_parameters(small):
    every, image = small(), torch.randn(1, 3, 61, 83)
    first = CrossFormer(SMALL, out_indices=(1, 0)).eval()
    first.load_state_dict({k: v for k, v in every.state_dict().items() if k in first.state_dict()})
    assert not any(
        key.startswith(('layers.2', 'layers.1.downsample')) for key in first.state_dict()
    )
    a, b, *_ = every(image)
    for feature, reference in zip(first(image), (b, a)):
        assert torch.equal(feature, reference)


def test_images_of_other_channels(small):
    backbone = small(in_channels=5)
    assert backbone(torch.randn(1, 5, 32, 32))[0].shape == (1, 32, 8, 8)


# Values


VARIANTS = {
    'default': dict(),
    'primes': dict(group_size=(3, 5, 2, 3), interval=(5, 3, 7, 2)),
    'ones': dict(group_size=(1, 1, 1, 1), interval=(1, 1, 1, 1)),
    'beyond the map': dict(group_size=(20, 3, 2, 9), interval=(3, 40, 30, 9)),
    'of 3x schedules': dict(group_size=(14, 14, 7, 7), interval=(16, 8, 2, 1)),
}


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('lda', ['interval', 'block'])
def test_features_and_gradients_are_the_papers_at_any_size(small, probe, variant, lda):
    options = dict(lda=lda, **VARIANTS[variant])
    backbone = small(**options).double()
    for height, width in RAGGED:
        assert_equals_plain(backbone, probe, torch.randn(1, 3, height, width).double(), options)


@pytest.mark.parametrize(
    'built, plain',
    [
        (dict(cooling=True), {}),
        (dict(out_norm=True), {}),
        (dict(qk_scale=0.5), dict(qk_scale=0.5)),
        (dict(qkv_bias=False), {}),
        (dict(mlp_ratio=2.5), {}),
        (dict(patch_sizes=(4,), merge_sizes=((2,), (2, 4, 6), (2, 4))), {}),
        (dict(with_cp=True), {}),
    ],
)
def test_options_change_what_they_say(small, probe, built, plain):
    backbone = small(**built).double()
    assert_equals_plain(backbone, probe, torch.randn(2, 3, 101, 83).double(), plain)


@pytest.mark.parametrize(
    'options',
    [
        dict(position_bias='dynamic_residual'),
        dict(position_bias='relative'),
        dict(position_bias='relative', lda='block'),
        dict(position_bias='absolute'),
        dict(position_bias='none'),
        dict(lda='shifted'),
        dict(lda='none'),
        dict(lda='shifted', position_bias='relative', group_size=(3, 2, 1, 4)),
    ],
    ids=str,
)
def test_options_for_comparison_work_at_any_size(small, probe, options):
    backbone = small(**options).double()
    plain = small(**options, attention_path='plain').double()
    default = small().double()(torch.ones(1, 3, 97, 130).double())
    changed = backbone(torch.ones(1, 3, 97, 130).double())
    assert not any(torch.allclose(a, b) for a, b in zip(default[1:], changed[1:]))
    for height, width in RAGGED:
        images = torch.randn(2, 3, height, width).double()
        features = backbone(images)
        for one, feature in zip(backbone(images[:1]), features):
            torch.testing.assert_close(one, feature[:1])
        for reference, feature in zip(plain(images), features):
            torch.testing.assert_close(feature, reference, rtol=1e-9, atol=1e-11)
    gradients, expected = (
        torch.autograd.grad(probe(model(images)), list(model.parameters()))
        for model in (backbone, plain)
    )
    for (name, _), gradient, reference in zip(backbone.named_parameters(), gradients, expected):
        scale = max(reference.abs().max().item(), 1e-3)
        assert (gradient - reference).abs().max() <= 1e-9 * scale, name


def test_learnt_tables_follow_the_groups_and_the_learnt_map_the_first_stage():
    options = dict(group_size=(6, 5, 4, 3), interval=(4, 2, 1, 1))
    names = parameters_of(CrossFormer(SMALL, position_bias='relative', **options))
    for stage, side in enumerate((11, 9, 7, 5)):
        table = names[f'layers.{stage}.blocks.0.attn.pos.relative_position_bias_table']
        assert table.shape == (SMALL['num_heads'][stage], side, side)
    absolute = CrossFormer(SMALL, position_bias='absolute', frozen_stages=0, **options)
    position = absolute.absolute_pos.absolute_pos_embed
    assert position.shape == (SMALL['embed_dims'], 24, 24) and not position.requires_grad
    for bias in ('absolute', 'none'):
        names = parameters_of(CrossFormer(SMALL, position_bias=bias))
        assert not any('.pos.' in name for name in names)


def test_published_weights_are_not_those_of_another_position_bias(tmp_path):
    torch.save(CrossFormer(SMALL).state_dict(), tmp_path / 'dynamic.pth')
    backbone = CrossFormer(
        SMALL,
        position_bias='relative',
        init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'dynamic.pth')),
    )
    with pytest.raises(ValueError, match='missing .*relative_position_bias_table.*unexpected'):
        backbone.init_weights()


@pytest.mark.parametrize('lda', ['interval', 'block'])
@torch.no_grad()
def test_float32_is_as_near_to_the_papers_as_rounding_allows(small, lda):
    backbone, image = small(lda=lda), torch.randn(1, 3, 219, 157)
    exact = plain_features(
        {k: v.double() for k, v in parameters_of(backbone).items()}, image.double(), lda=lda
    )
    for feature, reference in zip(backbone(image), exact):
        assert (feature - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize('lda', ['interval', 'block'])
@torch.no_grad()
def test_batch_is_its_images_one_by_one(small, lda):
    backbone, images = small(lda=lda).double(), torch.randn(3, 3, 101, 83).double()
    singles = [backbone(image[None]) for image in images]
    for stage, feature in enumerate(backbone(images)):
        torch.testing.assert_close(feature, torch.cat([single[stage] for single in singles]))


@pytest.mark.parametrize('lda', ['interval', 'block'])
@torch.no_grad()
def test_order_of_images_changes_nothing(small, lda):
    backbone = small(lda=lda)
    images = [torch.randn(1, 3, *size) for size in [(224, 224), (9, 300), (20, 20), (224, 224)]]
    fresh = [small(lda=lda)(image) for image in images]
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 1, 2)):
        for index in order:
            for feature, reference in zip(backbone(images[index]), fresh[index]):
                assert torch.equal(feature, reference)


def contents(module):
    """All that a module holds, by name: its plain attributes and its tensors."""
    held = {
        f'{name}: {key}': repr(value)
        for name, child in module.named_modules()
        for key, value in vars(child).items()
        if key not in ('_parameters', '_modules')
    }
    return held, {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('lda', ['interval', 'block'])
def test_forward_leaves_the_module_as_it_was(small, lda, training):
    backbone = small(lda=lda, cooling=True, drop_path_rate=0.2).train(training)
    held, tensors = contents(backbone)
    for size in ((20, 20), (224, 64), (3, 100)):
        backbone(torch.randn(1, 3, *size))
    held_after, tensors_after = contents(backbone)
    assert held_after == held
    assert all(torch.equal(tensors_after[key], value) for key, value in tensors.items())
    assert tensors_after.keys() == tensors.keys()


@torch.no_grad()
def test_memory_format_of_the_image_does_not_matter(small):
    backbone, image = small(), torch.randn(2, 3, 61, 83)
    for given in (image.to(memory_format=torch.channels_last), image.mT.contiguous().mT):
        for feature, reference in zip(backbone(given), backbone(image)):
            # Convolutions sum in another order in each format; how far apart, is the processor's.
            assert (feature - reference).abs().max() <= 2e-5 * reference.abs().max()


def test_copies_give_the_same_features(small):
    backbone, image = small(cooling=True), torch.randn(1, 3, 61, 83)
    for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        for feature, reference in zip(twin(image), backbone(image)):
            assert torch.equal(feature, reference)


# Precision


@pytest.mark.parametrize('dtype', [torch.bfloat16, FLOAT16])
@pytest.mark.parametrize('amplitude', [1, 100])
@torch.no_grad()
def test_autocast_is_finite_and_near_float32_at_every_stage(dtype, amplitude):
    backbone, image = CrossFormer(SMALL), amplitude * torch.randn(1, 3, 160, 224)
    backbone.init_weights()
    backbone.eval()
    with torch.autocast('cpu', dtype):
        features = backbone(image)
    for feature, reference in zip(features, backbone(image)):
        assert feature.isfinite().all()
        assert (feature.float() - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize(
    'dtype, tolerance',
    [
        (torch.bfloat16, 2e-2),
        pytest.param(torch.float16, 3e-3, marks=needs_float16),
        (torch.float64, 1e-5),
    ],
)
@torch.no_grad()
def test_whole_module_in_another_type(dtype, tolerance):
    backbone, image = CrossFormer(SMALL, cooling=True), torch.randn(1, 3, 160, 224)
    backbone.init_weights()
    reference = backbone.eval()(image)
    for feature, expected in zip(backbone.to(dtype)(image.to(dtype)), reference):
        assert feature.dtype == dtype
        assert (feature - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize('dtype', [torch.bfloat16, FLOAT16])
def test_gradients_under_autocast_are_finite_and_near(small, probe, dtype):
    backbone, image = small(cooling=True), torch.randn(1, 3, 160, 224)
    reference = torch.autograd.grad(probe(backbone(image)), list(backbone.parameters()))
    with torch.autocast('cpu', dtype):
        features = backbone(image)
    gradients = torch.autograd.grad(probe(f.float() for f in features), list(backbone.parameters()))
    total, error = (
        torch.cat([g.flatten() for g in grads])
        for grads in (reference, [g - r for g, r in zip(gradients, reference)])
    )
    assert error.isfinite().all()
    assert error.norm() < 0.05 * total.norm()


# Registry


def test_mmengine_builds_it_by_name():
    backbone = MODELS.build(dict(type='CrossFormer', arch='t'))
    assert isinstance(backbone, CrossFormer) and backbone.out_channels == (64, 128, 256, 512)


@pytest.mark.parametrize('library', ['mmdet', 'mmseg'])
def test_detection_and_segmentation_build_it_by_name(library):
    registry = pytest.importorskip(f'{library}.registry').MODELS
    backbone = registry.build(dict(type='CrossFormer', arch=SMALL, out_indices=(1, 2, 3)))
    assert isinstance(backbone, CrossFormer) and backbone.out_channels == (64, 128, 256)


def test_importing_the_package_imports_no_application_library():
    code = (
        "import sys, crossformer_mm; print([name for name in sys.modules "
        "if name.split('.')[0] in ('mmdet', 'mmseg', 'mmpretrain', 'timm')])"
    )
    result = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == '[]'
