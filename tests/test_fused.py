"""Fused attention equals the plain path, on a GPU or, where there is none, in Triton's interpreter.

The interpreter runs kernels in Python, one program after another, so maps are tiny here and
blocks are made small enough for groups to take several.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import library

from crossformer_mm import CrossFormer, kernels
from crossformer_mm.attention import GroupAttention
from crossformer_mm.compat import missing_torch
from crossformer_mm.grouping import AxisRule, count_groups, fit_rule, group_axis, stage_rules
from crossformer_mm.kernels import Call, choose_path, describe_path, fused, plain, self_test

from .older_torch import needs_interpreter

if missing_torch('2.4'):
    pytest.skip(
        'the Triton that has all that the kernels use came with PyTorch 2.4',
        allow_module_level=True,
    )
pytest.importorskip('triton', reason='fused attention needs the package triton')
pytestmark = needs_interpreter
from crossformer_mm.kernels import fused_triton, triton_backward, triton_launch  # noqa: E402

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
# Every kernel with several blocks each way, the two ways differing.
SMALL_BLOCKS = {
    (kernel, size): triton_launch.Tile(16, 32, 1, 1)
    if 'keys' not in kernel
    else triton_launch.Tile(32, 16, 1, 1)
    for kernel, size in triton_launch.TILES
}


def values_and_gradients(attention, qkv, table, *arguments):
    """Output and the gradients of qkv and table, for the same random output gradient."""
    qkv, table = qkv.clone().requires_grad_(), table.clone().requires_grad_()
    out = attention(qkv, table, *arguments)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(weight.to(out))
    return out.detach(), qkv.grad, table.grad


def random_inputs(shape, rows, columns, heads, dim, dtype, spare=1):
    batch, height, width = shape
    generator = torch.Generator().manual_seed(0)
    table_rows = 2 * (fit_rule(height, rows).size + spare) - 1
    table_columns = 2 * (fit_rule(width, columns).size + spare) - 1
    qkv = torch.randn(batch, height, width, 3 * heads * dim, generator=generator)
    table = torch.randn(heads, table_rows, table_columns, generator=generator)
    return qkv.to(DEVICE, dtype), table.to(DEVICE)


def assert_equals_plain(shape, rows, columns, heads=2, dim=16, dtype=torch.float32, scale=0.3):
    """In value and gradients, up to rounding in the dtype; float64 is the judge."""
    rows, columns = AxisRule(*rows), AxisRule(*columns)
    inputs = random_inputs(shape, rows, columns, heads, dim, dtype)
    ours = values_and_gradients(fused.attend, *inputs, rows, columns, heads, scale)
    assert [x.dtype for x in ours] == [dtype, dtype, torch.float32]
    exact = values_and_gradients(
        plain.attend, *(x.double() for x in inputs), rows, columns, heads, scale
    )
    tolerance = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    for name, one, other in zip(('out', 'grad of qkv', 'grad of table'), ours, exact):
        error = (one.double() - other).abs().max() / other.abs().max().clamp_min(1)
        assert error <= tolerance, f'{name}: {error:.1e}'


ONE_BLOCK = {
    'one member': ((1, 1, 1), (7, 1), (7, 1)),
    'short distance, ragged': ((2, 9, 11), (7, 1), (7, 1)),
    'long distance over the map, ragged': ((1, 7, 10), (3, 3), (4, 3)),
    'long distance in tiles, ragged': ((1, 8, 7), (3, 2), (3, 2)),
    'interval beyond the map': ((1, 2, 5), (1, 10**9), (5, 1)),
    'group beyond the map': ((1, 3, 5), (10**9, 1), (10**9, 1)),
}
SEVERAL_BLOCKS = {
    'short distance, ragged': ((1, 10, 9), (9, 1), (8, 1)),
    'long distance over the map, ragged': ((1, 13, 10), (13, 1), (5, 2)),
    'wider than high, ragged': ((1, 7, 23), (6, 1), (12, 2)),
    'one row': ((1, 1, 70), (1, 1), (70, 1)),
    'one column': ((1, 70, 1), (70, 1), (1, 1)),
}


@pytest.mark.parametrize('case', ONE_BLOCK)
def test_groups_of_one_block_equal_plain(case):
    assert_equals_plain(*ONE_BLOCK[case])


@pytest.mark.parametrize('case', SEVERAL_BLOCKS)
def test_groups_of_several_blocks_equal_plain(monkeypatch, case):
    monkeypatch.setattr(triton_launch, 'TILES', SMALL_BLOCKS)
    assert_equals_plain(*SEVERAL_BLOCKS[case], heads=1)


def test_the_tiles_as_they_are_equal_plain():
    assert_equals_plain((1, 12, 13), (12, 1), (13, 1), heads=1, dim=8)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('members', [25, 72])
def test_half_precision_stays_near_double(monkeypatch, dtype, members):
    if members > triton_launch.SMALL:
        monkeypatch.setattr(triton_launch, 'TILES', SMALL_BLOCKS)
        assert_equals_plain((1, 9, 8), (9, 1), (8, 1), heads=1, dtype=dtype)
    else:
        assert_equals_plain((1, 6, 9), (5, 1), (5, 1), dtype=dtype)


@pytest.mark.parametrize('dim', [3, 8, 24, 48, 64])
def test_any_head_dim_works(dim):
    assert_equals_plain((1, 4, 5), (3, 1), (3, 1), dim=dim)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_wide_heads_in_groups_of_several_blocks_equal_plain(monkeypatch, dtype):
    monkeypatch.setattr(triton_launch, 'WIDE_TILES', SMALL_BLOCKS)
    assert_equals_plain((1, 9, 8), (9, 1), (8, 1), heads=1, dim=40, dtype=dtype)


def test_biases_of_some_heads_at_a_time_equal_plain(monkeypatch):
    monkeypatch.setattr(triton_launch, 'TILES', SMALL_BLOCKS)
    monkeypatch.setattr(triton_launch, 'STRIP_BYTES', 2 * 4 * 2000)
    assert_equals_plain((1, 9, 8), (9, 1), (8, 1), heads=3)


@pytest.mark.parametrize('members', [(3, 4), (9, 8)])
def test_a_strided_table_is_read_where_it_lies(monkeypatch, members):
    monkeypatch.setattr(triton_launch, 'TILES', SMALL_BLOCKS)
    rows, columns = (AxisRule(size, 1) for size in members)
    qkv, table = random_inputs((1, *members), rows, columns, 2, 16, torch.float32)
    contiguous = fused.attend(qkv, table, rows, columns, 2, 0.3)
    strided = table.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    unaligned = torch.cat([table.new_zeros(1), table.flatten()])[1:].view(table.shape)
    for other in (strided, unaligned):
        assert torch.equal(fused.attend(qkv, other, rows, columns, 2, 0.3), contiguous)


def test_a_table_too_small_for_the_groups_is_refused():
    qkv, table = torch.zeros(1, 4, 4, 48), torch.zeros(1, 5, 7)
    with pytest.raises(ValueError, match='5 x 7 offsets is too small for groups of 16 members'):
        fused.attend(qkv, table, AxisRule(4, 1), AxisRule(4, 1), 1, 1.0)


def test_pairs_of_a_group_are_summed_some_rows_at_a_time(monkeypatch):
    """And over shares of the groups; memory stays below the limit."""
    monkeypatch.setattr(triton_launch, 'TILES', SMALL_BLOCKS)
    monkeypatch.setattr(triton_launch, 'PAIR_BYTES', 4 * 20 * 100)
    held = []
    sum_pairs = triton_backward.sum_pairs

    def watch(pairs, *arguments):
        held.append(tuple(pairs.shape))
        return sum_pairs(pairs, *arguments)

    monkeypatch.setattr(triton_backward, 'sum_pairs', watch)
    assert_equals_plain((1, 9, 18), (9, 1), (9, 1), heads=1)
    assert held == [(2, 1, 16, 96)] * 6


@pytest.mark.parametrize('members', [16, 72])
def test_logits_far_from_zero_overflow_nothing(monkeypatch, members):
    """Not even against the logits of what a block holds beyond the group, which are near 0."""
    monkeypatch.setattr(triton_launch, 'TILES', SMALL_BLOCKS)
    shape, rows, columns = (
        ((1, 6, 5), AxisRule(4, 1), AxisRule(4, 1))
        if members == 16
        else ((1, 9, 8), AxisRule(9, 1), AxisRule(8, 1))
    )
    qkv, table = random_inputs(shape, rows, columns, 1, 16, torch.float32)
    qkv[..., :16] = 5 + 0.1 * qkv[..., :16]
    qkv[..., 16:32] = -5 + 0.1 * qkv[..., 16:32]
    inputs = qkv, table, rows, columns, 1, 1.0
    ours = values_and_gradients(fused.attend, *inputs)
    exact = values_and_gradients(plain.attend, qkv.double(), table.double(), *inputs[2:])
    for one, other in zip(ours, exact):
        assert one.isfinite().all()
        assert (one - other).abs().max() <= 1e-3 * other.abs().max().clamp_min(1)


def test_same_inputs_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(triton_launch, 'TILES', SMALL_BLOCKS)
    rule = AxisRule(9, 1)
    inputs = random_inputs((1, 9, 8), rule, rule, 1, 16, torch.float32)
    first, second = (
        values_and_gradients(fused.attend, *inputs, rule, rule, 1, 1.0) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second))


def test_the_operator_keeps_the_rules_of_operators():
    """Its schema, shapes without data, and gradients, as torch.compile relies on them."""
    rule = AxisRule(3, 1)
    qkv, table = random_inputs((1, 3, 3), rule, rule, 1, 8, torch.float32)
    library.opcheck(
        torch.ops.crossformer_mm.fused_attention.default,
        (
            qkv.flatten(0, 2).requires_grad_(),
            table.requires_grad_(),
            [1, 3, 3],
            [3, 1, 0],
            [3, 1, 0],
            1,
            0.5,
        ),
    )


def test_compiler_takes_it_into_one_graph():
    """The choice of the path included."""
    attention = GroupAttention(16, 1, attention_path='fused').to(DEVICE)
    compiled = torch.compile(attention, backend='aot_eager', fullgraph=True)
    x, grads = torch.randn(1, 5, 6, 16).to(DEVICE), []
    for model in (attention, compiled):
        attention.zero_grad()
        model(x, AxisRule(3, 2), AxisRule(3, 2)).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in attention.parameters()])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


def test_second_derivative_is_refused():
    rule = AxisRule(2, 1)
    qkv, table = random_inputs((1, 2, 2), rule, rule, 1, 8, torch.float32)
    out = fused.attend(qkv.requires_grad_(), table, rule, rule, 1, 1.0)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match='no autograd formula|once_differentiable'):
        grad.sum().backward()


@pytest.mark.parametrize('length', [1, 2, 7, 16, 29])
@pytest.mark.parametrize('rule', [(1, 1), (7, 1), (3, 4), (4, 8), (50, 3), (3, 50)])
def test_arithmetic_of_groups_is_that_of_index_tables(length, rule):
    rule = AxisRule(*rule)
    fitted = fit_rule(length, rule)
    tables = [table.tolist() for table in group_axis(length, rule)]
    groups = sorted(group for table in tables for group in table)
    assert fitted.size == max(len(group) for group in groups)
    by_arithmetic = []
    for group in range(count_groups(length, fitted)):
        tile, residue = divmod(group, fitted.interval)
        start = tile * fitted.size * fitted.interval + residue
        by_arithmetic.append(
            [
                position
                for member in range(fitted.size)
                if (position := start + member * fitted.interval) < length
            ]
        )
    assert sorted(by_arithmetic) == groups


SMALL = dict(embed_dims=16, depths=(2, 2), num_heads=(1, 2))


def features_and_gradients(path, lda, image, with_cp=False):
    torch.manual_seed(0)
    model = CrossFormer(
        SMALL,
        merge_sizes=((2, 4),),
        group_size=(3, 3),
        interval=(2, 3),
        lda=lda,
        out_indices=(0, 1),
        with_cp=with_cp,
        attention_path=path,
    ).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape).to(DEVICE))
    features = model(image.to(DEVICE))
    generator = torch.Generator().manual_seed(1)
    sum((f * torch.randn(f.shape, generator=generator).to(f)).sum() for f in features).backward()
    return [f.detach() for f in features], {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    'lda, size, with_cp', [('interval', (1, 3, 27, 42), False), ('block', (1, 3, 31, 38), True)]
)
def test_backbone_is_the_same_on_both_paths(lda, size, with_cp):
    image = torch.rand(size, generator=torch.Generator().manual_seed(2))
    ours, ours_grads = features_and_gradients('fused', lda, image, with_cp)
    reference, reference_grads = features_and_gradients('plain', lda, image)
    for one, other in zip(ours, reference, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    largest = max(grad.abs().max() for grad in reference_grads.values())
    for name, grad in reference_grads.items():
        assert (ours_grads[name] - grad).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize('position_bias', ['relative', 'none'])
def test_other_position_biases_are_the_same_on_both_paths(position_bias):
    """A table that is resized, and one that is a single 0 seen everywhere."""
    x, found = torch.randn(1, 7, 10, 32).to(DEVICE), []
    for path in ('fused', 'plain'):
        torch.manual_seed(0)
        attention = GroupAttention(
            32, 2, attention_path=path, position_bias=position_bias, group_size=3
        )
        attention = attention.to(DEVICE)
        out = attention(x, AxisRule(4, 2), AxisRule(5, 2))
        out.square().sum().backward()
        found.append([out, *(parameter.grad for parameter in attention.parameters())])
    for ours, reference in zip(*found, strict=True):
        assert (ours - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_no_token_is_moved(monkeypatch):
    """No table of groups is made."""
    monkeypatch.setattr('crossformer_mm.grouping.group_axis', None)
    with torch.no_grad():
        CrossFormer(
            dict(embed_dims=16, depths=(2,), num_heads=(1,)),
            merge_sizes=(),
            group_size=(3,),
            interval=(2,),
            out_indices=(0,),
            attention_path='fused',
        ).to(DEVICE)(torch.rand(1, 3, 20, 17).to(DEVICE))


def test_autocast_trains_in_bfloat16_near_float32():
    torch.manual_seed(0)
    attention = GroupAttention(32, 2, attention_path='fused').to(DEVICE)
    x = torch.randn(1, 6, 5, 32).to(DEVICE)
    grads = []
    for enabled in (False, True):
        attention.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            out = attention(x, AxisRule(3, 2), AxisRule(3, 2))
            assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
            out.float().square().sum().backward()
        grads.append([p.grad.clone() for p in attention.parameters()])
    assert all(grad.dtype == torch.float32 for grad in grads[1])
    scale = max(grad.abs().max() for grad in grads[0])
    for exact, half in zip(*grads):
        assert (exact - half).abs().max() < 3e-2 * scale


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has a GPU."""

    def build(capability, hip=None, triton=True, agrees=True):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'Some GPU')
        monkeypatch.setattr(torch.version, 'hip', hip)
        monkeypatch.setitem(
            kernels.PATHS, 'fused', kernels.PATHS['fused']._replace(is_trusted=lambda call: agrees)
        )
        if not triton:
            monkeypatch.setattr(fused, 'has_triton', lambda: False)
        return torch.device('cuda', 0)

    return build


def test_rule_takes_fused_on_gpus_that_triton_runs_on(gpu):
    device = gpu((9, 0))
    assert choose_path(Call(device)) == 'fused'
    assert choose_path(Call(device, capture_mode='compile')) == 'fused'
    assert choose_path(Call(device, dropout=0.1)) == 'plain'
    assert choose_path(Call(device, torch.float64)) == 'plain'
    assert choose_path(Call(device, has_lead=True)) == 'plain'
    assert choose_path(Call(device, capture_mode='export')) == 'plain'
    assert choose_path(Call(device, head_dim=fused.HEAD_DIM + 1)) == 'plain'
    assert choose_path(Call(device), 'plain') == 'plain'


@pytest.mark.parametrize(
    'machine',
    [
        dict(capability=(7, 5)),
        dict(capability=(9, 4), hip='6.0'),
        dict(capability=(9, 0), triton=False),
        dict(capability=(9, 0), agrees=False),
    ],
)
def test_rule_takes_plain_on_other_gpus(gpu, machine):
    assert choose_path(Call(gpu(**machine))) == 'plain'


@pytest.mark.parametrize('small', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_pass_their_self_test_and_leave_random_numbers_alone(dtype, small):
    state = torch.get_rng_state()
    assert not self_test.find_fault(self_test.Kind(DEVICE, dtype, 16, small), trains=True)
    assert torch.equal(torch.get_rng_state(), state)  # a user's seed means what it meant


@pytest.mark.parametrize(
    'machine, reason',
    [
        (dict(capability=(7, 5)), 'compute capability 8.0 or more, but cuda:0 is Some GPU'),
        (dict(capability=(9, 4), hip='6.0'), 'it needs an NVIDIA GPU'),
        (dict(capability=(9, 0), triton=False), 'it needs the package triton'),
    ],
)
def test_line_for_the_log_says_why_plain_is_taken(gpu, machine, reason):
    line = describe_path(Call(gpu(**machine), torch.float16))
    assert line.startswith('plain on cuda:0 (float16), not fused: ') and reason in line


@pytest.mark.parametrize('device', ['mps', 'xpu', 'meta'])
def test_line_for_the_log_names_other_devices(device):
    line = describe_path(Call(torch.device(device)))
    assert line.startswith(f'plain on {device} (float32), not fused: it works on CUDA devices')


def test_line_for_the_log_names_the_path(gpu):
    device = gpu((9, 0))
    assert describe_path(Call(device, torch.bfloat16)) == 'fused on cuda:0 (bfloat16)'
    assert describe_path(Call(device), 'plain') == 'plain on cuda:0 (float32)'


@pytest.mark.parametrize(
    'machine, options, reason',
    [
        (dict(capability=(9, 0), triton=False), {}, 'triton, which is not installed'),
        (dict(capability=(7, 5)), {}, '8.0 or more, but cuda:0 is Some GPU'),
        (dict(capability=(9, 0)), dict(dropout=0.5), 'attn_drop_rate is 0.5'),
        (dict(capability=(9, 0)), dict(head_dim=96), 'at most 64 channels, but they have 96'),
        (dict(capability=(9, 0)), dict(dtype=torch.float64), 'got torch.float64'),
    ],
)
def test_fused_is_refused_where_it_cannot_work(gpu, machine, options, reason):
    with pytest.raises(ValueError, match=f"attention_path='fused'.*{reason}.*'plain'"):
        choose_path(Call(gpu(**machine), **options), 'fused')


def test_fused_is_refused_on_the_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(fused_triton, 'INTERPRETED', False)
    with pytest.raises(ValueError, match='works on CUDA devices.*TRITON_INTERPRET=1.*got.*cpu'):
        choose_path(Call(torch.device('cpu')), 'fused')


def test_groups_beyond_what_numbers_are_exact_for_are_refused():
    qkv = torch.empty(1, 2**11, 2**10, 3, device='meta')
    with pytest.raises(ValueError, match='at most 1048576 positions, got 2097152'):
        triton_launch.Groups.of(qkv, AxisRule(2**11, 1), AxisRule(2**10, 1))


def run_without_interpreter(tmp_path, *command: str) -> str:
    """Run a Python command for which Triton compiles, into a cache of its own; return its output."""
    environment = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'}
    folder = Path(__file__).parents[1]
    path = os.pathsep.join([str(folder), str(folder / 'benchmarks')])
    done = subprocess.run(
        [sys.executable, *command],
        env=environment | dict(TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=path),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    """Check what the interpreter does not: shapes of blocks, types, registers, shared memory."""
    options = '--dtypes fp16 --head-dims 32 --archs 90'.split()
    table = run_without_interpreter(tmp_path, 'benchmarks/compile_kernels.py', *options)
    rows = {line.split(' | ')[0][2:]: line[:-2].split(' | ')[5:] for line in table.splitlines()[1:]}
    assert len(rows) == 8
    for kernel, (_, stack, shared, warps, _) in rows.items():
        assert int(stack) <= 64 and int(shared) <= 99 * 1024 and int(warps) >= 8, kernel
    limits = dict(forward=400, backward_queries=700, backward_keys=700, backward_pairs=350)
    for kernel, limit in limits.items():
        assert int(rows[kernel][-1]) <= limit, kernel


COUNT_COMPILATIONS = """
import random
import torch
import triton
from crossformer_mm.grouping import stage_rules
from crossformer_mm.kernels import fused_triton
from stand_in_gpu import pretend

compiled = set()


def note(*, key, fn, **_):
    compiled.add((fn.name, str(key)))
    return True  # do not compile it

if hasattr(triton, 'knobs'):  # since Triton 3.4
    triton.knobs.runtime.jit_cache_hook = note
else:
    triton.runtime.jit.JITFunction.cache_hook = note
pretend(90)
draw = random.Random(0)
for _ in range(1000):
    stride, interval = draw.choice([(4, 8), (8, 4), (16, 2), (32, 1)])
    height, width = (-(-draw.randint(33, 1600) // stride) for _ in range(2))
    lda, heads = draw.choice(['interval', 'block']), draw.choice([3, 6, 24])
    qkv = torch.empty(
        draw.randint(1, 3), height, width, 96 * heads, dtype=torch.bfloat16, device='meta'
    )
    for rows, columns in stage_rules(height, width, 7, interval, lda):
        table = torch.empty(2 * rows.size - 1, 2 * columns.size - 1, heads, device='meta')
        arguments = table.permute(2, 0, 1), rows, columns, heads, 0.2
        out, norms = fused_triton.forward(qkv, *arguments)
        fused_triton.backward(out, qkv, arguments[0], out, norms, *arguments[1:])
print(len(compiled))
"""


def test_kernels_are_compiled_for_types_not_for_sizes(tmp_path):
    """1,000 sizes take eight kernels, two of them in three block sizes."""
    assert int(run_without_interpreter(tmp_path, '-c', COUNT_COMPILATIONS)) <= 12


def test_older_releases_of_triton_pipeline_nothing(monkeypatch):
    """They print an error for a loop with a branch."""
    monkeypatch.setattr(triton_launch, 'PIPELINES_BRANCHES', False)
    for members in (49, 950):
        kernel = 'forward_groups' if members == 49 else 'forward'
        assert triton_launch.choose_tile(kernel, members, torch.bfloat16, 32).stages == 1


class StandInKernel:
    """Stand-in for a JITFunction, which records its compilations and launches.

    Args:
        takes_constants (bool): whether a compiled kernel wants them at its launch; None: nobody
            can tell how it is launched.
    """

    __name__ = 'some_kernel'

    def __init__(self, takes_constants):
        self.takes_constants, self.launches = takes_constants, []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launch('ordinary', grid, arguments)

    def launch(self, way, grid, arguments):
        self.launches.append((way, grid, arguments))
        names = 'abcd' if self.takes_constants else 'abc'
        if self.takes_constants is None:
            return object()
        launch, source = self.launch, SimpleNamespace(signature=dict.fromkeys(names))

        class Compiled:
            src = source

            def __getitem__(self, grid):
                return lambda *arguments: launch('direct', grid, arguments)

        return Compiled()


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.setattr(triton_launch, 'COMPILED', {})

    def run(kernel, tensor, number=7, constant=64):
        tile = triton_launch.Tile(64, 64, 4, 1)
        triton_launch.launch(kernel, 3, [tensor], (0.5, number), (constant,), tile)
        return kernel.launches[-1]

    return run


@pytest.mark.parametrize('takes_constants', [True, False])
def test_a_compiled_kernel_is_launched_directly(launch, takes_constants):
    kernel, tensor = StandInKernel(takes_constants), torch.zeros(8)
    assert launch(kernel, tensor) == ('ordinary', (3,), (tensor, 0.5, 7, 64))
    rest = (64,) if takes_constants else ()
    assert launch(kernel, tensor, 9) == ('direct', (3, 1, 1), (tensor, 0.5, 9, *rest))
    # Triton would compile each of these anew.
    for arguments in ((tensor[1:],), (tensor.double(),), (tensor, 7, 32), (tensor, 2**31)):
        assert launch(kernel, *arguments)[0] == 'ordinary', arguments
    assert launch(kernel, tensor, 2**31)[0] == 'ordinary'


def test_a_kernel_that_cannot_be_launched_directly_is_launched_by_triton(launch):
    kernel, tensor = StandInKernel(None), torch.zeros(8)
    assert [launch(kernel, tensor)[0] for _ in range(3)] == ['ordinary'] * 3


def test_this_triton_lets_compiled_kernels_be_launched_directly(tmp_path):
    script = """
import torch
from crossformer_mm.grouping import AxisRule
from crossformer_mm.kernels import fused_triton, triton_launch
from stand_in_gpu import StandInDriver, pretend

pretend(90)
launches = []
StandInDriver.launcher_cls = lambda self, source, metadata: lambda *rest: launches.append(rest[9:])
rule = AxisRule(4, 1)
table = torch.zeros(1, 7, 7)
for side in (4, 4, 9):
    fused_triton.forward(torch.zeros(1, side, side, 48), table, rule, rule, 1, 0.5)
(compiled, rest), = triton_launch.COMPILED.values()
assert len(launches) == 3 and len({len(arguments) for arguments in launches}) == 1
assert launches[0][4:] == launches[1][4:] != launches[2][4:]
"""
    run_without_interpreter(tmp_path, '-c', script)


def test_package_does_not_import_triton():
    done = subprocess.run(
        [sys.executable, '-c', 'import sys, crossformer_mm; sys.exit(\'triton\' in sys.modules)'],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_rules_of_both_definitions_reach_the_kernels():
    """Groups at detection size are within the limits."""
    for lda in ('interval', 'block'):
        for side, interval in ((200, 8), (100, 4), (50, 2), (25, 1)):
            width = -(-side * 1333 // 800)
            for rules in stage_rules(side, width, 7, interval, lda):
                qkv = torch.empty(2, side, width, 3, device='meta')
                assert triton_launch.Groups.of(qkv, *rules).members <= triton_launch.MEMBERS_LIMIT


def test_compiler_makes_one_graph_for_images_of_many_sizes():
    """Sides stay symbolic where no token moves; only a map too small for G is another case."""
    backbone = (
        CrossFormer(
            dict(embed_dims=16, depths=(2,), num_heads=(1,)),
            group_size=(3,),
            interval=(2,),
            merge_sizes=(),
            out_indices=(0,),
            attention_path='fused',
        )
        .eval()
        .to(DEVICE)
    )
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(backbone, backend=count, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for sides in ((41, 44), (60, 53), (36, 66), (55, 28)):
            image = torch.randn(1, 3, *sides).to(DEVICE)
            torch.testing.assert_close(compiled(image), backbone(image), rtol=1e-4, atol=1e-4)
        assert len(graphs) == 1
        compiled(torch.randn(1, 3, 12, 40).to(DEVICE))
    assert len(graphs) == 2
