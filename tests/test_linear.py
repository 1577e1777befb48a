"""Linear layers and MLPs: every way to compute them gives PyTorch's values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crossformer_mm import linear
from crossformer_mm.kernels import mlp as mlps
from crossformer_mm.kernels import onednn
from crossformer_mm.kernels.onednn import onednn_suits
from crossformer_mm.linear import Linear, Mlp

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason='this PyTorch was built without oneDNN'
)


def check(ours, reference, *tensors):
    """Same value, and same gradient of every tensor, to float32 rounding."""
    results = []
    for function in (ours, reference):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        out = function(*leaves)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        results.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-4 * theirs.abs().max().item())


@needs_onednn
@pytest.mark.parametrize('tokens', [1, 2, 49, 1000])
@pytest.mark.parametrize('channels, out', [(16, 48), (1, 3), (3, 1), (96, 288)])
def test_linear_equals_pytorchs(tokens, channels, out):
    tensors = torch.randn(tokens, channels), torch.randn(out, channels), torch.randn(out)
    check(onednn.OneDNNLinear.apply, F.linear, *tensors)
    check(lambda x, w: onednn.OneDNNLinear.apply(x, w, None), F.linear, *tensors[:2])


@pytest.mark.parametrize('tokens', [0, 1, 5, 1000])
@pytest.mark.parametrize('chunk', [1, 200, 2**20])
@pytest.mark.parametrize('kept', [0, 2**30])
@pytest.mark.parametrize('library', ['MKL', pytest.param('oneDNN', marks=needs_onednn)])
def test_mlp_equals_pytorchs_in_parts_of_any_size(tokens, chunk, kept, library, monkeypatch):
    monkeypatch.setattr(mlps, 'CHUNK', chunk)
    monkeypatch.setattr(mlps, 'ONEDNN_CHUNK', chunk)
    monkeypatch.setattr(mlps, 'KEPT', kept)
    monkeypatch.setattr(mlps, 'onednn_suits', lambda x, weight: library == 'oneDNN')

    def reference(x, weight1, bias1, weight2, bias2):
        return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)

    tensors = (
        torch.randn(tokens, 8),
        torch.randn(32, 8),
        torch.randn(32),
        torch.randn(8, 32),
        torch.randn(8),
    )
    if tokens:
        check(mlps.mlp, reference, *tensors)
    assert mlps.mlp(*tensors).shape == (tokens, 8)


def test_a_large_hidden_layer_is_not_kept_for_the_backward_pass(monkeypatch):
    x, module = torch.randn(300, 8), Mlp(8, 32)
    for limit, kept in ((300 * 32, True), (300 * 32 - 1, False)):
        monkeypatch.setattr(mlps, 'KEPT', limit)
        saved = []

        def keep(tensor):
            saved.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module(x)
        assert ((300, 32) in saved) == kept


@pytest.mark.parametrize('rows, width', [(0, 5), (1, 1), (7, 2**21), (1000, 384), (60800, 384)])
def test_chunks_cover_every_row_once(rows, width):
    parts = mlps.chunks(rows, width, 2**20)
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))


def be_processor(monkeypatch, capability='AVX512', intel=False):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    monkeypatch.setattr(onednn, 'is_intel', lambda: intel)


@needs_onednn
def test_the_rule_takes_onednn_for_float32_on_others_cpus_with_avx512_alone(monkeypatch):
    x, weight = torch.randn(200, 8), torch.randn(16, 8)
    for capability, intel, suits in (
        ('AVX512', False, True),
        ('AVX512', True, False),
        ('AVX2', False, False),
        ('DEFAULT', False, False),
    ):
        be_processor(monkeypatch, capability, intel)
        assert onednn_suits(x, weight) == suits
    be_processor(monkeypatch)
    assert not onednn_suits(x.double(), weight) and not onednn_suits(x.bfloat16(), weight)
    assert not onednn_suits(x.to('meta'), weight)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert not onednn_suits(x, weight)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn_suits(x, weight)


@needs_onednn
def test_the_rule_takes_it_for_few_tokens_only_without_gradient(monkeypatch):
    be_processor(monkeypatch)
    few, some, many = torch.randn(3, 5, 8), torch.randn(13, 10, 8), torch.randn(400, 8)
    small, large = torch.randn(16, 8), torch.empty(1025, 1024)
    assert not onednn_suits(few, small) and onednn_suits(some, small)
    assert not onednn_suits(some, large) and onednn_suits(many, large)
    with torch.no_grad():
        assert onednn_suits(few, small) and onednn_suits(some, large)


@pytest.mark.parametrize('shape', [(2, 5, 7, 8), (3, 8), (1, 8)])
def test_modules_take_any_leading_sides(shape):
    x = torch.randn(shape)
    linear, mlp = Linear(8, 24), Mlp(8, 32)
    for module, channels in ((linear, 24), (mlp, 8)):
        out = module(x)
        assert out.shape == (*shape[:-1], channels)
        torch.testing.assert_close(out, module.double()(x.double()).float())


def test_mlp_without_gradient_gives_the_same():
    x, mlp = torch.randn(3, 50, 8, dtype=torch.float64), Mlp(8, 32).double()
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x))))


def test_dropout_and_hooks_see_the_hidden_layer():
    x, mlp = torch.randn(200, 8), Mlp(8, 32, drop_rate=0.5)
    assert (mlp.train()(x) == 0).float().mean() > 0.4
    assert not (mlp.eval()(x) == 0).any()
    seen = []
    mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    mlp(x)
    assert seen == [(200, 32)]


def test_a_layer_put_in_the_place_of_ours_is_used():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x, mlp = torch.randn(5, 8), Mlp(8, 32)
    before = mlp(x)
    doubled = Doubled(32, 8)
    doubled.load_state_dict(mlp.fc2.state_dict())
    mlp.fc2 = doubled
    torch.testing.assert_close(mlp(x), 2 * before)


@pytest.mark.parametrize('bias', [True, False])
def test_weight_and_bias_cast_together_are_those_of_autocast(bias, monkeypatch):
    monkeypatch.setattr(linear, 'joint_cast_dtype', linear.cast_dtype)
    torch.manual_seed(0)
    layer, x = Linear(24, 40, bias=bias), torch.randn(2, 5, 24)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(layer(x), nn.Linear.forward(layer, x))
