"""How near the attention kernel of the CPU comes to what the processor can do.

    python benchmarks/attention.py [--instructions avx2] [--members 49 950] [--threads 2]

Prints the rates at which PyTorch multiplies large matrices (MKL's, and oneDNN's 1 x 1
convolution), then those of the kernel by members of a group, each the best of several calls: the
products of matrices that attention consists of are counted, 2 forward and 5 backward, and nothing
else of what it does. Percentages are of the faster multiplication in float32, measured again just
before each line, since the clock of a processor is not the same for long.
"""
import argparse
import os
import platform
import time
from pathlib import Path

FLAGS = ('avx2', 'fma', 'avx512f', 'avx512bw', 'avx512_bf16', 'amx_bf16', 'asimd')
# Members of a group: side of the map, its rules, so that there are 64 groups.
CASES = {49: (56, 56, (7, 1), (7, 1)), 196: (112, 112, (14, 8), (14, 8)),
         950: (200, 304, (25, 8), (38, 8)), 2500: (400, 400, (50, 8), (50, 8))}
HEADS, DIM = 3, 32


def best_rate(function, flops: int, seconds: float = 1.) -> float:
    """GFLOP/s of the fastest of the calls that begin within some seconds, at least three."""
    function()
    start, best, calls = time.perf_counter(), float('inf'), 0
    while calls < 3 or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - begin)
        calls += 1
    return flops / best / 1e9


def processor() -> str:
    """Its name and those of its flags that matter."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor()
    info = dict(reversed([map(str.strip, line.split(':', 1)) for line in lines if ':' in line]))
    flags = info.get('flags', info.get('Features', '')).split()
    return f'{info.get("model name", platform.machine())}, {" ".join(f for f in FLAGS if f in flags)}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--instructions', help='an instruction set instead of the best')
    parser.add_argument('--members', type=int, nargs='+', choices=CASES, default=list(CASES))
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--dtypes', nargs='+', default=['float32', 'bfloat16'])
    args = parser.parse_args()
    import torch
    import torch.nn.functional as F

    from crossformer_mm.grouping import AxisRule
    from crossformer_mm.kernels import native
    torch.set_num_threads(args.threads)
    if args.instructions:
        os.environ[native.VARIABLE] = args.instructions
    matrix = torch.randn(1536, 1536)
    pixels = torch.randn(1, 1536, 48, 32).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(1536, 1536, 1, 1)

    def products() -> tuple:
        flops = 2 * 1536**3
        with torch.no_grad():
            return (best_rate(lambda: matrix @ matrix, flops, .3),
                    best_rate(lambda: F.conv2d(pixels, weight), flops, .3))

    print(f'{processor()}; {args.threads} threads, instructions {native.instructions()}')
    print('GFLOP/s of products in float32: MKL {:.0f}, oneDNN {:.0f}'.format(*products()))
    for dtype in args.dtypes:
        for members in args.members:
            height, width, rows, columns = CASES[members]
            rows, columns = AxisRule(*rows), AxisRule(*columns)
            qkv = torch.randn(1, height, width, 3 * HEADS * DIM).to(getattr(torch, dtype))
            grad = torch.randn(1, height, width, HEADS * DIM).to(qkv.dtype)
            table = torch.randn(HEADS, 2 * rows.size - 1, 2 * columns.size - 1)
            rules = (rows, columns, HEADS, DIM**-.5)
            out, norms = native.forward(qkv, table, *rules)
            flops = 2 * height * width * members * HEADS * DIM
            peak = max(products())
            rates = (best_rate(lambda: native.forward(qkv, table, *rules), 2 * flops),
                     best_rate(lambda: native.backward(grad, qkv, table, out, norms, *rules),
                               5 * flops))
            print('{:8} {:5} members: forward {:4.0f} ({:3.0f} %), backward {:4.0f} ({:3.0f} %)'
                  .format(dtype, members, *(x for rate in rates for x in
                                            (rate, 100 * rate / peak))))


if __name__ == '__main__':
    main()
