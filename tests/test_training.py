"""Training: initial weights, stochastic depth, frozen stages, activation checkpointing."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from crossformer_mm import CrossFormer, block
from crossformer_mm.block import DropPath
from crossformer_mm.grouping import stage_rules

from .conftest import SMALL

# Tensors, or lists and dicts of tensors, are the same to the bit.
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def gradients(backbone, loss) -> dict:
    loss.backward()
    return {name: parameter.grad for name, parameter in backbone.named_parameters()}


def drop_path_rates(backbone) -> list:
    return [block.drop_path.drop_prob for layer in backbone.layers for block in layer.blocks]


# Initial weights


def test_random_weights_are_those_of_the_papers_code():
    backbone = CrossFormer(SMALL, cooling=True, out_norm=True)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.fill_(7)  # so that what is not initialised shows
    backbone.init_weights()
    linear = [m for m in backbone.modules() if isinstance(m, nn.Linear)]
    norms = [m for m in backbone.modules() if isinstance(m, nn.LayerNorm)]
    for module in linear:
        if module.weight.numel() > 5000:
            assert abs(module.weight.std() - 0.02) < 0.001 and abs(module.weight.mean()) < 0.001
        assert 0 < module.weight.abs().max() < 0.12
        assert not module.bias.any()
    for module in norms:
        assert (module.weight == 1).all() and not module.bias.any()
    assert len(linear) > 50 and len(norms) > 50


def test_convolutions_keep_their_default_weights():
    backbone = CrossFormer(SMALL, cooling=True)
    convs = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    before = [module.weight.clone() for module in convs]
    backbone.init_weights()
    assert convs
    assert_equal([module.weight for module in convs], before)


def test_other_initialisers_of_mmengine_are_obeyed():
    backbone = CrossFormer(SMALL, init_cfg=dict(type='Constant', layer='Linear', val=0.5, bias=2))
    backbone.init_weights()
    assert (backbone.layers[3].blocks[1].mlp.fc1.weight == 0.5).all()
    assert (backbone.layers[3].blocks[1].mlp.fc1.bias == 2).all()


# Randomness


def test_stochastic_depth_grows_linearly_over_all_blocks():
    rates = drop_path_rates(CrossFormer(SMALL, drop_path_rate=0.4))
    assert rates == pytest.approx([0.05 * i for i in range(9)])


RATES = {'t': 0.1, 's': 0.2, 'b': 0.3, 'l': 0.5, 'pp-s': 0.2, 'pp-b': 0.3, 'pp-l': 0.5, 'pp-h': 0.5}


@pytest.mark.parametrize('arch, rate', RATES.items())
def test_stochastic_depth_is_the_architectures_unless_said(arch, rate):
    def last(**options):
        with torch.device('meta'):
            return drop_path_rates(CrossFormer(arch, **options))[-1]

    assert last() == pytest.approx(rate)
    assert last(drop_path_rate=0.0) == 0
    assert last(drop_path_rate=0.25) == pytest.approx(0.25)


def test_stages_left_out_do_not_change_the_rates_of_the_others():
    first, every = (
        drop_path_rates(CrossFormer(SMALL, drop_path_rate=0.4, out_indices=out_indices))
        for out_indices in ((1,), (3,))
    )
    assert first == every[: len(first)] and len(first) == 3


@pytest.mark.parametrize('rate', ['drop_rate', 'attn_drop_rate', 'drop_path_rate'])
def test_each_rate_acts_in_training_alone(small, rate):
    backbone, image = small(**{rate: 0.5}), torch.randn(2, 3, 64, 64)
    assert_equal(backbone(image), small()(image))
    backbone.train()
    once, again = backbone(image), backbone(image)
    assert not torch.equal(once[-1], again[-1])
    assert all(feature.isfinite().all() for feature in once)


def test_stochastic_depth_drops_the_samples_that_mmcvs_layer_drops():
    from mmcv.cnn.bricks import DropPath as Reference

    x, outs = torch.randn(400, 2, 3, 5), []
    for layer in (DropPath(0.25), Reference(0.25)):
        torch.manual_seed(1)
        outs.append(layer.train()(x))
        assert torch.equal(layer.eval()(x), x)
    torch.testing.assert_close(*outs)
    assert torch.equal(outs[0] == 0, outs[1] == 0) and 0 < (outs[0] == 0).float().mean() < 0.5


@pytest.fixture
def joined_sums(monkeypatch):
    """Count the sums that are joined with stochastic depth, as on a GPU."""
    joined, drops_paths = [], block.drops_paths

    def counted(path, device):
        joined.append(drops_paths(path, device))
        return joined[-1]

    monkeypatch.setattr(block, 'SUMS_ON', 'cpu')
    monkeypatch.setattr(block, 'drops_paths', counted)
    return joined


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_sum_joined_with_stochastic_depth_equals_the_two(dtype, joined_sums):
    path = DropPath(0.25).train()
    x = torch.randn(40, 2, 3, 5, requires_grad=True)
    branch = torch.randn_like(x).to(dtype).requires_grad_()
    weight, results = torch.randn_like(x), []
    for add in (block.add_branch, lambda x, branch, path: x + path(branch)):
        torch.manual_seed(1)
        out = add(x, branch, path)
        grads = torch.autograd.grad((out * weight).sum(), (x, branch), create_graph=True)
        again = torch.autograd.grad((out * weight).sum(), (x, branch))
        results.append((out, *grads, *again))
    assert joined_sums == [True]
    limits = {} if dtype == torch.float32 else dict(rtol=8e-3, atol=8e-3)
    torch.testing.assert_close(*results, **limits)


@pytest.mark.parametrize('with_cp', [False, True])
def test_training_with_joined_sums_equals_training_without(with_cp, joined_sums, monkeypatch):
    backbone = CrossFormer(SMALL, drop_path_rate=0.5, with_cp=with_cp).train()
    image, grads = torch.randn(2, 3, 64, 64), []
    for _ in range(2):
        torch.manual_seed(2)
        loss = sum(feature.square().mean() for feature in backbone(image))
        parameters = list(backbone.parameters())
        grads.append(torch.autograd.grad(loss, parameters, materialize_grads=True))
        monkeypatch.setattr(block, 'SUMS_ON', '')
    assert joined_sums.count(True) > 4
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'change',
    [
        lambda path: path.eval(),
        lambda path: path.register_forward_hook(lambda module, args, out: out * 0),
        lambda path: setattr(path, 'drop_prob', 0.0),
        lambda path: setattr(path, 'forward', torch.zeros_like),
    ],
)
def test_a_changed_stochastic_depth_is_called(change, joined_sums):
    path, x, branch = DropPath(0.25).train(), *torch.randn(2, 40, 2, 3, 5)
    change(path)
    assert torch.equal(block.add_branch(x, branch, path), x + path(branch))
    assert torch.equal(block.add_branch(x, branch, torch.nn.Identity()), x + branch)
    assert joined_sums == [False, False]


def test_attention_dropout_keeps_the_expected_value(small):
    attention = small(attn_drop_rate=0.5).layers[0].blocks[0].attn
    x = torch.randn(1, 5, 4, 32).expand(2000, -1, -1, -1)
    rules = stage_rules(5, 4, 7, 1, 'block')[0]
    with torch.no_grad():
        expected = attention(x, *rules)[0]
        dropped = attention.train()(x, *rules)
    assert dropped.std(0).min() > 0
    assert (dropped.mean(0) - expected).norm() < 0.1 * expected.norm()


def test_without_rates_training_equals_evaluation(small):
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(small().train()(image), small()(image))


def test_image_gets_a_gradient(small, probe):
    image = torch.randn(1, 3, 61, 83, requires_grad=True)
    probe(small()(image)).backward()
    assert (image.grad.abs().sum(1) > 0).all()


def test_every_parameter_learns_on_a_large_enough_map(small, probe):
    backbone = small(cooling=True, out_norm=True).train()
    for name, gradient in gradients(backbone, probe(backbone(torch.randn(1, 3, 256, 256)))).items():
        assert gradient.isfinite().all() and gradient.any(), name


# Activation checkpointing


@pytest.mark.parametrize('rates', [{}, dict(drop_path_rate=0.5, drop_rate=0.1, attn_drop_rate=0.1)])
def test_recomputing_changes_no_value_and_no_gradient(small, probe, rates):
    image, results = torch.randn(2, 3, 61, 83), []
    for with_cp in (False, True):
        backbone = small(with_cp=with_cp, cooling=True, **rates).train()
        torch.manual_seed(1)  # the same blocks are dropped
        features = backbone(image)
        results.append((features, gradients(backbone, probe(features))))
    (plain, plain_gradients), (recomputed, recomputed_gradients) = results
    assert_equal(recomputed, plain)
    torch.testing.assert_close(recomputed_gradients, plain_gradients)


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at one time."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def test_recomputing_saves_memory(small, probe):
    peaks = {}
    for with_cp in (False, True):
        backbone = small(dict(SMALL, depths=(2, 6, 2, 2)), with_cp=with_cp).train()
        with PeakMemory() as memory:
            probe(backbone(torch.randn(2, 3, 320, 320))).backward()
        peaks[with_cp] = memory.peak
    assert peaks[True] < 0.6 * peaks[False], peaks


def test_recomputing_is_harmless_without_gradients(small):
    backbone, image = small(with_cp=True), torch.randn(1, 3, 61, 83)
    with torch.no_grad():
        features = backbone(image)
        assert_equal(features, small()(image))
    assert not any(feature.requires_grad for feature in features)


# Frozen stages


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('stages', [-1, 0, 1, 2, 3, 4])
def test_frozen_stages_stay_frozen_and_the_rest_trains(probe, stages, with_cp):
    rates = dict(drop_rate=0.1, drop_path_rate=0.1)
    backbone = CrossFormer(SMALL, frozen_stages=stages, with_cp=with_cp, out_norm=True, **rates)
    prefixes = ()
    if stages >= 0:
        prefixes = ('patch_embed.', 'absolute_pos.', 'embed_drop.')
        prefixes += tuple(f'{part}{i}.' for i in range(stages) for part in ('layers.', 'norm'))
    backbone.init_weights()
    backbone.eval()
    backbone.train()
    features = backbone(torch.randn(1, 3, 64, 64))
    if stages < 4:
        probe(features).backward()
    else:
        assert not any(feature.requires_grad for feature in features)
    for name, parameter in backbone.named_parameters():
        frozen = name.startswith(prefixes)
        assert parameter.requires_grad != frozen, name
        assert (parameter.grad is None) == frozen, name
    for name, module in backbone.named_modules():
        if name and name != 'layers':
            assert module.training != f'{name}.'.startswith(prefixes), name


def test_frozen_stages_draw_no_random_numbers(small):
    backbone = small(frozen_stages=2, drop_rate=0.5, drop_path_rate=0.5).train()
    image = torch.randn(1, 3, 64, 64)
    once, again = backbone(image), backbone(image)
    assert_equal(once[:2], again[:2])
    assert not torch.equal(once[3], again[3])


# Determinism


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('lda', ['interval', 'block'])
@pytest.mark.usefixtures('deterministic')
def test_same_seed_trains_to_the_same_weights(probe, lda, with_cp):
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        rates = dict(drop_rate=0.1, drop_path_rate=0.2)
        backbone = CrossFormer(SMALL, lda=lda, with_cp=with_cp, cooling=True, **rates)
        backbone.init_weights()
        optimizer = torch.optim.AdamW(backbone.train().parameters(), 1e-3)
        for size in ((61, 83), (97, 130)):
            optimizer.zero_grad()
            probe(backbone(torch.randn(2, 3, *size))).backward()
            optimizer.step()
        results.append(backbone.state_dict())
    assert_equal(*results)
