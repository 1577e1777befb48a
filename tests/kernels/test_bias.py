"""The kernel of the position bias equals its modules, and gives way to what users do to them.

Without a GPU it runs in Triton's interpreter, so groups are tiny here.
"""

import copy
import warnings
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from crossformer_mm.attention import GroupAttention
from crossformer_mm.grouping import AxisRule
from crossformer_mm.kernels import bias, fused, self_test
from crossformer_mm.position_bias import DynamicPositionBias, RelativePositionBias

from .definition import GPU, default_of_float64
from .paths import lacks

if lacks('fused'):
    pytest.skip(lacks('fused'), allow_module_level=True)
from crossformer_mm.kernels import bias_triton  # noqa: E402


def build(channels=64, heads=2, residual=False):
    """A bias whose layers all matter."""
    generator = torch.Generator().manual_seed(0)
    pos = DynamicPositionBias(channels, heads, residual)
    for parameter in pos.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return pos.to(GPU)


def table_of(pos, height=2, width=3, path='fused'):
    return bias.position_table(pos, height, width, GPU, path)


@pytest.fixture
def forward_kernel(monkeypatch) -> mock.Mock:
    """Record the runs of the forward kernel."""
    kernel = mock.Mock(wraps=bias_triton.forward)
    monkeypatch.setattr(bias_triton, 'forward', kernel)
    return kernel


@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize(
    'channels, heads, height, width',
    [(96, 3, 4, 5), (64, 2, 1, 1), (16, 1, 1, 6), (1024, 32, 2, 3), (208, 5, 5, 2)],
)
def test_values_and_gradients_are_those_of_the_modules(
    channels, heads, height, width, residual, monkeypatch, forward_kernel
):
    monkeypatch.setattr(bias_triton, 'PROGRAMS', 2)  # each of which gets several tiles
    pos = build(channels, heads, residual)
    table = table_of(pos, height, width)
    assert forward_kernel.call_count == 1 and table.dtype == torch.float32 and table.is_contiguous()
    grad = torch.randn(table.shape, generator=torch.Generator().manual_seed(1)).to(GPU)
    ours = table, *torch.autograd.grad(table, list(pos.parameters()), grad)
    exact = copy.deepcopy(pos).double()
    reference = exact(height, width)
    grads = torch.autograd.grad(reference, list(exact.parameters()), grad.double())
    largest = max(one.abs().max() for one in grads)
    assert (table - reference).abs().max() <= 2e-6 * reference.abs().max()
    for one, other in zip(ours[1:], grads, strict=True):
        assert one.shape == other.shape and (one - other).abs().max() <= 2e-6 * largest


def test_autocast_changes_no_bit(forward_kernel):
    pos = build()
    reference = table_of(pos)
    with torch.autocast(GPU.type, torch.bfloat16):
        assert torch.equal(table_of(pos), reference)
    assert forward_kernel.call_count == 2


def test_frozen_parameters_get_no_gradient(forward_kernel):
    pos = build()
    pos.pos1.requires_grad_(False)
    table_of(pos).sum().backward()
    assert forward_kernel.call_count == 1
    for name, parameter in pos.named_parameters():
        assert (parameter.grad is None) == name.startswith('pos1'), name


def narrow(pos):
    for layer, norm in ((pos.pos1, pos.pos2), (pos.pos2, pos.pos3)):
        layer[2] = nn.Linear(layer[2].in_features, 3)
        norm[0] = nn.LayerNorm(3)
        norm[2] = nn.Linear(3, norm[2].out_features)
    pos.to(GPU)


def transpose(pos):
    weight = pos.pos1[2].weight
    weight.data = weight.data.t().contiguous().t()


def hook(layer):
    def change(pos):
        pos.get_submodule(layer).register_forward_hook(lambda module, args, out: out + 1)

    return change


def quantise(pos):
    torch.ao.quantization.quantize_dynamic(pos.pos1, {nn.Linear}, inplace=True)


SURGERY = {
    **{f'hook {name}': hook(name) for name in ('pos_proj', 'pos1', 'pos2.0', 'pos2.1', 'pos3.2')},
    'hook': hook(''),
    'another layer': lambda pos: pos.pos2.__setitem__(2, nn.Sequential(pos.pos2[2], nn.Identity())),
    'quantised': quantise,
    'parametrised': lambda pos: nn.utils.parametrizations.weight_norm(pos.pos3[2]),
    'pruned': lambda pos: prune.random_unstructured(pos.pos1[2], 'weight', 0.5),
    'narrower': narrow,
    'another eps': lambda pos: setattr(pos.pos2[0], 'eps', 0.1),
    'no bias': lambda pos: setattr(pos.pos1[2], 'bias', None),
    'bfloat16': lambda pos: pos.bfloat16(),
    'another layout': transpose,
}


@pytest.mark.parametrize('change', SURGERY.values(), ids=SURGERY)
@pytest.mark.filterwarnings('ignore')  # of quantisation
def test_modules_run_where_they_are_not_as_they_were_built(change, forward_kernel):
    if change is quantise and GPU.type == 'cuda':
        pytest.skip('PyTorch quantises on the CPU')
    pos = build()
    change(pos)
    with torch.no_grad():
        assert torch.equal(table_of(pos), pos(2, 3))
    assert not forward_kernel.called


def test_other_biases_and_paths_run_their_modules(forward_kernel, monkeypatch):
    assert table_of(RelativePositionBias(2, 7)).shape == (2, 3, 5)
    for path in ('plain', 'native', *[None] * (GPU.type == 'cpu')):
        table_of(build(), path=path)
    table_of(build(2048, 2), 1, 1)  # too wide
    monkeypatch.setattr(fused, 'why_no_triton', lambda device: 'there is none')
    table_of(build())
    assert not forward_kernel.called


def test_transforms_and_tracers_run_the_modules(forward_kernel):
    pos = build()
    functional = torch.func.functional_call(pos, dict(pos.named_parameters()), (2, 3))
    vmapped = torch.func.vmap(lambda _: table_of(pos))(torch.ones(2))
    torch.testing.assert_close(vmapped, functional.expand(2, -1, -1, -1))
    compiled = torch.compile(lambda: table_of(pos), backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(), functional)
    assert not forward_kernel.called


def test_attention_recomputes_it_in_the_backward_pass(forward_kernel):
    attention = GroupAttention(32, 2, attention_path='fused').to(GPU)
    x = torch.randn(1, 4, 3, 32, generator=torch.Generator().manual_seed(2)).to(GPU)
    rules = AxisRule(2, 2), AxisRule(3, 1)
    grads = []
    for run in (attention, lambda *args: checkpointed(attention, *args)):
        out = run(x, *rules)
        grads.append(torch.autograd.grad(out.square().sum(), list(attention.parameters())))
    assert forward_kernel.call_count == 3
    assert all(map(torch.equal, *grads))


def checkpointed(function, *args):
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)


KIND = bias.Kind(GPU, 6, 3, False, 1e-5)


def raise_error(*args):
    raise RuntimeError('no such instruction')


@pytest.mark.parametrize(
    'name, spoil, said',
    [
        ('forward', lambda out: out.mul_(1.01), 'wrong by 0.01'),
        ('backward', lambda out: out.mul_(1.01), 'wrong by 0.01'),
        ('forward', lambda out: out.flatten()[0].fill_(torch.nan), 'wrong by nan'),
        ('backward', lambda out: out[0].fill_(torch.nan), 'wrong by nan'),
        ('backward', lambda out: out[0].fill_(torch.inf), 'wrong by inf'),
        ('launch', raise_error, 'RuntimeError: no such instruction'),
    ],
)
def test_kernels_that_do_not_work_are_not_used(name, spoil, said, monkeypatch, untested):
    kernel = getattr(bias_triton, name)

    def run(*args):
        out = kernel(*args)
        spoil(out[-1] if name == 'backward' else out)
        return out

    monkeypatch.setattr(bias_triton, name, run)
    with pytest.warns(UserWarning, match=f'position bias does not work on .*{said}'):
        assert not self_test.passes(KIND, True)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not self_test.passes(KIND, True)  # said once


@pytest.mark.parametrize('name', ['forward', 'backward'])
@pytest.mark.parametrize('recomputed', [False, True])
def test_a_launch_that_fails_later_warns_and_the_modules_take_over(
    name, recomputed, monkeypatch, untested
):
    pos = build(96, 3)
    kind = bias.find_kind(pos, GPU)
    monkeypatch.setattr(bias, 'SELECTED_ON', GPU.type)
    assert self_test.passes(kind, True)
    expected = torch.autograd.grad(pos(4, 5).square().sum(), list(pos.parameters()))
    monkeypatch.setattr(bias_triton, name, raise_error)
    arguments = pos, 4, 5, None
    with pytest.warns(UserWarning, match='no such instruction'):
        out = checkpointed(table_of, *arguments) if recomputed else table_of(*arguments)
        grads = torch.autograd.grad(out.square().sum(), list(pos.parameters()))
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-4)


def test_a_gradient_of_a_gradient_is_an_error():
    pos = build()
    total = table_of(pos).square().sum()
    with pytest.raises(RuntimeError, match='differentiable once'):
        torch.autograd.grad(total, list(pos.parameters()), create_graph=True)


def test_self_test_neither_sees_nor_changes_the_state_around_it(untested):
    saved, state = [], torch.get_rng_state()
    with (
        default_of_float64(),
        torch.inference_mode(),
        torch.autocast(GPU.type, torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(saved.append, raise_error),
    ):
        assert self_test.passes(KIND, True)
    assert not saved and torch.equal(torch.get_rng_state(), state)
