"""What a processor is and how fast PyTorch multiplies matrices on it, for other benchmarks."""

import platform
import time
from pathlib import Path
from typing import Callable

FLAGS = ('avx2', 'fma', 'avx512f', 'avx512bw', 'avx512_bf16', 'amx_bf16', 'asimd')


def processor() -> str:
    """Its name, family and model, and those of its flags that matter."""
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


def best_rate(function: Callable, flops: int, seconds: float = 1.0) -> float:
    """GFLOP/s of the fastest of the calls that begin within some seconds, at least three."""
    function()
    start, best, calls = time.perf_counter(), float('inf'), 0
    while calls < 3 or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - begin)
        calls += 1
    return flops / best / 1e9


def product_rates(seconds: float = 0.3, side: int = 1024) -> dict:
    """GFLOP/s of the product of two square matrices: float32 by MKL (what PyTorch takes) and by
    oneDNN (as a 1 x 1 convolution), and bfloat16 as linear layers have it."""
    import torch
    import torch.nn.functional as F

    matrix, flops = torch.randn(side, side), 2 * side**3
    half = matrix.bfloat16()
    pixels = matrix.t()[None, :, :, None].contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        return dict(
            MKL=best_rate(lambda: matrix @ matrix, flops, seconds),
            oneDNN=best_rate(lambda: F.conv2d(pixels, matrix[:, :, None, None]), flops, seconds),
            bfloat16=best_rate(lambda: F.linear(half, half), flops, seconds),
        )
