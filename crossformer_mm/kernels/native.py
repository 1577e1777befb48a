"""Attention inside the groups of a map on the CPU, compiled when this package is installed.

The kernel, ``native.cpp``, reads the members of a group where they lie in the map, adds the bias
from the table of offsets and keeps logits and weights in registers and the first level cache,
forward and backward. It is compiled for several instruction sets, of which the best that the
processor has is taken; ``CROSSFORMER_MM_INSTRUCTIONS`` names another:

============== ==================================================================================
``amx``        AVX-512 with AMX (Linux): bfloat16, of heads of 32, is multiplied in tiles
``avx512bf16`` AVX-512 with AVX512_BF16: bfloat16 is multiplied as it is; of Intel's processors,
               where that is slower, ``avx512`` is the better one
``avx512``     AVX-512; as below, bfloat16 and float16 are multiplied in float32
``avx2``       AVX2 with FMA
``generic``    what every processor of the kind has (SSE2, NEON)
``avx2_wide``  the very steps of ``amx`` and ``avx512bf16`` in AVX2: for tests, slow
============== ==================================================================================

The threads are PyTorch's own, as many as ``torch.get_num_threads()`` says; values do not depend
on their number.
"""

import ctypes
import os
from pathlib import Path
from typing import Callable, Tuple

import torch
from torch import Tensor

from ..grouping import AxisRule, fit_rule
from .call import DTYPES, Call, why_not_compiled
from .operator import map_operator

try:
    from . import _native  # type: ignore[attr-defined]  # compiled

    MISSING = ''
except ImportError as error:  # there was no compiler
    MISSING = f'it was not compiled when crossformer_mm was installed ({error})'

VARIABLE = 'CROSSFORMER_MM_INSTRUCTIONS'
LARGEST_HEAD = 128


def find_pool() -> int:
    """Address of the function of PyTorch's OpenMP that runs another one on its threads, or 0.

    A second pool of threads would wait beside the first, which costs time where both spin.
    """
    for library in sorted((Path(torch.__file__).parent / 'lib').glob('libtorch_cpu.*')):
        try:
            # Of the libraries that this one depends on: GNU's, LLVM's or Intel's OpenMP.
            function = ctypes.CDLL(str(library)).GOMP_parallel
            return ctypes.cast(function, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return 0


# Of this process: the threads of GNU OpenMP do not survive a fork, and it waits for them forever.
POOL, PROCESS = find_pool(), os.getpid()


def instructions() -> str:
    """The instruction set that is used.

    Raises:
        ValueError: if the environment names one that this processor does not have.
    """
    supported = _native.supported()
    name = os.environ.get(VARIABLE) or supported[0]
    if name not in supported:
        raise ValueError(
            f'{VARIABLE} is {name!r}, but this processor runs {", ".join(map(repr, supported))}'
        )
    return name


def why_not(call: Call) -> str:
    """What is in the way of this path, or nothing."""
    if call.device.type != 'cpu':
        return f'it works on the CPU, but got tensors on {call.device}'
    return why_not_compiled(call, LARGEST_HEAD) or MISSING


def forward(
    qkv: Tensor, table: Tensor, rows: AxisRule, columns: AxisRule, num_heads: int, scale: float
) -> Tuple[Tensor, Tensor]:
    """Attention of every position of a map to its group; logits and all sums are in float32.

    Args:
        qkv, table, rows, columns, num_heads, scale: as of
            :func:`crossformer_mm.kernels.map_attention`; on the CPU, ``qkv`` in one of ``DTYPES``.

    Returns:
        tuple[Tensor, Tensor]: (B, H, W, heads*d) in the type of ``qkv``; and (B, H, W, heads) in
        float32, the logarithm of the sum of the exponentials of each query's logits, for
        :func:`backward`.

    Raises:
        ValueError: the environment names instructions that this processor does not have, or the
            table is too small for the groups.
    """
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    norms = qkv.new_empty(*qkv.shape[:3], num_heads, dtype=torch.float32)
    call_kernel(rows, columns, scale, qkv, table, out, norms)
    return out, norms


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    table: Tensor,
    out: Tensor,
    norms: Tensor,
    rows: AxisRule,
    columns: AxisRule,
    num_heads: int,
    scale: float,
) -> Tuple[Tensor, Tensor]:
    """Gradients of what :func:`forward` takes.

    Args:
        grad_out (Tensor): (B, H, W, heads*d), the gradient of ``out``.
        out, norms (Tensor): what :func:`forward` returned.
        qkv, table, rows, columns, num_heads, scale: as there.

    Returns:
        tuple[Tensor, Tensor]: the gradients of ``qkv``, in its type, and of ``table``, in float32.

    Raises:
        ValueError: as there.
    """
    grad_qkv = qkv.new_empty(qkv.shape)
    grad_table = table.new_zeros(table.shape, dtype=torch.float32)
    call_kernel(
        rows, columns, scale, qkv, table, out, norms, grad_out.to(qkv.dtype), grad_qkv, grad_table
    )
    return grad_qkv, grad_table


def call_kernel(
    rows, columns, scale, qkv, table, out, norms, grad_out=None, grad_qkv=None, grad_table=None
) -> None:
    """Call the kernel, which takes addresses; without gradients it is the forward pass."""
    batch, height, width, heads = norms.shape
    rows, columns = fit_rule(height, rows), fit_rule(width, columns)
    if table.shape[1] < 2 * rows.size - 1 or table.shape[2] < 2 * columns.size - 1:
        raise ValueError(
            f'a table of {table.shape[1]} x {table.shape[2]} offsets is too small for '
            f'groups of {rows.size} x {columns.size} members'
        )
    tensors = [  # what is written to is contiguous already
        tensor if tensor is None else tensor.contiguous()
        for tensor in (qkv, table.float(), out, norms, grad_out, grad_qkv, grad_table)
    ]
    _native.attend(
        instructions(),
        POOL if os.getpid() == PROCESS else 0,
        torch.get_num_threads(),
        DTYPES.index(qkv.dtype),
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        batch,
        height,
        width,
        heads,
        out.shape[3] // heads,
        *table.shape[1:],
        tuple(rows),
        tuple(columns),
        scale,
    )


attend: Callable[..., Tensor] = map_operator('native_attention', forward, backward)
