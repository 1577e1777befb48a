"""The kernels of the position bias equal its modules, and give way to what users do to them.

Without a GPU, Triton's runs in its interpreter, so groups are tiny here.
"""

import copy
import importlib
import warnings
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from crossformer_mm.attention import GroupAttention
from crossformer_mm.grouping import AxisRule
from crossformer_mm.kernels import bias, fused, native, self_test
from crossformer_mm.position_bias import DynamicPositionBias, RelativePositionBias

from .definition import GPU, default_of_float64
from .paths import CPU, device_of, every_kernel, lacks

MODULES = dict(fused='bias_triton', native='bias_native')
if not lacks('fused'):
    from crossformer_mm.kernels import bias_triton
needs_triton = pytest.mark.skipif(bool(lacks('fused')), reason=f'fused: {lacks("fused")}')
needs_native = pytest.mark.skipif(bool(lacks('native')), reason=f'native: {lacks("native")}')


def build(channels=64, heads=2, residual=False, device=GPU):
    """A bias whose layers all matter."""
    generator = torch.Generator().manual_seed(0)
    pos = DynamicPositionBias(channels, heads, residual)
    for parameter in pos.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    return pos.to(device)


def table_of(pos, height=2, width=3, path='fused'):
    return bias.position_table(pos, height, width, device_of(path), path)


@pytest.fixture
def forward_kernel(path, monkeypatch) -> mock.Mock:
    """Record the runs of the forward kernel of a path."""
    module = importlib.import_module(f'{bias.__package__}.{MODULES[path]}')
    kernel = mock.Mock(wraps=module.forward)
    monkeypatch.setattr(module, 'forward', kernel)
    return kernel


def assert_equals_modules(pos, height, width, path):
    """In value and gradients; float64 is the judge."""
    table = table_of(pos, height, width, path)
    assert table.dtype == torch.float32 and table.is_contiguous()
    grad = torch.randn(table.shape, generator=torch.Generator().manual_seed(1)).to(table)
    ours = table, *torch.autograd.grad(table, list(pos.parameters()), grad)
    exact = copy.deepcopy(pos).double()
    reference = exact(height, width)
    grads = torch.autograd.grad(reference, list(exact.parameters()), grad.double())
    largest = max(one.abs().max() for one in grads)
    assert (table - reference).abs().max() <= 2e-6 * reference.abs().max()
    for one, other in zip(ours[1:], grads, strict=True):
        assert one.shape == other.shape and (one - other).abs().max() <= 2e-6 * largest
    return ours


@every_kernel
@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize(
    'channels, heads, height, width',
    [(96, 3, 4, 5), (64, 2, 1, 1), (16, 1, 1, 6), (1024, 32, 2, 3), (208, 5, 5, 2)],
)
def test_values_and_gradients_are_those_of_the_modules(
    channels, heads, height, width, residual, path, monkeypatch, forward_kernel
):
    if path == 'fused':
        monkeypatch.setattr(bias_triton, 'PROGRAMS', 2)  # each of which gets several tiles
    pos = build(channels, heads, residual, device_of(path))
    assert_equals_modules(pos, height, width, path)
    assert forward_kernel.call_count == 1


@needs_native
def test_every_instruction_set_has_the_same_values_for_any_number_of_threads(
    instructions, set_threads
):
    pos, results = build(192, 6, device=CPU), []
    for threads in (1, 3):
        set_threads(threads)
        results.append(assert_equals_modules(pos, 9, 31, 'native'))
    assert all(map(torch.equal, *results))


@every_kernel
def test_what_is_not_a_number_stays(path):
    for name in ('pos_proj.bias', 'pos1.0.weight', 'pos3.2.bias'):
        pos = build(device=device_of(path))
        pos.get_parameter(name).data.fill_(torch.nan)
        assert table_of(pos, path=path).isnan().all(), name


@every_kernel
def test_autocast_changes_no_bit(path, forward_kernel):
    pos = build(device=device_of(path))
    reference = table_of(pos, path=path)
    with torch.autocast(device_of(path).type, torch.bfloat16):
        assert torch.equal(table_of(pos, path=path), reference)
    assert forward_kernel.call_count == 2


@every_kernel
def test_frozen_parameters_get_no_gradient(path, forward_kernel):
    pos = build(device=device_of(path))
    pos.pos1.requires_grad_(False)
    table_of(pos, path=path).sum().backward()
    assert forward_kernel.call_count == 1
    for name, parameter in pos.named_parameters():
        assert (parameter.grad is None) == name.startswith('pos1'), name


def narrow(pos):
    for layer, norm in ((pos.pos1, pos.pos2), (pos.pos2, pos.pos3)):
        layer[2] = nn.Linear(layer[2].in_features, 3)
        norm[0] = nn.LayerNorm(3)
        norm[2] = nn.Linear(3, norm[2].out_features)
    pos.to(pos.pos_proj.weight.device)


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
    'scripted': lambda pos: pos.pos2.__setitem__(2, torch.jit.script(pos.pos2[2])),
    'quantised': quantise,
    'parametrised': lambda pos: nn.utils.parametrizations.weight_norm(pos.pos3[2]),
    'pruned': lambda pos: prune.random_unstructured(pos.pos1[2], 'weight', 0.5),
    'narrower': narrow,
    'another eps': lambda pos: setattr(pos.pos2[0], 'eps', 0.1),
    'no bias': lambda pos: setattr(pos.pos1[2], 'bias', None),
    'bfloat16': lambda pos: pos.bfloat16(),
    'another layout': transpose,
}


@every_kernel
@pytest.mark.parametrize('change', SURGERY.values(), ids=SURGERY)
@pytest.mark.filterwarnings('ignore')  # of quantisation
def test_modules_run_where_they_are_not_as_they_were_built(change, path, forward_kernel):
    if change is quantise and device_of(path).type == 'cuda':
        pytest.skip('PyTorch quantises on the CPU')
    pos = build(device=device_of(path))
    change(pos)
    with torch.no_grad():
        assert torch.equal(table_of(pos, path=path), pos(2, 3))
    assert not forward_kernel.called


@every_kernel
def test_other_biases_and_paths_run_their_modules(path, forward_kernel, monkeypatch):
    pos = build(device=device_of(path))
    assert table_of(RelativePositionBias(2, 7), path=path).shape == (2, 3, 5)
    bias.position_table(pos, 2, 3, device_of(path), 'plain')
    table_of(build(2048, 2, device=device_of(path)), 1, 1, path)  # too wide
    monkeypatch.setattr(fused, 'why_no_triton', lambda device: 'there is none')
    monkeypatch.setattr(native, 'MISSING', 'it was not compiled')
    table_of(pos, path=path)
    assert not forward_kernel.called


@every_kernel
def test_transforms_and_tracers_run_the_modules(path, forward_kernel):
    pos = build(device=device_of(path))
    functional = torch.func.functional_call(pos, dict(pos.named_parameters()), (2, 3))
    vmapped = torch.func.vmap(lambda _: table_of(pos, path=path))(torch.ones(2))
    torch.testing.assert_close(vmapped, functional.expand(2, -1, -1, -1))
    compiled = torch.compile(lambda: table_of(pos, path=path), backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(), functional)
    assert not forward_kernel.called


@every_kernel
def test_attention_recomputes_it_in_the_backward_pass(path, forward_kernel):
    attention = GroupAttention(32, 2, attention_path=path).to(device_of(path))
    x = torch.randn(1, 4, 3, 32, generator=torch.Generator().manual_seed(2)).to(device_of(path))
    rules = AxisRule(2, 2), AxisRule(3, 1)
    grads = []
    for run in (attention, lambda *args: checkpointed(attention, *args)):
        out = run(x, *rules)
        grads.append(torch.autograd.grad(out.square().sum(), list(attention.parameters())))
    assert forward_kernel.call_count == 3
    assert all(map(torch.equal, *grads))


def checkpointed(function, *args):
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)


@every_kernel
def test_gradients_of_gradients_and_batches_of_gradients_are_those_of_the_modules(
    path, forward_kernel
):
    pos = build(device=device_of(path))
    pos.pos2[2].weight.requires_grad_(False)
    leaves = [parameter for parameter in pos.parameters() if parameter.requires_grad]
    results = []
    for compute in (lambda: table_of(pos, path=path), lambda: pos(2, 3)):
        table = compute()
        grads = torch.autograd.grad(table.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)
        batch = torch.stack([torch.ones_like(table), table.detach()])
        batched = torch.autograd.grad(compute(), leaves, batch, is_grads_batched=True)
        results.append((*grads, *second, *batched))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    assert forward_kernel.call_count == 2


KIND = bias.Kind('bias_triton', GPU, 6, 3, False, 1e-5)


def raise_error(*args):
    raise RuntimeError('no such instruction')


@needs_triton
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


@needs_triton
@pytest.mark.parametrize('name', ['forward', 'backward'])
@pytest.mark.parametrize('recomputed', [False, True])
def test_a_launch_that_fails_later_warns_and_the_modules_take_over(
    name, recomputed, monkeypatch, untested
):
    pos = build(96, 3)
    monkeypatch.setattr(bias, 'SELECTED_ON', GPU.type)
    kind, _ = bias.find_kind(pos, GPU)
    assert self_test.passes(kind, True)
    expected = torch.autograd.grad(pos(4, 5).square().sum(), list(pos.parameters()))
    monkeypatch.setattr(bias_triton, name, raise_error)

    def compute(pos):
        return bias.position_table(pos, 4, 5, GPU)

    with pytest.warns(UserWarning, match='no such instruction'):
        out = checkpointed(compute, pos) if recomputed else compute(pos)
        grads = torch.autograd.grad(out.square().sum(), list(pos.parameters()))
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-4)


@needs_triton
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
