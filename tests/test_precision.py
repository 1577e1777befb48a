"""Half precision with weights that have been trained: finite, and near float32 at every stage."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crossformer_mm import CrossFormer
from crossformer_mm.position_bias import DynamicPositionBias

from .helpers import FLOAT16, ROOT, load_script, needs_float16

DEMO = dict(embed_dims=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))  # of configs/demo


class Segmentor(nn.Module):
    """The demo's backbone with the simplest head that trains all of it."""

    def __init__(self, **options):
        super().__init__()
        self.backbone = CrossFormer(DEMO, **options)
        self.backbone.init_weights()
        self.heads = nn.ModuleList(nn.Conv2d(c, 5, 1) for c in self.backbone.out_channels)

    def forward(self, images):
        features = self.backbone(images)
        return sum(
            F.interpolate(head(feature).float(), images.shape[-2:], mode='bilinear')
            for head, feature in zip(self.heads, features)
        )


@pytest.fixture(scope='module')
def scenes():
    """Images of the demo's data set, normalised, and their label maps: 16 of 48x48."""
    scene = load_script(ROOT / 'tools/make_shapes.py').scene
    rng = np.random.default_rng(0)
    images, labels = [], []
    for _ in range(16):
        image, objects = scene(rng, 48)
        label = np.zeros((48, 48), np.int64)
        for kind, visible in objects:
            label[visible] = kind + 1
        images.append(image.transpose(2, 0, 1))
        labels.append(label)
    images, labels = (torch.from_numpy(np.stack(arrays)) for arrays in (images, labels))
    return (images.float() - 115) / 58, labels


@pytest.fixture(scope='module')
def trained(scenes):
    """A segmentor after 200 steps at the demo's learning rate: a short stand-in for the demo, with
    the same backbone, images and optimizer; without norms on its outputs, as published."""
    torch.manual_seed(0)
    model, (images, labels) = Segmentor(), scenes
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-4)
    losses = []
    for _step in range(200):
        batch = torch.randint(len(images), (4,))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:20])  # it did learn
    return model.eval()


@pytest.mark.parametrize('amplitude', [1, 100])
@pytest.mark.parametrize('dtype', [torch.bfloat16, FLOAT16])
def test_trained_features_and_gradients_are_finite_and_near(trained, scenes, dtype, amplitude):
    tolerance = 0.02 if dtype == torch.bfloat16 else 0.003
    images, labels = amplitude * scenes[0][:4], scenes[1][:4]
    with torch.no_grad():
        references = trained.backbone(images)
        with torch.autocast('cpu', dtype):
            features = trained.backbone(images)
    for feature, reference in zip(features, references):
        assert feature.isfinite().all()
        assert (feature.float() - reference).norm() < tolerance * reference.norm()

    trained.zero_grad()
    with torch.autocast('cpu', dtype):
        loss = F.cross_entropy(trained(images), labels)
    loss.backward()
    for name, parameter in trained.named_parameters():
        assert parameter.grad.isfinite().all(), name


@needs_float16
def test_grad_scaler_trains_in_float16_and_gets_over_an_overflow(scenes):
    model, (images, labels) = Segmentor(out_norm=True), scenes
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**10)

    def step(factor=1.0):
        with torch.autocast('cpu', torch.float16):
            loss = F.cross_entropy(model(images[:2]), labels[:2])
        optimizer.zero_grad()
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    losses = [step() for _ in range(10)]
    assert scaler.get_scale() == 2.0**10  # nothing overflowed
    before = [parameter.clone() for parameter in model.parameters()]
    step(float('inf'))
    assert all(torch.equal(now, old) for now, old in zip(model.parameters(), before))
    assert scaler.get_scale() == 2.0**9
    losses += [step() for _ in range(10)]
    assert np.isfinite(losses).all() and losses[-1] < 0.8 * losses[0]
    assert not all(torch.equal(now, old) for now, old in zip(model.parameters(), before))


@pytest.mark.parametrize('dtype', [torch.bfloat16, FLOAT16])
def test_position_bias_stays_in_float32_inside_the_backbone(small, dtype):
    backbone, types = small(), []
    for module in backbone.modules():
        if isinstance(module, DynamicPositionBias):
            module.register_forward_hook(lambda module, args, out: types.append(out.dtype))
    with torch.autocast('cpu', dtype):
        backbone(torch.randn(1, 3, 61, 83))
    assert types == [torch.float32] * 9
