"""Promises of the backbone: its options, shapes and values."""

import copy
import pickle

import pytest
import torch

from crossformer_mm import ARCHITECTURES, CrossFormer

from .conftest import SMALL
from .helpers import FLOAT16, ONE_STAGE, run_python
from .oracle import assert_equals_plain, out_sides, parameters_of, plain_features

# Sizes of image that leave ragged edges, small maps or single positions somewhere.
RAGGED = [(1, 1), (1, 75), (67, 2), (61, 83), (97, 130), (224, 40)]


# Architectures and names


MILLIONS = {'t': 27.26, 's': 29.89, 'b': 51.20, 'l': 90.94}
MILLIONS.update({'pp-s': 22.81, 'pp-b': 51.22, 'pp-l': 90.97, 'pp-h': 94.94})


@pytest.mark.parametrize('arch', sorted({*MILLIONS, *ARCHITECTURES}))
def test_architecture_has_the_published_number_of_parameters(arch):
    with torch.device('meta'):
        backbone = CrossFormer(arch)
    count = sum(parameter.numel() for parameter in backbone.parameters())
    assert abs(count / 1e6 - MILLIONS[arch]) <= 0.01


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
    assert backbone.out_channels == tuple(32 * 2**i for i in out_indices)
    assert backbone.out_strides == tuple(4 * 2**i for i in out_indices)
    for feature, channels, i in zip(features, backbone.out_channels, out_indices, strict=True):
        assert feature.shape == (2, channels, rows[i], columns[i]) and feature.is_contiguous()


def test_strides_follow_the_kernels():
    backbone = CrossFormer(SMALL, patch_sizes=(2, 4), merge_sizes=((2,), (3, 5), (1, 3)))
    assert backbone.out_strides == (2, 4, 12, 12)
    assert [f.shape[2] for f in backbone(torch.randn(1, 3, 48, 24))] == [24, 12, 4, 4]


def test_fewer_out_indices_give_the_same_features_with_fewer_parameters(small):
    every, image = small(), torch.randn(1, 3, 61, 83)
    first = CrossFormer(SMALL, out_indices=(1, 0)).eval()
    first.load_state_dict({k: v for k, v in every.state_dict().items() if k in first.state_dict()})
    dropped = 'layers.2', 'layers.1.downsample'
    assert not [key for key in first.state_dict() if key.startswith(dropped)]
    assert all(map(torch.equal, first(image), every(image)[1::-1]))


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
        (dict(in_channels=5), {}),
    ],
)
def test_options_change_what_they_say(small, probe, built, plain):
    backbone, channels = small(**built).double(), built.get('in_channels', 3)
    assert_equals_plain(backbone, probe, torch.randn(2, channels, 101, 83).double(), plain)


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
@torch.no_grad()
def test_options_for_comparison_work_at_any_size(small, options):
    backbone, image = small(**options).double(), torch.ones(1, 3, 97, 130).double()
    default, changed = small().double()(image), backbone(image)
    assert not any(torch.allclose(a, b) for a, b in zip(default[1:], changed[1:]))
    for height, width in RAGGED:
        images = torch.randn(2, 3, height, width).double()
        for one, both in zip(backbone(images[:1]), backbone(images), strict=True):
            torch.testing.assert_close(one, both[:1])


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
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'dynamic.pth'))
    backbone = CrossFormer(SMALL, position_bias='relative', init_cfg=init_cfg)
    with pytest.raises(ValueError, match='missing .*relative_position_bias_table.*unexpected'):
        backbone.init_weights()


@pytest.mark.parametrize('lda', ['interval', 'block'])
@torch.no_grad()
def test_float32_is_as_near_to_the_papers_as_rounding_allows(small, lda):
    backbone, image = small(lda=lda), torch.randn(1, 3, 219, 157)
    weights = {name: value.double() for name, value in parameters_of(backbone).items()}
    exact = plain_features(weights, image.double(), lda=lda)
    for feature, reference in zip(backbone(image), exact):
        assert (feature - reference).abs().max() <= 1e-5 * reference.abs().max()


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
        assert all(map(torch.equal, twin(image), backbone(image)))


# Precision


@pytest.mark.parametrize('dtype', [torch.bfloat16, FLOAT16, torch.float64])
@torch.no_grad()
def test_whole_module_in_another_type(dtype):
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-5}[dtype]
    backbone, image = CrossFormer(SMALL, cooling=True), torch.randn(1, 3, 160, 224)
    backbone.init_weights()
    reference = backbone.eval()(image)
    for feature, expected in zip(backbone.to(dtype)(image.to(dtype)), reference):
        assert feature.dtype == dtype
        assert (feature - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize('dtype', [torch.bfloat16, FLOAT16])
def test_gradients_under_autocast_are_finite_and_near(small, probe, dtype):
    backbone, image = small(cooling=True), torch.randn(1, 3, 160, 224)

    def gradients():
        loss = probe(feature.float() for feature in backbone(image))
        grads = torch.autograd.grad(loss, list(backbone.parameters()))
        return torch.cat([grad.flatten() for grad in grads])

    reference = gradients()
    with torch.autocast('cpu', dtype):
        found = gradients()
    assert found.isfinite().all()
    assert (found - reference).norm() < 0.05 * reference.norm()


# Registry


@pytest.mark.parametrize('library', ['mmengine', 'mmdet', 'mmseg'])
def test_libraries_build_it_by_name(library):
    registry = pytest.importorskip(f'{library}.registry').MODELS
    backbone = registry.build(dict(type='CrossFormer', arch=SMALL, out_indices=(1, 2, 3)))
    assert isinstance(backbone, CrossFormer) and backbone.out_channels == (64, 128, 256)


def test_importing_the_package_imports_no_application_library_and_no_triton():
    code = 'import sys, crossformer_mm; print(*{name.split(".")[0] for name in sys.modules})'
    imported = {*run_python('-c', code).stdout.split()}
    assert 'torch' in imported
    assert not {'mmdet', 'mmseg', 'mmpretrain', 'timm', 'triton'} & imported
