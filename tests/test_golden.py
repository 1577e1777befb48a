"""The features, gradients and losses of the authors' code, for the same weights and inputs."""

import json

import pytest
import torch

from crossformer_mm.compat import TRITON

from . import authors
from .helpers import needs_interpreter, needs_torch

CASES = [(name, size) for name, meta in authors.committed().items() for size in meta['sizes']]
# Relative errors that docs/learning.md gives.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-3
TRAJECTORY = json.loads((authors.FOLDER / 'trajectory.json').read_text())


@pytest.mark.parametrize('name, size', CASES)
def test_features_and_gradients_are_those_of_the_authors(probe, name, size):
    golden = authors.read(name, size)
    check(golden, golden.build(), probe)


def test_larger_files_agree_too(probe):
    """Passes without one where the environment names no folder of them."""
    for path in authors.larger_files():
        for golden in authors.read_larger(path):
            check(golden, golden.build(), probe)


@needs_torch(TRITON, 'the Triton that has all that the kernels use')
@needs_interpreter
def test_fused_attention_gives_them_too(probe):
    pytest.importorskip('triton', reason='fused attention needs the package triton')
    if torch.cuda.is_available():
        pytest.skip('this backbone is on the CPU, where Triton only runs if interpreted')
    golden = authors.read('interval', '1x64x96')
    check(golden, golden.build(attention_path='fused'), probe)


def check(golden: authors.Golden, backbone, probe) -> None:
    with torch.set_grad_enabled(bool(golden.gradients)):
        features = backbone(golden.image)
    assert len(features) == len(golden.features) == 4
    for stage, (feature, (places, values, norm)) in enumerate(zip(features, golden.features)):
        reference = torch.from_numpy(values)
        error = (feature.flatten()[places] - reference).abs().max() / reference.abs().max()
        assert error < 2e-5, f'{golden.name}, stage {stage}: {error:.1e}'
        assert abs(feature.double().norm() / norm - 1) < 1e-5
    if not golden.gradients:
        return
    probe(features).backward()
    norms = golden.gradients
    assert norms.keys() == dict(backbone.named_parameters()).keys()
    # softmax does not see a constant on all logits, so the exact gradient of the last bias of a
    # position bias (pos3.2.bias) is zero; so are all of a position bias where a group has one
    # member. What is left of them is rounding: hence the floor of float32's unit roundoff.
    floor = 2**-24 * max(norms.values())
    for key, parameter in backbone.named_parameters():
        norm = parameter.grad.norm().item()
        assert abs(norm - norms[key]) < 2e-4 * norms[key] + floor, f'{key}: {norm} != {norms[key]}'


@pytest.mark.parametrize('family, name', [('interval', 'interval'), ('block', 'block_cooling')])
def test_training_has_the_losses_of_the_authors(family, name):
    settings = authors.settings_of(authors.committed()[name])
    backbone = authors.build(settings, authors.draw_weights(settings))
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-3, weight_decay=0.05)
    for step, expected in enumerate(TRAJECTORY[family]['losses']):
        number, sides = step % 8, ((256, 352), (288, 256))[step % 2]
        features = backbone(authors.normal(f'step {number}', 2, 3, *sides))
        loss = sum(
            (feature - authors.normal(f'target {number} {level}', *feature.shape)).square().mean()
            for level, feature in enumerate(features)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert abs(loss.item() / expected - 1) < LOSS_TOLERANCE, (
            f'step {step}: {loss} != {expected}'
        )
    # The exact gradient is zero for the last bias of a position bias and for the keys' bias, and
    # AdamW makes steps of full length from what rounding leaves of it.
    for key, parameter in backbone.named_parameters():
        if '.pos.' not in key and not key.endswith('qkv.bias'):
            norm = TRAJECTORY[family]['weights'][key]
            assert abs(parameter.norm().item() / norm - 1) < NORM_TOLERANCE, key
