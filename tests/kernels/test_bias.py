"""The kernel of the position bias equals its modules, and gives way to what users do to them.

Without a GPU it runs in Triton's interpreter, so groups are tiny here.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from crossformer_mm.attention import GroupAttention
from crossformer_mm.compat import TRITON, missing_torch
from crossformer_mm.grouping import AxisRule
from crossformer_mm.position_bias import DynamicPositionBias, RelativePositionBias

from ..helpers import needs_interpreter

if missing_torch(TRITON):
    pytest.skip(
        'the Triton that has all that the kernels use came with PyTorch 2.4',
        allow_module_level=True,
    )
pytest.importorskip('triton', reason='the kernel needs the package triton')
pytestmark = needs_interpreter
from crossformer_mm.kernels import bias, bias_triton, fused, self_test  # noqa: E402

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def build(channels=64, heads=2, residual=False):
    """A bias whose layers all matter."""
    generator = torch.Generator().manual_seed(0)
    pos = DynamicPositionBias(channels, heads, residual)
    for parameter in pos.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return pos.to(DEVICE)


@pytest.fixture
def kernel_runs(monkeypatch):
    """Record the runs of the forward kernel."""
    runs, forward = [], bias_triton.forward

    def counted(*args):
        runs.append(args)
        return forward(*args)

    monkeypatch.setattr(bias_triton, 'forward', counted)
    return runs


@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize(
    'channels, heads, height, width',
    [(96, 3, 4, 5), (64, 2, 1, 1), (16, 1, 1, 6), (1024, 32, 2, 3), (208, 5, 5, 2)],
)
def test_values_and_gradients_are_those_of_the_modules(
    channels, heads, height, width, residual, monkeypatch, kernel_runs
):
    monkeypatch.setattr(bias_triton, 'PROGRAMS', 2)  # each of which gets several tiles
    pos = build(channels, heads, residual)
    table = bias.position_table(pos, height, width, DEVICE, 'fused')
    assert len(kernel_runs) == 1 and table.dtype == torch.float32 and table.is_contiguous()
    grad = torch.randn(table.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ours = table, *torch.autograd.grad(table, list(pos.parameters()), grad)
    exact = copy.deepcopy(pos).double()
    reference = exact(height, width)
    grads = torch.autograd.grad(reference, list(exact.parameters()), grad.double())
    largest = max(one.abs().max() for one in grads)
    assert (table - reference).abs().max() <= 2e-6 * reference.abs().max()
    for one, other in zip(ours[1:], grads, strict=True):
        assert one.shape == other.shape and (one - other).abs().max() <= 2e-6 * largest


def test_autocast_changes_no_bit(kernel_runs):
    pos = build()
    reference = bias.position_table(pos, 3, 4, DEVICE, 'fused')
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(bias.position_table(pos, 3, 4, DEVICE, 'fused'), reference)
    assert len(kernel_runs) == 2


def test_frozen_parameters_get_no_gradient(kernel_runs):
    pos = build()
    pos.pos1.requires_grad_(False)
    bias.position_table(pos, 2, 3, DEVICE, 'fused').sum().backward()
    assert len(kernel_runs) == 1
    for name, parameter in pos.named_parameters():
        assert (parameter.grad is None) == name.startswith('pos1'), name


def hooked(layer):
    def change(pos):
        pos.get_submodule(layer).register_forward_hook(lambda module, args, out: out + 1)

    return change


def replaced(pos):
    pos.pos2[2] = nn.Sequential(pos.pos2[2], nn.Dropout(0.5)).eval()


def quantised(pos):
    torch.ao.quantization.quantize_dynamic(pos.pos1, {nn.Linear}, inplace=True)


def parametrised(pos):
    nn.utils.parametrizations.weight_norm(pos.pos3[2])


def pruned(pos):
    prune.random_unstructured(pos.pos1[2], 'weight', 0.5)


def narrowed(pos):
    for layer, norm in ((pos.pos1, pos.pos2), (pos.pos2, pos.pos3)):
        layer[2] = nn.Linear(layer[2].in_features, 3)
        norm[0] = nn.LayerNorm(3)
        norm[2] = nn.Linear(3, norm[2].out_features)
    pos.to(DEVICE)


def other_eps(pos):
    pos.pos2[0].eps = 0.1


def without_bias(pos):
    pos.pos1[2].bias = None


def in_bfloat16(pos):
    pos.bfloat16()


def turned(pos):
    weight = pos.pos1[2].weight
    weight.data = weight.data.t().contiguous().t()


@pytest.mark.parametrize(
    'change',
    [
        *(hooked(name) for name in ('', 'pos_proj', 'pos1', 'pos2.0', 'pos2.1', 'pos3.2')),
        replaced,
        pytest.param(quantised, marks=pytest.mark.filterwarnings('ignore')),
        parametrised,
        pruned,
        narrowed,
        other_eps,
        without_bias,
        in_bfloat16,
        turned,
    ],
)
def test_modules_run_where_they_are_not_as_they_were_built(change, kernel_runs):
    if change is quantised and DEVICE.type == 'cuda':
        pytest.skip('PyTorch quantises on the CPU')
    pos = build()
    change(pos)
    with torch.no_grad():
        assert torch.equal(bias.position_table(pos, 2, 3, DEVICE, 'fused'), pos(2, 3))
    assert not kernel_runs


def test_other_biases_and_paths_run_their_modules(kernel_runs, monkeypatch):
    assert bias.position_table(RelativePositionBias(2, 7), 2, 3, DEVICE, 'fused').shape == (2, 3, 5)
    for path in ('plain', 'native'):
        bias.position_table(build(), 2, 3, DEVICE, path)
    bias.position_table(build(2048, 2), 1, 1, DEVICE, 'fused')  # too wide
    if DEVICE.type == 'cpu':
        bias.position_table(build(), 2, 3, DEVICE)
    monkeypatch.setattr(fused, 'why_no_triton', lambda device: 'there is none')
    bias.position_table(build(), 2, 3, DEVICE, 'fused')
    assert not kernel_runs


def test_transforms_and_tracers_run_the_modules(kernel_runs):
    pos = build()
    functional = torch.func.functional_call(pos, dict(pos.named_parameters()), (2, 3))
    vmapped = torch.func.vmap(lambda _: bias.position_table(pos, 2, 3, DEVICE, 'fused'))(
        torch.ones(2)
    )
    torch.testing.assert_close(vmapped, functional.expand(2, -1, -1, -1))
    compiled = torch.compile(
        lambda: bias.position_table(pos, 2, 3, DEVICE, 'fused'), backend='eager', fullgraph=True
    )
    torch.testing.assert_close(compiled(), functional)
    assert not kernel_runs


def test_attention_recomputes_it_in_the_backward_pass(kernel_runs):
    attention = GroupAttention(32, 2, attention_path='fused').to(DEVICE)
    x = torch.randn(1, 4, 3, 32, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    rules = AxisRule(2, 2), AxisRule(3, 1)
    grads = []
    for run in (attention, lambda *args: checkpointed(attention, *args)):
        out = run(x, *rules)
        grads.append(torch.autograd.grad(out.square().sum(), list(attention.parameters())))
    assert len(kernel_runs) == 3
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def checkpointed(function, *args):
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)


KIND = bias.Kind(DEVICE, 6, 3, False, 1e-5)


@pytest.fixture
def untested(monkeypatch):
    for memory in ('PASSED', 'BROKEN', 'FAILURES'):
        monkeypatch.setattr(self_test, memory, type(getattr(self_test, memory))())
    self_test.say.cache_clear()


def raise_error(*args):
    raise RuntimeError('no such instruction')


def spoilt(name, spoil):
    """A pass whose last result is changed."""

    def change(monkeypatch):
        kernel = getattr(bias_triton, name)

        def run(*args):
            out = kernel(*args)
            spoil(out if name == 'forward' else out[-1])
            return out

        monkeypatch.setattr(bias_triton, name, run)

    return change


@pytest.mark.parametrize(
    'break_kernels, said',
    [
        (spoilt('forward', lambda out: out.mul_(1.01)), 'wrong by 0.01'),
        (spoilt('backward', lambda out: out.mul_(1.01)), 'wrong by 0.01'),
        (spoilt('forward', lambda out: out.flatten()[0].fill_(torch.nan)), 'wrong by nan'),
        (spoilt('backward', lambda out: out[0].fill_(torch.nan)), 'wrong by nan'),
        (spoilt('backward', lambda out: out[0].fill_(torch.inf)), 'wrong by inf'),
        (
            lambda monkeypatch: monkeypatch.setattr(bias_triton, 'launch', raise_error),
            'RuntimeError: no such instruction',
        ),
    ],
)
def test_kernels_that_do_not_work_are_not_used(break_kernels, said, monkeypatch, untested):
    break_kernels(monkeypatch)
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
    kind = bias.find_kind(pos, DEVICE)
    monkeypatch.setattr(bias, 'SELECTED_ON', DEVICE.type)
    assert self_test.passes(kind, True)
    expected = torch.autograd.grad(pos(4, 5).square().sum(), list(pos.parameters()))
    monkeypatch.setattr(bias_triton, name, raise_error)

    def table():
        return bias.position_table(pos, 4, 5, DEVICE)

    with pytest.warns(UserWarning, match='no such instruction'):
        out = checkpointed(table) if recomputed else table()
        grads = torch.autograd.grad(out.square().sum(), list(pos.parameters()))
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_gradient_of_a_gradient_is_an_error():
    pos = build()
    table = bias.position_table(pos, 2, 3, DEVICE, 'fused')
    with pytest.raises(RuntimeError, match='differentiable once'):
        torch.autograd.grad(table.square().sum(), list(pos.parameters()), create_graph=True)


def test_kernels_that_had_no_memory_are_tested_again(monkeypatch, untested):
    def no_memory(kind, trains):
        raise torch.cuda.OutOfMemoryError

    with monkeypatch.context() as context:
        context.setattr(bias.Kind, 'find_fault', no_memory)
        with pytest.warns(UserWarning, match="not be tested .*PyTorch's operators are used until"):
            assert not self_test.passes(KIND, True)
    assert self_test.passes(KIND, True)


def test_self_test_neither_sees_nor_changes_the_state_around_it(untested):
    saved, state = [], torch.get_rng_state()
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with (
            torch.inference_mode(),
            torch.autocast(DEVICE.type, torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(saved.append, raise_error),
        ):
            assert self_test.passes(KIND, True)
    finally:
        torch.set_default_dtype(dtype)
    assert not saved and torch.equal(torch.get_rng_state(), state)
