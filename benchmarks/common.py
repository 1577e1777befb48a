"""Shared by benchmarks: the processor, rates of products, processes that answer, curves."""

import argparse
import json
import os
import platform
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Callable, Dict, List
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
# Variables that limit the instruction sets of PyTorch, oneDNN, MKL and this package's kernel.
LIMITS = (
    'ATEN_CPU_CAPABILITY',
    'ONEDNN_MAX_CPU_ISA',
    'MKL_ENABLE_INSTRUCTIONS',
    'CROSSFORMER_MM_INSTRUCTIONS',
)
FLAGS = ('avx2', 'fma', 'avx512f', 'avx512bw', 'avx512_bf16', 'amx_bf16', 'asimd')
# Settings of glibc's allocator; without them it is the system's own.
ALLOCATOR = re.compile('MALLOC_|GLIBC_TUNABLES')


def processor() -> str:
    """Describe the processor: name, family, model, and the flags that matter."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor()
    info = dict(reversed([map(str.strip, line.split(':', 1)) for line in lines if ':' in line]))
    flags = info.get('flags', info.get('Features', '')).split()
    name = info.get('model name', platform.machine())
    if 'cpu family' in info:
        name += f" (family {info['cpu family']}, model {info.get('model', '?')})"
    return f'{name}, {" ".join(flag for flag in FLAGS if flag in flags)}'


def machine(threads: int, name: str = '') -> str:
    """Describe what a benchmark runs on; ``name`` is that of a GPU."""
    import torch

    limits = ''.join(f', {name}={os.environ[name]}' for name in LIMITS if name in os.environ)
    name = name or f'{processor()}{limits}, {threads or os.cpu_count()} threads'
    return f'{name}, PyTorch {torch.__version__}, Python {platform.python_version()}'


def best_rate(function: Callable, flops: int, seconds: float = 1.0) -> float:
    """Return GFLOP/s of the fastest of the calls that begin within some seconds, at least three."""
    function()
    start, best, calls = time.perf_counter(), float('inf'), 0
    while calls < 3 or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - begin)
        calls += 1
    return flops / best / 1e9


def product_rates(seconds: float = 0.3, side: int = 1024) -> Dict[str, float]:
    """Return GFLOP/s of the product of two square matrices: float32 by MKL (PyTorch's choice) and
    by oneDNN (as a 1 x 1 convolution), and bfloat16 as in linear layers."""
    import torch
    import torch.nn.functional as F

    matrix, flops = torch.randn(side, side), 2 * side**3
    half = matrix.bfloat16()
    pixels = matrix.t()[None, :, :, None].contiguous(memory_format=torch.channels_last)
    calls = dict(
        MKL=lambda: matrix @ matrix,
        oneDNN=lambda: F.conv2d(pixels, matrix[:, :, None, None]),
        bfloat16=lambda: F.linear(half, half),
    )
    with torch.no_grad():
        return {name: round(best_rate(call, flops, seconds), 1) for name, call in calls.items()}


def size_of(text: str) -> tuple:
    """Parse '800x1216'."""
    if not re.fullmatch(r'[1-9]\d*x[1-9]\d*', text):
        raise argparse.ArgumentTypeError(f'{text!r} is no size: write HEIGHTxWIDTH, as in 800x1216')
    height, width = map(int, text.split('x'))
    return height, width


def swin(depths: tuple = (2, 2, 6, 2)):
    """Build MMDetection's Swin-T, or another of its width."""
    from mmdet.models.backbones import SwinTransformer

    return SwinTransformer(depths=depths, drop_path_rate=0.2)


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    status = Path('/proc/self/status').read_text()
    return int(status.split('VmHWM:')[1].split()[0]) * 1024


def read_record(file: Path, option: str) -> dict:
    """Read the results that an option needs; end the program if there are none."""
    if not file.is_file():
        sys.exit(f"error: {option}: '{file}' does not exist.")
    return json.loads(file.read_text())


def read_curve(work: Path, key: str) -> List[List[float]]:
    """Return step and value of what a training logged, over all its starts."""
    found = {}
    for file in sorted(work.glob('*/vis_data/scalars.json')):
        rows = map(json.loads, file.read_text().splitlines())
        found.update({row['step']: round(row[key], 4) for row in rows if key in row})
    return [[step, found[step]] for step in sorted(found)]


class Worker:
    """A case in a process of its own, whose functions are called by name.

    Args:
        start (Callable): called with the case in the process, returns these functions.
        case (dict): ``threads`` (0: the default) limits the CPU's.
        **environment: variables that are set for the process.
    """

    functions: Dict[str, Callable] = {}  # in the process

    def __init__(self, start: Callable[[dict], Dict[str, Callable]], case: dict, **environment):
        inherited = {name: v for name, v in os.environ.items() if not ALLOCATOR.match(name)}
        inherited['PYTHONWARNINGS'] = 'ignore'
        if case['threads']:
            inherited['OMP_NUM_THREADS'] = str(case['threads'])
        self.case, self.pool = case, ProcessPoolExecutor(1, get_context('spawn'))
        with mock.patch.dict(os.environ, {**inherited, **environment}, clear=True):
            self.started = self.pool.submit(Worker.begin, start, case)

    def ask(self, name: str) -> Any:
        """Call a function; RuntimeError: it failed, or the process died."""
        try:
            self.started.result()
            return self.pool.submit(Worker.call, name).result()
        except Exception as error:
            raise RuntimeError(f'{type(error).__name__}: {error}') from error

    def close(self) -> None:
        self.pool.shutdown()

    @staticmethod
    def begin(start: Callable, case: dict) -> None:
        Worker.functions = start(case)

    @staticmethod
    def call(name: str) -> Any:
        return Worker.functions[name]()


def draw_curves(file: Path, panels: List[dict], columns: int, title: str = '') -> None:
    """Draw a picture of panels, row by row.

    Args:
        panels (list of dict): ``lines``, each a dict of ``x``, ``y``, ``band`` (optional: lower and
            upper end) and options of Matplotlib's ``plot``; all else is set on the axes.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    rows = -(-len(panels) // columns)
    options = dict(figsize=(5 * columns, 4 * rows), squeeze=False, layout='constrained')
    figure, axes = pyplot.subplots(rows, columns, sharey='row', **options)
    for axis, panel in zip(axes.flat, panels):
        for line in panel.pop('lines'):
            x, y, band = line.pop('x'), line.pop('y'), line.pop('band', None)
            (drawn,) = axis.plot(x, y, **line)
            if band is not None:
                axis.fill_between(x, *band, color=drawn.get_color(), alpha=0.13, linewidth=0)
        axis.set(**panel)
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
