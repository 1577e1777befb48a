"""Promises of the Triton kernels alone: when they are chosen, how they are compiled and launched.

That they compute attention is tested in test_paths.py, for all kernels.
"""

import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from crossformer_mm import CrossFormer, kernels
from crossformer_mm.grouping import AxisRule, count_groups, fit_rule, group_axis, stage_rules
from crossformer_mm.kernels import Call, choose_path, describe_path, fused, self_test

from ..helpers import ONE_STAGE, ROOT
from .definition import GPU, assert_equals_definition, random_inputs, small_tiles
from .paths import lacks

if lacks('fused'):
    pytest.skip(lacks('fused'), allow_module_level=True)
from crossformer_mm.kernels import fused_triton, triton_backward, triton_launch  # noqa: E402


def assert_equals(shape, rows, columns, heads, dim):
    rules = AxisRule(rows, 1), AxisRule(columns, 1)
    inputs = random_inputs(shape, *rules, heads, dim, spare=1, device=GPU)
    assert_equals_definition('fused', inputs, *rules, heads, 0.3, tolerance=5e-6)


def test_the_tiles_as_they_are_equal_plain():
    assert_equals((1, 12, 13), 12, 13, heads=1, dim=8)


def test_biases_of_some_heads_at_a_time_equal_plain(monkeypatch):
    monkeypatch.setattr(triton_launch, 'TILES', small_tiles(triton_launch))
    monkeypatch.setattr(triton_launch, 'STRIP_BYTES', 2 * 4 * 2000)
    assert_equals((1, 9, 8), 9, 8, heads=3, dim=16)


def test_pairs_of_a_group_are_summed_some_rows_at_a_time(monkeypatch):
    """And over shares of the groups; memory stays below the limit."""
    monkeypatch.setattr(triton_launch, 'TILES', small_tiles(triton_launch))
    monkeypatch.setattr(triton_launch, 'PAIR_BYTES', 4 * 20 * 100)
    sum_pairs = mock.Mock(wraps=triton_backward.sum_pairs)
    monkeypatch.setattr(triton_backward, 'sum_pairs', sum_pairs)
    assert_equals((1, 9, 18), 9, 9, heads=1, dim=16)
    assert [call.args[0].shape for call in sum_pairs.mock_calls] == [(2, 1, 16, 96)] * 6


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
        by_arithmetic.append([*range(start, length, fitted.interval)][: fitted.size])
    assert sorted(by_arithmetic) == groups


def test_no_token_is_moved(monkeypatch):
    """No table of groups is made."""
    monkeypatch.setattr('crossformer_mm.grouping.group_axis', None)
    with torch.no_grad():
        backbone = CrossFormer(**ONE_STAGE, attention_path='fused').to(GPU)
        backbone(torch.rand(1, 3, 20, 17).to(GPU))


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has a GPU."""

    def build(capability=(9, 0), hip=None, triton=True, agrees=True):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'Some GPU')
        monkeypatch.setattr(torch.version, 'hip', hip)
        monkeypatch.setitem(
            kernels.PATHS,
            'fused',
            kernels.PATHS['fused']._replace(
                select=lambda call: ('fused' if agrees else 'plain', None)
            ),
        )
        if not triton:
            monkeypatch.setattr(fused, 'has_triton', lambda: False)
        return torch.device('cuda', 0)

    return build


def test_rule_takes_fused_on_gpus_that_triton_runs_on(gpu):
    device = gpu()
    assert choose_path(Call(device)) == 'fused'
    assert choose_path(Call(device, interception='compile')) == 'fused'
    assert choose_path(Call(device), 'plain') == 'plain'
    assert describe_path(Call(device, torch.bfloat16)) == 'fused on cuda:0 (bfloat16)'
    assert describe_path(Call(device), 'plain') == 'plain on cuda:0 (float32)'
    assert choose_path(Call(gpu(agrees=False))) == 'plain'


def assert_takes_plain(call, reason):
    assert choose_path(call) == 'plain'
    with pytest.raises(ValueError, match=f"attention_path='fused'.*{reason}.*'plain'"):
        choose_path(call, 'fused')


@pytest.mark.parametrize(
    'options, reason',
    [
        (dict(dropout=0.5), 'attn_drop_rate is 0.5'),
        (dict(head_dim=65), 'at most 64 channels, but they have 65'),
        (dict(dtype=torch.float64), 'got torch.float64'),
        (dict(has_lead=True), "lda='shifted'"),
        (dict(interception='export'), 'an exporter'),
    ],
)
def test_calls_that_fused_does_not_support_take_plain(gpu, options, reason):
    assert_takes_plain(Call(gpu(), **options), reason)


@pytest.mark.parametrize(
    'machine, reason',
    [
        (dict(capability=(7, 5)), 'compute capability 8.0 or more, but cuda:0 is Some GPU'),
        (dict(capability=(9, 4), hip='6.0'), 'it needs an NVIDIA GPU'),
        (dict(triton=False), 'it needs the package triton'),
    ],
)
def test_other_gpus_take_plain_and_the_log_says_why(gpu, machine, reason):
    call = Call(gpu(**machine), torch.float16)
    assert_takes_plain(call, reason)
    line = describe_path(call)
    assert line.startswith('plain on cuda:0 (float16), not fused: ') and reason in line


@pytest.mark.parametrize('small', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_pass_their_self_test_and_leave_random_numbers_alone(dtype, small):
    state = torch.get_rng_state()
    assert not self_test.Kind(GPU, dtype, 16, small).find_fault(trains=True)
    assert torch.equal(torch.get_rng_state(), state)  # a user's seed means what it meant


# 'privateuseone' is what an NPU is called until its package renames it.
@pytest.mark.parametrize('device', ['mps', 'xpu', 'privateuseone', 'hpu', 'meta'])
def test_line_for_the_log_names_other_devices(device):
    line = describe_path(Call(torch.device(device)))
    assert line.startswith(f'plain on {device} (float32), not fused: it works on CUDA devices')


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
    path = os.pathsep.join([str(ROOT), str(ROOT / 'benchmarks')])
    environment.update(TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=path)
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True
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
    for kernel, members in (('forward_groups', 49), ('forward', 950)):
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
    backbone = CrossFormer(**ONE_STAGE, attention_path='fused').eval().to(GPU)
    graphs = CompileCounter()
    compiled = torch.compile(backbone, backend=graphs, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for sides in ((41, 44), (60, 53), (36, 66), (55, 28)):
            image = torch.randn(1, 3, *sides).to(GPU)
            torch.testing.assert_close(compiled(image), backbone(image), rtol=1e-4, atol=1e-4)
        assert graphs.frame_count == 1
        compiled(torch.randn(1, 3, 12, 40).to(GPU))
    assert graphs.frame_count == 2
