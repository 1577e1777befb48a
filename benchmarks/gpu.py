"""Everything that wants a GPU, in one call: is fused attention right there, and how fast?

    python benchmarks/gpu.py --out benchmarks/results/gpu.json

takes less than 8 minutes and needs PyTorch with CUDA, Triton and einops. mmengine and mmcv are
used if they can be imported; otherwise stand-ins of a few lines take their place, for the
backbone needs little of them to run. Swin-T is MMDetection's, else torchvision's, else timm's.

Sections, each with its own time limit and none hindered by the failure of another:
  check       fused attention against float64, values and gradients
  tune        tiles of each kernel; prints the table for crossformer_mm/kernels/fused_triton.py
  attention   each layer's attention: fused, plain, scaled_dot_product_attention with a bias, and
              how its time compares with what its own bytes and FLOPs need
  flex        the same with FlexAttention, values and gradient of the captured table included
  backbone    a training step (forward and backward) of CrossFormer-S, of the plain mask-and-pad
              formulation of tests/oracle.py, and of Swin-T: time and peak memory
  profile     which kernels a training step spends its time in

--smoke runs all of it on the CPU in Triton's interpreter, on sizes that tell nothing.
"""

import argparse
import contextlib
import importlib.abc
import importlib.machinery
import json
import math
import os
import statistics
import sys
import time
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = dict(check=80, tune=120, attention=50, flex=80, backbone=90, profile=20)  # seconds
TOTAL = 440


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/gpu.json'),
        help='where to write the figures (default: %(default)s)',
    )
    parser.add_argument('--sections', nargs='+', choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        '--bandwidth',
        type=float,
        default=4.8e12,
        help='bytes per second of the memory (default: an H200, %(default)s)',
    )
    parser.add_argument(
        '--flops',
        type=float,
        default=790e12,
        help='bf16 FLOPs per second within reach (default: an H200, %(default)s)',
    )
    parser.add_argument('--image', type=int, nargs=2, default=(800, 1216), metavar=('H', 'W'))
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument(
        '--smoke', action='store_true', help='on the CPU, tiny: does the script run to its end?'
    )
    return parser.parse_args()


OPTIONS = parse() if __name__ == '__main__' else None
if OPTIONS and OPTIONS.smoke:
    os.environ['TRITON_INTERPRET'] = '1'  # read when Triton is imported
    OPTIONS.image, OPTIONS.batch = (20, 24), 1

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402


class DropPath(nn.Module):
    """mmcv's, without dropping."""

    def __init__(self, probability: float):
        super().__init__()
        if probability:
            raise NotImplementedError('the stand-in for mmcv drops no paths')

    def forward(self, x):
        return x


class BaseModule(nn.Module):
    """mmengine's, as far as running a model needs it."""

    def __init__(self, init_cfg=None):
        super().__init__()
        self.init_cfg = init_cfg


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of a package that is not installed: the names below, and empty classes."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name, path, target=None):
        if name.split('.')[0] == self.package:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__version__ = '999.0'  # new enough
        registry = types.SimpleNamespace(register_module=lambda: lambda cls: cls)
        known = dict(
            BaseModule=BaseModule,
            DropPath=DropPath,
            MODELS=registry,
            HOOKS=registry,
            MODULE2PACKAGE={},
        )

        def lookup(name):
            if name.startswith('__'):
                raise AttributeError(name)
            return known.get(name, type(name, (), {}))

        module.__getattr__ = lookup
        return module

    def exec_module(self, module):
        pass


def import_package() -> list:
    """Import crossformer_mm; the packages that stand-ins took the place of."""
    missing = []
    for package, needed in (('mmengine', 'mmengine.registry'), ('mmcv', 'mmcv.cnn.bricks')):
        try:
            importlib.import_module(needed)
        except Exception:  # it may be there, and broken for want of what it needs
            for name in [name for name in sys.modules if name.split('.')[0] == package]:
                del sys.modules[name]
            sys.meta_path.insert(0, StandIns(package))
            missing.append(package)
    if missing:  # what trains asks more of them, and nothing here trains
        sys.modules['crossformer_mm.engine'] = types.ModuleType('crossformer_mm.engine')
    try:
        import triton  # noqa: F401

        import crossformer_mm  # noqa: F401
    except ModuleNotFoundError as error:
        sys.exit(
            f'error: {error.name} is not installed; benchmarks/gpu.py needs PyTorch, Triton '
            'and einops'
        )
    return missing


sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
STAND_INS = import_package()

import triton  # noqa: E402
import triton.testing  # noqa: E402
from oracle import plain_features  # noqa: E402

from crossformer_mm import CrossFormer  # noqa: E402
from crossformer_mm.compat import missing_torch  # noqa: E402
from crossformer_mm.grouping import AxisRule, fit_rule, group_map, stage_rules  # noqa: E402

if missing_torch('2.4'):
    sys.exit(f"error: benchmarks/gpu.py: {missing_torch('2.4')}.")
from crossformer_mm.kernels import fused, fused_triton, plain  # noqa: E402
from crossformer_mm.position_bias import bias_of_pairs  # noqa: E402

Tile = fused_triton.Tile
DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}
# Stages of CrossFormer-S: stride of the map, heads, interval, blocks.
STAGES = ((4, 3, 8, 2), (8, 6, 4, 2), (16, 12, 2, 6), (32, 24, 1, 2))
HEAD_DIM, GROUP = 32, 7
if OPTIONS and OPTIONS.smoke:
    STAGES, HEAD_DIM, GROUP = ((4, 1, 2, 2), (8, 1, 1, 2)), 8, 3


class Bench:
    """The device, the clock, and the figures so far."""

    def __init__(self, options):
        self.options, self.smoke = options, options.smoke
        self.device = torch.device('cpu' if options.smoke else 'cuda')
        self.start = self.deadline = time.perf_counter()
        gpu = 'none' if self.smoke else torch.cuda.get_device_name()
        self.results = dict(
            command=' '.join(['python', *sys.argv]),
            gpu=gpu,
            torch=torch.__version__,
            triton=triton.__version__,
            stand_ins=STAND_INS,
            bandwidth=options.bandwidth,
            flops=options.flops,
            image=list(options.image),
            batch=options.batch,
            sections={},
        )
        print(
            f'GPU {gpu}, torch {torch.__version__}, triton {triton.__version__}, stand-ins for: '
            f"{', '.join(STAND_INS) or 'nothing'}",
            flush=True,
        )

    def run(self, name: str) -> None:
        section = self.results['sections'][name] = dict(rows=[])
        began = time.perf_counter()
        self.deadline = min(began + SECTIONS[name], self.start + TOTAL)
        print(f'\n== {name}', flush=True)
        try:
            globals()[f'run_{name}'](self, section['rows'])
        except Exception as error:
            section['error'] = f'{type(error).__name__}: {error}'
            traceback.print_exc()
        section['seconds'] = round(time.perf_counter() - began, 1)
        print(f"   {section['seconds']} s", flush=True)
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        self.options.out.write_text(json.dumps(self.results, indent=1) + '\n')
        if not self.smoke:
            torch.cuda.empty_cache()

    def in_time(self, what: str) -> bool:
        """Whether the section has time left; says what is left out otherwise."""
        if time.perf_counter() < self.deadline:
            return True
        print(f'   no time left for {what}', flush=True)
        return False

    def milliseconds(self, function, effort: int = 60) -> float:
        """Median time of a call, the cache flushed before each."""
        if self.smoke:
            began = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - began)
        return triton.testing.do_bench(
            function, warmup=effort // 3, rep=effort, return_mode='median'
        )

    def randn(self, *shape, dtype=torch.float32):
        return torch.randn(*shape, device=self.device).to(dtype)


def add(table: list, **figures) -> None:
    """Keep and print a row."""
    table.append(figures)
    print(
        '   '
        + '  '.join(
            f'{key} {value:.4g}' if isinstance(value, float) else f'{key} {value}'
            for key, value in figures.items()
            if value is not None
        ),
        flush=True,
    )


def value_and_gradients(attention, qkv, table, grad, *arguments):
    qkv, table = qkv.detach().requires_grad_(), table.detach().requires_grad_()
    out = attention(qkv, table, *arguments)
    return (out.detach(), *torch.autograd.grad(out, (qkv, table), grad.to(out.dtype)))


def table_for(bench, height, width, rows, columns, heads):
    return bench.randn(
        heads, 2 * fit_rule(height, rows).size - 1, 2 * fit_rule(width, columns).size - 1
    )


def errors(ours, exact) -> dict:
    """Relative to the largest exact number, or to 1."""
    return {
        name: float(
            (one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1)
        )
        for name, one, other in zip(('value', 'grad_qkv', 'grad_table'), ours, exact)
    }


# ---------------------------------------------------------------------------------- check
def run_check(bench: Bench, rows: list) -> None:
    """Relative to the largest exact value; float64 on the same device is the judge."""
    cases = [  # map, rule of rows, rule of columns, heads, head_dim
        ((2, 37, 52), (7, 1), (7, 1), 3, 32),
        ((2, 36, 54), (5, 8), (7, 8), 3, 32),
        ((1, 50, 76), (25, 2), (38, 2), 12, 32),
        ((2, 60, 45), (7, 4), (7, 4), 6, 32),
        ((1, 25, 38), (25, 1), (38, 1), 4, 64),
        ((1, 41, 33), (14, 1), (14, 1), 2, 24),
        ((3, 20, 20), (3, 1), (3, 1), 2, 16),
        ((1, 9, 300), (5, 2), (150, 2), 1, 8),
        ((1, 1, 1), (7, 1), (7, 1), 2, 32),
    ]
    if bench.smoke:
        cases = [((1, 5, 6), (3, 2), (3, 2), 1, 8)]
    tolerance = dict(fp32=1e-5, fp16=3e-3, bf16=2e-2)
    for number, (shape, row_rule, column_rule, heads, dim) in enumerate(cases):
        row_rule, column_rule = AxisRule(*row_rule), AxisRule(*column_rule)
        for name in ('fp32', 'bf16', 'fp16')[: 3 if number < 4 else 2]:
            if not bench.in_time(f'{shape} {name}'):
                return
            qkv = bench.randn(*shape, 3 * heads * dim, dtype=DTYPES[name])
            grad = bench.randn(*shape, heads * dim, dtype=DTYPES[name])
            table = table_for(bench, *shape[1:], row_rule, column_rule, heads)
            arguments = row_rule, column_rule, heads, dim**-0.5
            ours = value_and_gradients(fused.attend, qkv, table, grad, *arguments)
            again = value_and_gradients(fused.attend, qkv, table, grad, *arguments)
            exact = value_and_gradients(
                plain.attend, qkv.double(), table.double(), grad.double(), *arguments
            )
            found = errors(ours, exact)
            add(
                rows,
                map='x'.join(map(str, shape)),
                rows=tuple(row_rule),
                columns=tuple(column_rule),
                heads=heads,
                head_dim=dim,
                dtype=name,
                **found,
                same_bits=all(torch.equal(one, other) for one, other in zip(ours, again)),
                passed=max(found.values()) <= tolerance[name],
            )
    if not bench.smoke and bench.in_time('a map of more than 2^31 numbers'):
        check_large_map(bench, rows)


def check_large_map(bench: Bench, rows: list) -> None:
    """The last group of a map whose numbers cannot be counted in 32 bits, against a crop."""
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        print('   not enough memory for a map of more than 2^31 numbers', flush=True)
        return
    rule, side, start = AxisRule(7, 1), 4100, 4095  # the crop is the last group, of 5x5
    corner = (slice(None), slice(start, None), slice(start, None))
    qkv = torch.zeros(1, side, side, 192, device=bench.device, dtype=torch.bfloat16)
    grad = torch.zeros(1, side, side, 64, device=bench.device, dtype=torch.bfloat16)
    qkv[corner], grad[corner] = (bench.randn(*x[corner].shape) for x in (qkv, grad))
    table = bench.randn(2, 13, 13)
    arguments = rule, rule, 2, 0.2
    out, grad_qkv, grad_table = value_and_gradients(fused.attend, qkv, table, grad, *arguments)
    exact = value_and_gradients(
        plain.attend, qkv[corner].double(), table.double(), grad[corner].double(), *arguments
    )
    found = errors((out[corner], grad_qkv[corner], grad_table), exact)
    add(
        rows,
        map=f'1x{side}x{side}',
        numbers=qkv.numel(),
        dtype='bf16',
        **found,
        passed=max(found.values()) <= 2e-2,
    )


# ----------------------------------------------------------------------------------- tune
CANDIDATES = {
    ('forward', 2): [
        (64, 64, 4, 2),
        (64, 64, 4, 1),
        (64, 64, 4, 3),
        (64, 32, 4, 3),
        (64, 32, 4, 1),
        (128, 64, 8, 2),
        (128, 64, 4, 2),
        (128, 32, 4, 1),
        (128, 32, 4, 3),
        (128, 128, 8, 2),
    ],
    ('backward_queries', 2): [
        (64, 64, 4, 1),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 32, 4, 2),
        (64, 32, 4, 1),
        (128, 64, 8, 2),
        (128, 32, 4, 1),
        (128, 32, 4, 2),
    ],
    ('backward_keys', 2): [
        (64, 64, 4, 2),
        (64, 64, 4, 1),
        (64, 64, 4, 3),
        (32, 64, 4, 2),
        (32, 64, 4, 3),
        (64, 128, 8, 2),
        (32, 128, 4, 1),
        (32, 128, 8, 2),
    ],
    ('backward_pairs', 2): [
        (64, 64, 8, 1),
        (64, 64, 4, 1),
        (64, 64, 4, 2),
        (64, 32, 4, 2),
        (64, 64, 8, 2),
        (128, 64, 8, 1),
    ],
    ('forward', 4): [(64, 64, 8, 1), (64, 32, 4, 1), (32, 32, 4, 2)],
    ('backward_queries', 4): [(64, 32, 4, 1), (32, 32, 4, 2), (32, 32, 4, 1)],
    ('backward_keys', 4): [(32, 64, 8, 1), (32, 32, 4, 1), (32, 32, 4, 2)],
    ('backward_pairs', 4): [(64, 64, 8, 1), (32, 64, 8, 1), (32, 32, 4, 1)],
}
SMALL_CANDIDATES = {
    ('forward', 2): [(4, 1), (4, 2), (2, 1), (8, 1)],
    ('backward_groups', 2): [(4, 2), (4, 1), (4, 3), (8, 2)],
    ('forward', 4): [(8, 1), (4, 1), (16, 1)],
    ('backward_groups', 4): [(8, 1), (8, 2), (16, 1)],
}


@contextlib.contextmanager
def timed_launches(bench: Bench, times: dict, refused: dict):
    """Every launch of a kernel is repeated, and its time added to ``times[kernel]``.

    ``refused[kernel]`` says why it did not run: a tile may ask for more than the device has.
    """
    launch = fused_triton.launch

    def timed(kernel, *arguments):
        name = kernel.__name__.removesuffix('_kernel')
        try:
            took = bench.milliseconds(lambda: launch(kernel, *arguments), effort=15)
        except Exception as error:
            took = math.inf
            refused[name] = str(error).split('\n')[0]
        times[name] = times.get(name, 0.0) + took

    fused_triton.launch = timed
    try:
        yield
    finally:
        fused_triton.launch = launch


def run_tune(bench: Bench, rows: list) -> None:
    """Each kernel's tiles on the layers of the largest and of the deepest stage."""
    for dtype in (torch.bfloat16, torch.float32):
        for small in (False, True):
            candidates = SMALL_CANDIDATES if small else CANDIDATES
            chosen = fused_triton.SMALL_TILES if small else fused_triton.TILES
            kernels = {
                kernel: tiles
                for (kernel, size), tiles in candidates.items()
                if size == dtype.itemsize
            }
            layers = [
                layer
                for layer in layers_of(bench, dtype)
                if layer['stage'] in (0, 2) and (layer['kind'] == 'short') == small
            ]
            if bench.smoke:
                kernels = {kernel: tiles[:1] for kernel, tiles in kernels.items()}
                fused_triton.SMALL = 64 if small else 8
            found = {kernel: {} for kernel in kernels}
            for turn in range(max(map(len, kernels.values()))):
                if not bench.in_time(f'{dtype} tiles from number {turn}'):
                    break
                before, times, refused = dict(chosen), {}, {}
                for kernel, tiles in kernels.items():
                    if turn < len(tiles):
                        tile = tiles[turn] if small else Tile(*tiles[turn])
                        chosen[kernel, dtype.itemsize] = tile
                try:
                    with timed_launches(bench, times, refused):
                        for layer in layers:
                            out, norms = fused_triton.forward(
                                layer['qkv'], layer['table'], *layer['arguments']
                            )
                            fused_triton.backward(
                                layer['grad'],
                                layer['qkv'],
                                layer['table'],
                                out,
                                norms,
                                *layer['arguments'],
                            )
                finally:
                    chosen.update(before)
                for kernel, tiles in kernels.items():
                    if turn < len(tiles):
                        found[kernel][tiles[turn]] = times[kernel]
                        add(
                            rows,
                            kernel=kernel,
                            dtype=str(dtype)[6:],
                            groups='small' if small else 'large',
                            tile=tiles[turn],
                            ms=times[kernel] if kernel not in refused else None,
                            refused=refused.get(kernel),
                        )
            for kernel, times in found.items():
                if times:
                    best = min(times, key=times.get)
                    chosen[kernel, dtype.itemsize] = best if small else Tile(*best)
    print('   The best, which the sections after this one use:', flush=True)
    for name, tiles in (('TILES', fused_triton.TILES), ('SMALL_TILES', fused_triton.SMALL_TILES)):
        print(f'   {name} = {{')
        for key, tile in tiles.items():
            print(f"       {key!r}: {'Tile' if name == 'TILES' else ''}{tuple(tile)},")
        print('   }', flush=True)


# ------------------------------------------------------------------------------ attention
def layers_of(bench: Bench, dtype, lda: str = 'interval'):
    """Inputs of the two kinds of attention in each stage, one after another."""
    for stage, (stride, heads, interval, depth) in enumerate(STAGES):
        height, width = (-(-side // stride) for side in bench.options.image)
        both = stage_rules(height, width, GROUP, interval, lda)
        for kind, rules in zip(('short', 'long'), both):
            qkv = bench.randn(bench.options.batch, height, width, 3 * heads * HEAD_DIM, dtype=dtype)
            yield dict(
                stage=stage,
                kind=kind,
                depth=depth // 2,
                heads=heads,
                qkv=qkv,
                grad=bench.randn(*qkv.shape[:3], heads * HEAD_DIM, dtype=dtype),
                table=table_for(bench, height, width, *rules, heads),
                arguments=(*rules, heads, HEAD_DIM**-0.5),
            )


def forward_and_backward(bench: Bench, attention, qkv, table, grad) -> tuple:
    """Milliseconds of ``attention(qkv, table)`` and of its gradients, and its bytes kept."""
    qkv, table = qkv.detach().requires_grad_(), table.detach().requires_grad_()
    out = attention(qkv, table)
    backward = bench.milliseconds(
        lambda: torch.autograd.grad(out, (qkv, table), grad, retain_graph=True)
    )
    with torch.no_grad():
        forward = bench.milliseconds(lambda: attention(qkv, table))
    return forward, backward


def needs(bench: Bench, layer: dict, groups) -> tuple:
    """Milliseconds that the bytes and FLOPs of forward and backward take at full speed.

    Forward: qkv is read, the output written; two products. Backward: qkv, output and its
    gradient are read, the gradient of qkv written; five products. Whichever takes longer.
    """
    qkv, grad = layer['qkv'], layer['grad']
    batch = len(qkv)
    pairs = batch * sum(table.shape[0] * table[0].numel() ** 2 for table in groups)
    product = 2 * pairs * layer['heads'] * HEAD_DIM
    return tuple(
        1e3 * max(size / bench.options.bandwidth, products * product / bench.options.flops)
        for size, products in ((qkv.nbytes + grad.nbytes, 2), (2 * qkv.nbytes + 2 * grad.nbytes, 5))
    )


def run_attention(bench: Bench, rows: list) -> None:
    """bfloat16, as in training with AMP; the table in float32."""
    totals = {}
    for layer in layers_of(bench, torch.bfloat16 if not bench.smoke else torch.float32):
        name = f"stage {layer['stage'] + 1} {layer['kind']}"
        if not bench.in_time(name):
            return
        qkv, table, grad, arguments = (layer[key] for key in ('qkv', 'table', 'grad', 'arguments'))
        groups = group_map(*qkv.shape[1:3], *arguments[:2], qkv.device)
        heads, scale = arguments[2:]
        count, height, width = max(groups, key=torch.numel).shape
        count *= len(qkv)

        def on_full_groups(qkv, table):
            """Bare scaled_dot_product_attention, on groups lined up before and of one size."""
            tokens = count * height * width
            q, k, v = (
                qkv.flatten(0, 2)[:tokens]
                .view(count, -1, 3, heads, HEAD_DIM)
                .permute(2, 0, 3, 1, 4)
            )
            bias = bias_of_pairs(table, height, width)[None].to(q.dtype)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

        tokens = count * height * width
        grad_of_full = (
            grad.flatten(0, 2)[:tokens]
            .view(count, -1, heads, HEAD_DIM)
            .transpose(1, 2)
            .contiguous()
        )
        ideal = needs(bench, layer, groups)
        for way, attention, grads in (
            ('fused', lambda q, t: fused.attend(q, t, *arguments), grad),
            ('plain', lambda q, t: plain.attend(q, t, *arguments), grad),
            ('sdpa', on_full_groups, grad_of_full),
        ):
            try:
                forward, backward = forward_and_backward(bench, attention, qkv, table, grads)
            except torch.OutOfMemoryError as error:
                print(f'   {name} {way}: {error}'.split('\n')[0], flush=True)
                continue
            add(
                rows,
                layer=name,
                way=way,
                members=height * width,
                forward_ms=forward,
                backward_ms=backward,
                needed_forward_ms=ideal[0],
                needed_backward_ms=ideal[1],
                ratio=(forward + backward) / sum(ideal),
            )
            total = totals.setdefault(way, [0.0, 0.0, 0.0, 0.0])
            for index, figure in enumerate((forward, backward, *ideal)):
                total[index] += layer['depth'] * figure
    for way, (forward, backward, *ideal) in totals.items():
        add(
            rows,
            layer='all of CrossFormer-S',
            way=way,
            forward_ms=forward,
            backward_ms=backward,
            needed_forward_ms=ideal[0],
            needed_backward_ms=ideal[1],
            ratio=(forward + backward) / sum(ideal),
        )
    print(
        "   sdpa: without lining tokens up, and only the largest run of equal groups (its share "
        'of the ratio is therefore too good)',
        flush=True,
    )


# ----------------------------------------------------------------------------------- flex
def run_flex(bench: Bench, rows: list) -> None:
    """FlexAttention on full groups, its bias read from a captured table that has a gradient."""
    from torch.nn.attention.flex_attention import flex_attention

    dtype = torch.float32 if bench.smoke else torch.bfloat16
    # groups, height, width, heads: short distance of stage 1, long distance of stages 1 and 3.
    shapes = [(2 * 28 * 43, 7, 7, 3), (2 * 64, 25, 38, 3), (2 * 4, 25, 38, 12)]
    for groups, height, width, heads in [(2, 3, 3, 1)] if bench.smoke else shapes:
        if not bench.in_time(f'{height}x{width}'):
            return
        torch.compiler.reset()  # or the limit of recompilations would count all shapes together
        members = height * width
        # Groups side by side on one map are what fused attention sees for an interval of 1.
        qkv = bench.randn(groups, height, width, 3 * heads * HEAD_DIM, dtype=dtype)
        grad = bench.randn(groups, height, width, heads * HEAD_DIM, dtype=dtype)
        table = bench.randn(heads, 2 * height - 1, 2 * width - 1)
        scale, rules = HEAD_DIM**-0.5, (AxisRule(height, 1), AxisRule(width, 1))
        compiled = flex_attention if bench.smoke else torch.compile(flex_attention, dynamic=False)

        def flex(qkv, table):
            q, k, v = qkv.view(groups, members, 3, heads, HEAD_DIM).permute(2, 0, 3, 1, 4)

            def bias(score, group, head, query, key):
                row = query // width - key // width + height - 1
                column = query % width - key % width + width - 1
                return score + table[head, row, column]

            out = compiled(
                q.contiguous(), k.contiguous(), v.contiguous(), score_mod=bias, scale=scale
            )
            return out.transpose(1, 2).reshape(groups, height, width, -1)

        def fused_of_map(qkv, table):
            return fused.attend(qkv, table, *rules, heads, scale)

        exact = value_and_gradients(
            plain.attend, qkv[:2].double(), table.double(), grad[:2].double(), *rules, heads, scale
        )
        for way, attention in (('fused', fused_of_map), ('flex', flex)):
            row = dict(way=way, groups=groups, members=members, heads=heads)
            try:
                began = time.perf_counter()
                forward, backward = forward_and_backward(bench, attention, qkv, table, grad)
                row.update(
                    forward_ms=forward,
                    backward_ms=backward,
                    first_call_s=time.perf_counter() - began,
                )
                only = torch.zeros_like(grad)
                only[:2] = grad[:2]
                ours = value_and_gradients(attention, qkv, table, only)
                row.update(errors((ours[0][:2], ours[1][:2], ours[2]), exact))
            except Exception as error:
                row['error'] = f'{type(error).__name__}: {error}'.split('\n')[0][:300]
            add(rows, **row)


# ------------------------------------------------------------------------------- backbone
def swin_of_mmdet() -> nn.Module:
    from mmdet.models.backbones.swin import SwinTransformer

    return SwinTransformer(drop_path_rate=0.0)


def swin_of_torchvision() -> nn.Module:
    from torchvision.models import swin_transformer

    class Swin(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = swin_transformer.swin_t(stochastic_depth_prob=0.0).features

        def forward(self, x):
            features = []
            for index, layer in enumerate(self.layers):  # embedding, stage, merging, stage ...
                x = layer(x)
                if index % 2:
                    features.append(x)
            return features

    return Swin()


def swin_of_timm() -> nn.Module:
    import timm

    return timm.create_model(
        'swin_tiny_patch4_window7_224',
        features_only=True,
        strict_img_size=False,
        drop_path_rate=0.0,
    )


def build_swin() -> tuple:
    """Swin-T without stochastic depth, from image to features of 4 stages, and where it is from.

    Versions that do not fit make an import raise all kinds of errors, which are printed: then the
    next is tried.
    """
    for build in (swin_of_mmdet, swin_of_torchvision, swin_of_timm):
        source = build.__name__.rpartition('_')[2]
        try:
            return build(), source
        except Exception as error:
            print(f'   no Swin-T of {source}: {type(error).__name__}: {error}', flush=True)
    return None, 'none'


def build_ours(bench: Bench, **more) -> nn.Module:
    """CrossFormer-S without stochastic depth."""
    if bench.smoke:
        more.update(
            arch=dict(embed_dims=16, depths=(2,), num_heads=(1,)),
            merge_sizes=(),
            group_size=(3,),
            interval=(2,),
            out_indices=(0,),
        )
    return CrossFormer(**more, drop_path_rate=0.0).to(bench.device).train()


def build_models(bench: Bench) -> dict:
    """Name to (module that owns the parameters, image to features)."""
    options = {
        'fused': dict(attention_path='fused'),
        'plain path': dict(attention_path='plain'),
        'fused, with_cp': dict(attention_path='fused', with_cp=True),
        "fused, lda='block'": dict(attention_path='fused', lda='block'),
    }
    models = {name: build_ours(bench, **more) for name, more in options.items()}
    models = {name: (model, model) for name, model in models.items()}
    weights = build_ours(bench)
    sizes = dict(group_size=(3,), interval=(2,)) if bench.smoke else {}
    models['mask and pad'] = (
        weights,
        lambda image: plain_features(dict(weights.named_parameters()), image, **sizes),
    )
    if not bench.smoke:
        swin, source = build_swin()
        print(f'   Swin-T: {source}', flush=True)
        if swin is not None:
            models[f'Swin-T of {source}'] = (swin.to(bench.device).train(),) * 2
    return models


def training_step(bench: Bench, module, run, image) -> None:
    module.zero_grad(set_to_none=True)
    with torch.autocast(bench.device.type, torch.bfloat16, enabled=not bench.smoke):
        features = run(image)
    sum(feature.float().mean() for feature in features).backward()


def run_backbone(bench: Bench, rows: list) -> None:
    """Alternating; AMP in bfloat16. On the GPU, host_ms is how long the CPU takes to ask for it."""
    image = bench.randn(bench.options.batch, 3, *bench.options.image)
    models, times, peaks = build_models(bench), {}, {}

    def synchronize():
        if not bench.smoke:
            torch.cuda.synchronize()

    for name, (module, run) in list(models.items()):  # warm up, and measure memory
        if not bench.in_time(name):
            del models[name]
            continue
        try:
            if not bench.smoke:
                torch.cuda.empty_cache()
                training_step(bench, module, run, image)
                module.zero_grad(set_to_none=True)
                synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            training_step(bench, module, run, image)
            synchronize()
            if not bench.smoke:
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
            module.zero_grad(set_to_none=True)
        except Exception as error:
            print(f'   {name} left out: {type(error).__name__}: {error}'.split('\n')[0], flush=True)
            del models[name]
    rounds = 1 if bench.smoke else 15
    for turn in range(rounds):
        if turn >= 3 and not bench.in_time(f'more than {turn} rounds'):
            break
        for name, (module, run) in models.items():
            synchronize()
            began = time.perf_counter()
            training_step(bench, module, run, image)
            asked = time.perf_counter()
            synchronize()
            times.setdefault(name, []).append((time.perf_counter() - began, asked - began))
    for name, seconds in times.items():
        steps = sorted(1e3 * step for step, _ in seconds)
        add(
            rows,
            model=name,
            step_ms=statistics.median(steps),
            fastest_ms=steps[0],
            slowest_ms=steps[-1],
            host_ms=1e3 * statistics.median(host for _, host in seconds),
            peak_gib=peaks.get(name),
        )
    step = {row['model']: row['step_ms'] for row in rows}
    for other in step:
        if 'fused' in step and other != 'fused':
            print(
                f"   fused takes {step['fused'] / step[other]:.2f} of the time of {other}",
                flush=True,
            )


# -------------------------------------------------------------------------------- profile
def run_profile(bench: Bench, rows: list) -> None:
    """The kernels with the largest share of a training step's device time."""
    from torch.profiler import ProfilerActivity, profile

    model = build_ours(bench, attention_path='fused')
    image = bench.randn(bench.options.batch, 3, *bench.options.image)
    training_step(bench, model, model, image)
    activity = ProfilerActivity.CPU if bench.smoke else ProfilerActivity.CUDA
    with profile(activities=[activity]) as recorded:
        training_step(bench, model, model, image)
        if not bench.smoke:
            torch.cuda.synchronize()

    def took(event):
        return event.self_cpu_time_total if bench.smoke else event.self_device_time_total

    events = sorted(recorded.key_averages(), key=took, reverse=True)
    total = sum(map(took, events))
    for event in events[:25]:
        add(
            rows,
            share=took(event) / total,
            ms=took(event) / 1e3,
            calls=event.count,
            kernel=event.key[:80],
        )


def main() -> None:
    if not OPTIONS.smoke and not torch.cuda.is_available():
        sys.exit('error: no GPU is there; --smoke tries the script on the CPU')
    torch.manual_seed(0)
    bench = Bench(OPTIONS)
    for name in OPTIONS.sections:
        bench.run(name)
    failed = [name for name, section in bench.results['sections'].items() if 'error' in section]
    checks = bench.results['sections'].get('check', {}).get('rows', [])
    wrong = [row for row in checks if not row['passed']]
    print(
        f'\n{len(checks) - len(wrong)} of {len(checks)} checks passed; {OPTIONS.out} has the '
        f'figures ({time.perf_counter() - bench.start:.0f} s)'
    )
    if failed or wrong:
        sys.exit(f"error: {len(wrong)} checks and the sections {', '.join(failed) or '-'} failed")


if __name__ == '__main__':
    main()
