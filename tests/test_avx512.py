"""The compiled kernel for bfloat16 equals the plain path in float64, rounding apart."""
import copy
import platform
import subprocess
import sys

import pytest
import torch

from crossformer_mm import CrossFormer, kernels
from crossformer_mm.grouping import Segment
from crossformer_mm.kernels import (avx512, choose_path, group_attention, plain_attention, tiled,
                                    tiled_attention)

from .conftest import SMALL
from .test_kernels import random_inputs, values_and_gradients

CPU = torch.device('cpu')
DIM = 32


def why_not(device=CPU, dtype=torch.bfloat16, head_dim=DIM, dropout=0.) -> str:
    return kernels.why_not('avx512', device, dtype, head_dim, dropout)


# Elsewhere than on Linux it need not have been compiled.
on_linux = (platform.system(), platform.machine()) == ('Linux', 'x86_64')
needs_avx512 = pytest.mark.skipif(
    not on_linux or why_not() == 'this processor has no AVX512_BF16',
    reason='needs Linux on a processor with AVX512_BF16')


def attend(qkv, table, segments, heads, scale):
    return group_attention(qkv, table, segments, heads, scale, path='avx512')


def error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


@needs_avx512
@pytest.mark.parametrize('heads', [1, 3])
@pytest.mark.parametrize('segments', [
    [(1, 1, 1)], [(2, 1, 9)], [(2, 9, 1)], [(3, 2, 16)], [(2, 33, 1)], [(1, 3, 17)],
    [(4, 7, 7), (2, 7, 3), (2, 4, 7), (1, 4, 3)], [(2, 25, 38)], [(1, 2, 150)]], ids=str)
def test_equals_plain_in_float64(segments, heads):
    """Groups of less than a tile of keys, of a whole one, of one more; rows of all lengths."""
    segments = [Segment(*segment) for segment in segments]
    qkv, table = random_inputs(segments, heads, DIM, torch.bfloat16, spare=1)
    table = table.float()
    out = attend(qkv, table, segments, heads, DIM**-.5)
    exact = plain_attention(qkv.double(), table.double(), segments, heads, DIM**-.5)
    assert out.dtype == torch.bfloat16 and out.shape == exact.shape
    assert error(out, exact) < 3e-3  # bfloat16 has eight bits
    assert ((out.double() - exact).abs() <= 8e-3 * exact.abs() + 6e-3).all()


@needs_avx512
def test_queries_keys_values_and_bias_all_matter():
    """What float64 says of one of them changed, the kernel says, too."""
    segments = [Segment(2, 5, 7)]
    qkv, table = random_inputs(segments, 2, DIM, torch.bfloat16)
    table, before = table.float(), None
    for part in (slice(0, 64), slice(64, 128), slice(128, 192), None):
        if part is None:
            table = table.flip(2)
        else:
            qkv[:, part] = qkv[:, part].flip(0)
        exact = plain_attention(qkv.double(), table.double(), segments, 2, DIM**-.5)
        out = attend(qkv, table, segments, 2, DIM**-.5)
        assert error(out, exact) < 3e-3
        assert before is None or error(out, before) > 0.1
        before = exact


@needs_avx512
@pytest.mark.parametrize('largest', [80., 3000., 1e30])
def test_large_logits_do_not_overflow(largest):
    segments = [Segment(3, 5, 6)]
    qkv, table = random_inputs(segments, 2, DIM, torch.bfloat16)
    table = table.float() * largest / table.float().abs().max()
    out = attend(qkv * .01, table, segments, 2, 1.)
    exact = plain_attention((qkv * .01).double(), table.double(), segments, 2, 1.)
    assert error(out, exact) < 3e-3


@needs_avx512
def test_what_is_not_finite_shows():
    segments = [Segment(2, 3, 4)]
    qkv, table = random_inputs(segments, 1, DIM, torch.bfloat16)
    qkv[3, 40] = float('nan')  # of a key of the first group
    out = attend(qkv, table.float(), segments, 1, 1.)
    assert out[:12].isnan().all() and out[12:].isfinite().all()


@needs_avx512
def test_values_do_not_depend_on_threads():
    segments = [Segment(5, 7, 7), Segment(2, 3, 7)]
    qkv, table = random_inputs(segments, 3, DIM, torch.bfloat16)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            outs.append(attend(qkv, table.float(), segments, 3, 1.))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@needs_avx512
def test_strides_make_no_difference():
    segments = [Segment(3, 4, 5)]
    qkv, table = random_inputs(segments, 2, DIM, torch.bfloat16)
    wide = torch.stack([qkv, -qkv], -1)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(attend(wide, table, segments, 2, 1.), attend(qkv, table, segments, 2, 1.))


@needs_avx512
def test_gradients_are_those_of_the_tiled_path():
    segments = [Segment(5, 7, 7), Segment(2, 3, 7)]
    qkv, table = random_inputs(segments, 2, DIM, torch.bfloat16)
    ours = values_and_gradients(attend, qkv, table.float(), segments, 2)
    tiled = values_and_gradients(tiled_attention, qkv, table.float(), segments, 2)
    exact = values_and_gradients(plain_attention, qkv.double(), table.double(), segments, 2)
    for mine, its, true in zip(ours, tiled, exact):
        assert mine.dtype == its.dtype
        assert error(mine, true) < max(1.1 * error(its, true), 3e-3)


@needs_avx512
@pytest.mark.parametrize('lda', ['interval', 'block', 'shifted'])
def test_backbone_takes_it_and_is_nearer_to_float64_than_without(small, lda):
    model, tiled = small(lda=lda), small(lda=lda, attention_path='tiled')
    exact = copy.deepcopy(model).double()
    image = torch.rand(2, 3, 150, 97)
    with torch.no_grad():
        expected = exact(image.double())
        with torch.autocast('cpu', torch.bfloat16):
            features, others = model(image), tiled(image)
    for ours, its, true in zip(features, others, expected):
        assert not torch.equal(ours, its)  # so it was another path
        assert error(ours, true) < 0.03 and error(ours, true) < 1.1 * error(its, true)


@needs_avx512
def test_compiler_takes_it_too(small, monkeypatch):
    torch.compiler.reset()
    calls, attend_avx512 = [], tiled.attend_avx512
    monkeypatch.setattr(tiled, 'attend_avx512',
                        lambda *args: (calls.append(1), attend_avx512(*args)))
    model = small(arch=dict(embed_dims=32, depths=(2,), num_heads=(1,)), merge_sizes=(),
                  group_size=(3,), interval=(2,), out_indices=(0,))
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    image = torch.rand(1, 3, 50, 70)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        one = compiled(image)[0]
        assert calls
        other = model(image)[0]
    assert one.dtype == torch.bfloat16
    torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@needs_avx512
def test_rule_takes_it_for_bfloat16_only():
    choose = dict(device=CPU, dropout=0., dtype=torch.bfloat16, head_dim=DIM)
    assert choose_path(**choose) == 'avx512'
    assert choose_path(**{**choose, 'dtype': torch.float32}) == 'tiled'
    assert choose_path(**{**choose, 'dtype': torch.float16}) == 'tiled'
    assert choose_path(**{**choose, 'head_dim': 16}) == 'tiled'
    assert choose_path(**{**choose, 'dropout': .1}) == 'plain'


@pytest.mark.parametrize('options, reason', [
    (dict(device=torch.device('cuda')), 'got tensors on cuda'),
    (dict(dropout=.5), 'attn_drop_rate is 0.5'),
    (dict(dtype=torch.float32), 'takes bfloat16, but got torch.float32'),
    (dict(head_dim=16), 'heads of 32 channels, but they have 16')])
def test_what_is_in_the_way_is_said(options, reason):
    assert reason in why_not(**options)


def test_forced_where_it_cannot_work_is_refused_in_one_sentence():
    model = CrossFormer(SMALL, attention_path='avx512')
    with pytest.raises(ValueError, match="attention_path='avx512'.*bfloat16.*float32.*'plain'"):
        model(torch.rand(1, 3, 32, 32))


def test_without_it_the_tiled_path_does_the_work(small, monkeypatch):
    monkeypatch.setattr(avx512, 'MISSING', 'it was not compiled')
    assert why_not() == 'it was not compiled'
    assert choose_path(CPU, 0., torch.bfloat16) == 'tiled'
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        features = small()(image), small(attention_path='tiled')(image)
    assert all(torch.equal(one, other) for one, other in zip(*features))


@needs_avx512
def test_it_was_compiled_here():
    """Else the tests above that need it would prove nothing of it."""
    assert why_not() == ''


def test_processes_that_fork_can_use_it_too():
    """As the workers of a data loader or of a test do, with PyTorch's threads already running."""
    program = '''
import os, sys, torch
from crossformer_mm import CrossFormer
torch.set_num_threads(2)
model = CrossFormer(dict(embed_dims=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))).eval()
def run():
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        return model(torch.ones(1, 3, 64, 64))[-1]
expected = run()
child = os.fork()
if not child:
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(run(), expected) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
'''
    done = subprocess.run([sys.executable, '-c', program], text=True, capture_output=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
