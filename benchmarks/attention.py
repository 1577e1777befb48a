"""Rate of the CPU's attention kernel, next to that of large matrix products.

    python benchmarks/attention.py [--instructions avx2] [--members 49 950] [--threads 2]

Prints the rates of PyTorch's products of large matrices (MKL's, and oneDNN's 1 x 1 convolution),
then those of the kernel by members of a group, the best of several calls each. Only the matrix
products of attention are counted, 2 forward and 5 backward. Percentages are of the faster product
in float32, measured again before each line because the processor's clock varies.
"""

import argparse
import os

from common import best_rate, processor, product_rates

# Members of a group: side of the map, its rules, so that there are 64 groups.
CASES = {
    49: (56, 56, (7, 1), (7, 1)),
    196: (112, 112, (14, 8), (14, 8)),
    950: (200, 304, (25, 8), (38, 8)),
    2500: (400, 400, (50, 8), (50, 8)),
}
HEADS, DIM = 3, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--instructions', help='an instruction set instead of the best')
    parser.add_argument('--members', type=int, nargs='+', choices=CASES, default=list(CASES))
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--dtypes', nargs='+', default=['float32', 'bfloat16'])
    args = parser.parse_args()
    import torch

    from crossformer_mm.grouping import AxisRule
    from crossformer_mm.kernels import native

    torch.set_num_threads(args.threads)
    if args.instructions:
        os.environ[native.VARIABLE] = args.instructions
    print(f'{processor()}; {args.threads} threads, instructions {native.instructions()}')
    print(
        'GFLOP/s of products: '
        + ', '.join(f'{name} {rate:.0f}' for name, rate in product_rates().items())
    )
    for dtype in args.dtypes:
        for members in args.members:
            height, width, rows, columns = CASES[members]
            rows, columns = AxisRule(*rows), AxisRule(*columns)
            qkv = torch.randn(1, height, width, 3 * HEADS * DIM).to(getattr(torch, dtype))
            grad = torch.randn(1, height, width, HEADS * DIM).to(qkv.dtype)
            table = torch.randn(HEADS, 2 * rows.size - 1, 2 * columns.size - 1)
            rules = (rows, columns, HEADS, DIM**-0.5)
            out, norms = native.forward(qkv, table, *rules)
            flops = 2 * height * width * members * HEADS * DIM
            rates = product_rates()
            peak = max(rates['MKL'], rates['oneDNN'])
            rates = (
                best_rate(lambda: native.forward(qkv, table, *rules), 2 * flops),
                best_rate(lambda: native.backward(grad, qkv, table, out, norms, *rules), 5 * flops),
            )
            shown = (f'{rate:4.0f} ({100 * rate / peak:3.0f} %)' for rate in rates)
            print('{:8} {:5} members: forward {}, backward {}'.format(dtype, members, *shown))


if __name__ == '__main__':
    main()
