"""The compiled kernel equals sums in float64, in value and gradient, on every instruction set."""

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossformer_mm.grouping import AxisRule, group_map
from crossformer_mm.kernels import native
from crossformer_mm.kernels.onednn import is_intel
from crossformer_mm.position_bias import bias_of_pairs

from .definition import random_inputs
from .paths import INSTRUCTIONS

# Of the value, of its gradients: relative errors in the norm.
LIMITS = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

pytestmark = pytest.mark.skipif(bool(native.MISSING), reason=native.MISSING or 'compiled')


def error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm().clamp_min(1e-12)).item()


def by_groups(qkv, table, rows, columns, heads, scale) -> tuple:
    """Output and log-sum-exp of (B, H, W, 3*heads*d), group by group."""
    batch, height, width, _ = qkv.shape
    outs, norms, order = [], [], []
    for groups in group_map(height, width, rows, columns):
        bias = bias_of_pairs(table, *groups.shape[1:])
        for index in groups.flatten(1):
            members = qkv.flatten(1, 2)[:, index].unflatten(2, (3, heads, -1))
            q, k, v = members.permute(2, 0, 3, 1, 4)
            logits = scale * q @ k.transpose(2, 3) + bias
            outs.append((logits.softmax(3) @ v).transpose(1, 2).flatten(2))
            norms.append(logits.logsumexp(3).transpose(1, 2))
            order.append(index)
    inverse = torch.cat(order).argsort()
    assert len(inverse) == height * width
    return tuple(torch.cat(x, 1)[:, inverse].unflatten(1, (height, width)) for x in (outs, norms))


def random_case(batch, height, width, rows, columns, heads, dim, dtype, spare=0):
    """Inputs, and a gradient of the output."""
    shape = batch, height, width
    grad = torch.randn(*shape, heads * dim, generator=torch.Generator().manual_seed(1))
    return *random_inputs(shape, rows, columns, heads, dim, dtype, spare), grad.to(dtype)


def run(qkv, table, grad, rules):
    out, norms = native.forward(qkv, table, *rules)
    return (out, norms, *native.backward(grad, qkv, table, out, norms, *rules))


def check(qkv, table, grad, rules):
    dtype, heads = qkv.dtype, rules[2]
    ours = run(qkv, table, grad, rules)
    qkv, table = qkv.double().requires_grad_(), table.double().requires_grad_()
    exact = by_groups(qkv, table, *rules)
    # The backward pass reads the output as it was rounded. What that changes in the gradient of a
    # logit is a multiple of its weight, which is the gradient of the log-sum-exp.
    rounded = ((exact[0] - ours[0]) * grad).unflatten(3, (heads, -1)).sum(4)
    exact += torch.autograd.grad(exact, (qkv, table), (grad.double(), rounded.detach()))
    assert [x.dtype for x in ours] == [dtype, torch.float32, dtype, torch.float32]
    positions = qkv[..., 0].numel()
    for mine, true, summed in zip(ours, exact, (1, 1, 1, positions)):
        assert mine.shape == true.shape
        # What is 0 but for rounding (groups of one member) has no relative error; the gradient of
        # the table is a sum over all positions, in which rounding adds up.
        limit = LIMITS[dtype]
        if summed > 1:
            limit = limit * summed**0.5 * true.abs().max().clamp_min(1)
        assert error(mine, true) < LIMITS[dtype] or (mine.double() - true).abs().max() < limit


CASES = {
    'one position': (1, 1, 1, AxisRule(1, 1), AxisRule(1, 1), 1, 32),
    'short distance': (2, 14, 15, AxisRule(7, 1), AxisRule(7, 1), 3, 32),
    'interval': (1, 20, 31, AxisRule(7, 3), AxisRule(8, 4), 2, 32),
    'a large group': (1, 25, 38, AxisRule(25, 1), AxisRule(40, 1), 2, 32),
    'block': (2, 17, 20, AxisRule(3, 2), AxisRule(3, 2), 2, 16),
    'shifted': (2, 10, 13, AxisRule(7, 1, 4), AxisRule(7, 1, 4), 1, 48),
    'one row': (1, 1, 300, AxisRule(7, 8), AxisRule(300, 1), 1, 5),
    'one column': (1, 300, 1, AxisRule(300, 1), AxisRule(3, 1), 2, 64),
    'the largest head': (1, 30, 13, AxisRule(4, 8), AxisRule(2, 8), 1, 128),
}


@pytest.mark.parametrize('dtype', native.DTYPES, ids=str)
@pytest.mark.parametrize('case', CASES)
def test_equals_float64(instructions, case, dtype):
    rows, columns, heads, dim = CASES[case][3:]
    check(*random_case(*CASES[case], dtype, spare=1), (rows, columns, heads, 0.3))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_float64_whatever_the_sizes(data):
    def rule(length):
        size = data.draw(st.integers(1, 12))
        shifted = size > 1 and data.draw(st.booleans())
        if shifted and length > size:
            return AxisRule(size, 1, data.draw(st.integers(1, size - 1)))
        return AxisRule(size, data.draw(st.integers(1, 9)))

    sizes = (1, 2), (1, 24), (1, 24), (1, 3), (1, 40), (0, 3)
    batch, height, width, heads, dim, spare = (data.draw(st.integers(*ends)) for ends in sizes)
    rules, dtype = (rule(height), rule(width)), data.draw(st.sampled_from(native.DTYPES))
    case = random_case(batch, height, width, *rules, heads, dim, dtype, spare)
    name = data.draw(st.sampled_from(native._native.supported()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.VARIABLE, name)
        check(*case, (*rules, heads, 0.3))


def check_values(case, rules, limit, norm_limit):
    """Compare values alone: far from 0 the gradients, which are finite, are all rounding."""
    qkv, table, grad = case
    out, norms, *gradients = run(qkv, table, grad, rules)
    exact, exact_norms = by_groups(qkv.double(), table.double(), *rules)
    assert error(out, exact) < limit and error(norms, exact_norms) < norm_limit(exact_norms)
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize('largest', [80.0, 3000.0, 1e30])
def test_large_logits_do_not_overflow(instructions, largest):
    rules = (AxisRule(5, 1), AxisRule(6, 1), 2, 1.0)
    qkv, table, grad = random_case(3, 5, 6, *rules[:2], 2, 32, torch.float32)
    case = qkv * 0.01, table * largest / table.abs().max(), grad
    check_values(case, rules, 1e-4, lambda norms: 1e-6)


def norm_limit(instructions, dtype):
    """Relative; what multiplies bfloat16 sums weights that are rounded to 2^-9 of themselves."""
    rounds = dtype == torch.bfloat16 and instructions in ('amx', 'avx512bf16', 'emulated')
    return lambda norms: 1e-6 + rounds * 2**-9 / norms.abs().max().item()


@pytest.mark.parametrize('dtype', native.DTYPES, ids=str)
@pytest.mark.parametrize('rise', [30.0, 300.0, 3000.0])
def test_logits_may_rise_from_key_to_key(instructions, dtype, rise):
    # The first keys say what weights are relative to; those behind them may be far larger. Beside
    # the largest, weights are smaller than any normal float.
    rules = (AxisRule(1, 1), AxisRule(500, 1), 2, 32**-0.5)
    qkv, table, grad = random_case(1, 1, 500, *rules[:2], 2, 32, dtype)
    q, k, _ = qkv.unflatten(3, (3, 2, 32)).unbind(3)
    q[..., 0] = 1
    k[..., 0] = (rise * 32**0.5) * torch.linspace(0, 1, 500)[:, None]
    k[:, :, 490:, 1, 0] = -rise  # one head is attracted by those before the last few
    limit = LIMITS[dtype] + 3e-7 * rise  # what the logits are rounded to
    check_values((qkv, table, grad), rules, limit, norm_limit(instructions, dtype))


@pytest.mark.parametrize('dtype', native.DTYPES, ids=str)
@pytest.mark.parametrize('size', [-200.0, -60.0, 60.0, 200.0])
def test_all_logits_of_a_query_may_be_large_or_small(instructions, dtype, size):
    # Beside queries of others: their weights, relative to 1, would be too large or too small for
    # floats. Those of the second head are as they mostly are.
    rules = (AxisRule(7, 1), AxisRule(9, 1), 2, 32**-0.5)
    qkv, table, grad = random_case(1, 7, 9, *rules[:2], 2, 32, dtype)
    q, k, _ = qkv.unflatten(3, (3, 2, 32)).unbind(3)
    q[..., 0, 0] = torch.linspace(0, 1, 63).view(7, 9)
    k[..., 0] = size * 32**0.5
    limit = LIMITS[dtype] + 3e-7 * abs(size)
    check_values((qkv, table, grad), rules, limit, norm_limit(instructions, dtype))


def test_numbers_too_small_to_be_normal_stay_what_they_are_elsewhere(instructions):
    rules = (AxisRule(7, 1), AxisRule(7, 1), 3, 32**-0.5)
    run(*random_case(1, 14, 14, *rules[:2], 3, 32, torch.float32), rules)
    assert torch.tensor([1e-30]).mul(1e-10) > 0


@pytest.mark.parametrize('dtype', native.DTYPES, ids=str)
def test_what_is_not_finite_shows(instructions, dtype):
    rules = (AxisRule(3, 1), AxisRule(4, 1), 1, 1.0)
    qkv, table, _ = random_case(2, 3, 4, *rules[:2], 1, 32, dtype)
    qkv[0, 1, 2, 40] = math.nan  # of a key of the first group
    out = native.forward(qkv, table, *rules)[0]
    assert out[0].isnan().all() and out[1].isfinite().all()


@pytest.mark.parametrize('dtype', native.DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(instructions, dtype, set_threads):
    rules = (AxisRule(3, 5), AxisRule(7, 2), 3, 0.3)
    case = random_case(2, 19, 23, *rules[:2], 3, 32, dtype)
    results = []
    for threads in (1, 2, 3, 2):
        set_threads(threads)
        results.append(run(*case, rules))
        assert all(map(torch.equal, results[0], results[-1]))


@pytest.mark.parametrize('pool', [True, False])
def test_several_python_threads_at_once(monkeypatch, pool, set_threads):
    if not pool:  # then each call starts threads of its own
        monkeypatch.setattr(native, 'POOL', 0)
    rules = (AxisRule(5, 4), AxisRule(5, 4), 2, 0.3)
    cases = [random_case(1, 20, n, *rules[:2], 2, 32, torch.float32) for n in (17, 20, 23, 31)]
    set_threads(2)
    expected = [run(*case, rules) for case in cases]
    with ThreadPoolExecutor(4) as executor:
        results = executor.map(lambda case: run(*case, rules), cases * 5)
        for ours, theirs in zip(expected * 5, results, strict=True):
            assert all(map(torch.equal, ours, theirs))


def test_pytorchs_own_threads_are_used():
    assert native.POOL or not sys.platform.startswith('linux')


@pytest.mark.skipif(sys.platform == 'win32', reason='has no fork')
def test_processes_that_fork_can_use_it_too():
    """Fork as a data loader does, with PyTorch's threads already running."""
    program = '''
import os, torch
from crossformer_mm.grouping import AxisRule
from crossformer_mm.kernels import native
torch.set_num_threads(2)
qkv, table = torch.ones(1, 50, 50, 96) / 7, torch.ones(1, 49, 49)
run = lambda: native.forward(qkv, table, AxisRule(25, 2), AxisRule(25, 2), 1, 1.)[0]
expected = run()
(torch.ones(1000, 1000) @ torch.ones(1000, 1000)).relu_()
for threads in (1, 2):
    child = os.fork()
    if not child:
        torch.set_num_threads(threads)
        os._exit(0 if bytes(run().untyped_storage()) == bytes(expected.untyped_storage()) else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, threads
'''
    command = [sys.executable, '-c', program]
    done = subprocess.run(command, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize('name', ['avx3', 'AVX2'])
def test_instructions_that_there_are_not_are_refused_in_one_sentence(monkeypatch, name):
    monkeypatch.setenv(native.VARIABLE, name)
    qkv, table, rule = torch.ones(1, 2, 2, 3), torch.ones(1, 3, 3), AxisRule(2, 1)
    with pytest.raises(ValueError, match=f"{native.VARIABLE} is '{name}', but .*'generic'"):
        native.forward(qkv, table, rule, rule, 1, 1.0)


def test_the_best_instructions_are_taken(monkeypatch):
    monkeypatch.delenv(native.VARIABLE, raising=False)
    supported = native._native.supported()
    order = list(INSTRUCTIONS)
    if is_intel():  # pairs of bfloat16 take longer than floats there
        order[1:3] = 'avx512', 'avx512bf16'
    assert supported == sorted(supported, key=order.index)
    assert native.instructions() == supported[0]
