"""The features and gradients that the authors' code returned for given weights."""

import json
import random

import numpy as np
import pytest
import torch

from crossformer_mm import CrossFormer

from .older_torch import needs_interpreter, needs_torch

SIZES = {
    'interval_g7': ('2x224x224', '1x256x352', '1x64x96', '1x160x416'),
    'interval_g14': ('1x256x352', '1x480x288'),
    'block_g7': ('2x224x224', '1x256x352', '1x64x96'),
    'block_pgs_acl': ('1x224x224', '1x256x352'),
}
CASES = [(name, size) for name, sizes in SIZES.items() for size in sizes]


class Golden:
    """One file: its settings, weights, and what came out for each input size."""

    def __init__(self, path):
        with np.load(path) as arrays:
            self.arrays = dict(arrays)
        self.meta = json.loads(str(self.arrays['meta']))

    def build(self, **options) -> CrossFormer:
        numbers = self.meta['kw']
        backbone = CrossFormer(
            dict(
                embed_dims=numbers['embed_dim'],
                depths=numbers['depths'],
                num_heads=numbers['num_heads'],
            ),
            group_size=numbers['group_size'],
            interval=numbers['crs_interval'],
            lda=self.meta['lda'],
            cooling=self.meta['acl'],
            **options,
        )
        backbone.load_state_dict(self.under('w'), strict=True)
        return backbone.eval()

    def image(self, size: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[f'x/{size}']).float()

    def under(self, prefix: str) -> dict:
        return {
            key[len(prefix) + 1 :]: torch.from_numpy(np.asarray(value))
            for key, value in self.arrays.items()
            if key.startswith(prefix + '/')
        }


@pytest.fixture(scope='module')
def golden(shared):
    return {name: Golden(shared / 'golden' / f'{name}.npz') for name in SIZES}


def test_no_golden_case_is_left_out(shared, golden):
    assert {path.stem for path in (shared / 'golden').glob('*.npz')} == set(SIZES)
    for name, file in golden.items():
        assert set(file.under('x')) == set(SIZES[name])


@pytest.mark.parametrize('name, size', CASES)
def test_features_and_gradients_are_those_of_the_authors(golden, probe, name, size):
    check(golden[name], golden[name].build(), size, probe)


@needs_torch('2.4', 'the Triton that has all that the kernels use')
@needs_interpreter
def test_fused_attention_gives_them_too(golden, probe):
    pytest.importorskip('triton', reason='fused attention needs the package triton')
    if torch.cuda.is_available():
        pytest.skip('this backbone is on the CPU, where Triton only runs if interpreted')
    file = golden['interval_g7']
    check(file, file.build(attention_path='fused'), '1x64x96', probe)


def check(file, backbone, size, probe):
    features = backbone(file.image(size))
    probe(features).backward()

    expected = file.under(f'y/{size}')
    assert len(features) == len(expected) == 4
    for stage, feature in enumerate(features):
        reference = expected[str(stage)]
        assert feature.shape == reference.shape
        error = (feature - reference).abs().max() / reference.abs().max()
        assert error < 2e-5, f'stage {stage}: {error:.1e}'

    norms = {key: float(norm) for key, norm in file.under(f'g/{size}').items()}
    assert norms.keys() == dict(backbone.named_parameters()).keys()
    # softmax does not see a constant on all logits, so the exact gradient of the last bias of a
    # position bias (pos3.2.bias) is zero and what is left of it is rounding: hence the floor.
    floor = 1e-8 * max(norms.values())
    for key, parameter in backbone.named_parameters():
        norm = parameter.grad.norm().item()
        assert abs(norm - norms[key]) < 2e-4 * norms[key] + floor, f'{key}: {norm} != {norms[key]}'


@pytest.mark.parametrize('name', SIZES)
@torch.no_grad()
def test_order_of_sizes_changes_no_bit(golden, name):
    file = golden[name]
    fresh = {size: file.build()(file.image(size)) for size in SIZES[name]}
    backbone = file.build()
    for seed in range(3):
        for size in random.Random(seed).sample(SIZES[name], len(SIZES[name])):
            for feature, reference in zip(backbone(file.image(size)), fresh[size]):
                assert torch.equal(feature, reference)
