"""Time that the CPU spends on one call of the fused attention, without a GPU.

    python benchmarks/host_time.py

Kernels are compiled for a GPU that is not there, and launches do nothing. Tensors are on the CPU
and as small as may be, so that what else is computed takes next to no time: each call has two
groups, of which the sums over groups are part. Not in it are the driver's own part of a launch and
PyTorch's of making a tensor on a GPU. Times are the least of many repetitions, in microseconds and
as multiples of a multiplication of eight numbers by PyTorch, of the same run.
"""

import timeit
from typing import Callable

import torch
import triton
from stand_in_gpu import pretend

from crossformer_mm.grouping import AxisRule
from crossformer_mm.kernels import fused, triton_launch

# Map, sides of a group: members in one block, and in several.
CASES = {'small groups': ((14, 7), (7, 7)), 'large groups': ((18, 8), (9, 8))}


def microseconds(call: Callable, calls: int = 10, turns: int = 500) -> float:
    """The least mean time of some calls, after a first one that may compile."""
    call()
    return 1e6 * min(timeit.repeat(call, number=calls, repeat=turns)) / calls


def main() -> None:
    if triton_launch.INTERPRETED:
        raise SystemExit('error: TRITON_INTERPRET is set, with which nothing is launched: unset it')
    torch.set_num_threads(1)
    pretend(90)
    numbers = torch.ones(8)
    unit = microseconds(lambda: numbers * numbers)
    print(
        f'PyTorch {torch.__version__}, Triton {triton.__version__}: a multiplication {unit:.2f} us'
    )
    for name, (sides, members) in CASES.items():
        rows, columns = (AxisRule(size, 1) for size in members)
        qkv = torch.zeros(1, *sides, 96, dtype=torch.bfloat16, requires_grad=True)
        # As a position bias returns it: heads last in memory.
        table = torch.zeros(2 * members[0] - 1, 2 * members[1] - 1, 1).permute(2, 0, 1)
        table.requires_grad_()

        def forward():
            return fused.attend(qkv, table, rows, columns, 1, 0.2)

        out = forward()
        grad = torch.zeros_like(out)
        with torch.no_grad():
            times = {'inference': microseconds(forward)}
        times['forward'] = microseconds(forward)
        times['backward'] = microseconds(
            lambda: torch.autograd.grad(out, (qkv, table), grad, retain_graph=True)
        )
        for part, took in times.items():
            print(f'{name}, {part:9}: {took:6.1f} us = {took / unit:5.1f} multiplications')


if __name__ == '__main__':
    main()
