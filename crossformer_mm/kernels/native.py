"""Attention inside the groups of a map on the CPU, compiled when this package is installed.

The kernel reads the members of a group in place in the map, adds the bias from the table of offsets
and keeps logits and weights in registers and the first level cache, forward and backward. It is
compiled for several instruction sets and takes the best that the processor has;
``CROSSFORMER_MM_INSTRUCTIONS`` specifies another:

============== ==================================================================================
``amx``        AVX-512 with AMX (Linux): bfloat16, of heads of 32, is multiplied in tiles
``avx512bf16`` AVX-512 with AVX512_BF16: bfloat16 is multiplied as it is; of Intel's processors,
               where that is slower, ``avx512`` is the better one
``avx512``     AVX-512; as below, bfloat16 and float16 are multiplied in float32
``avx2``       AVX2 with FMA
``generic``    the baseline of the architecture (SSE2, NEON)
``emulated``   the steps of ``amx`` and ``avx512bf16``, emulated in AVX2: for tests, slow
============== ==================================================================================

It runs on PyTorch's own threads, ``torch.get_num_threads()`` of them; values do not depend on their
number.
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


class Arguments(ctypes.Structure):
    """A call of the kernel; the same as ``Arguments`` in csrc/common.h."""

    _fields_ = [
        (name, kind)
        for kind, names in (
            (ctypes.c_int64, 'dtype batch height width heads dim table_rows table_columns'),
            (ctypes.c_int64 * 3, 'row_rule column_rule'),
            (ctypes.c_void_p, 'qkv table out norms grad_out grad_qkv grad_table'),
            (ctypes.c_float, 'scale'),
        )
        for name in names.split()
    ]


def find_pool() -> int:
    """Return the address of GOMP_parallel in PyTorch's OpenMP, or 0.

    A second pool of threads next to PyTorch's would cost time, because both spin while they wait.
    """
    for library in sorted((Path(torch.__file__).parent / 'lib').glob('libtorch_cpu.*')):
        try:
            # Found in the OpenMP that this library depends on: GNU's, LLVM's or Intel's.
            function = ctypes.CDLL(str(library)).GOMP_parallel
            return ctypes.cast(function, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return 0


# The process is kept because GNU OpenMP deadlocks after fork().
POOL, PROCESS = find_pool(), os.getpid()


def instructions() -> str:
    """Return the name of the instruction set that is used.

    Raises:
        ValueError: the environment specifies one that this processor does not have.
    """
    supported = _native.supported()
    name = os.environ.get(VARIABLE) or supported[0]
    if name not in supported:
        raise ValueError(
            f'{VARIABLE} is {name!r}, but this processor runs {", ".join(map(repr, supported))}'
        )
    return name


def why_not(call: Call) -> str:
    """Reason why a call is unsupported, or ''."""
    if call.device.type != 'cpu':
        return f'it works on the CPU, but got tensors on {call.device}'
    return why_not_compiled(call, LARGEST_HEAD) or MISSING


def forward(
    qkv: Tensor, table: Tensor, rows: AxisRule, columns: AxisRule, num_heads: int, scale: float
) -> Tuple[Tensor, Tensor]:
    """Attend from every position of a map to its group; logits and all sums are in float32.

    Args:
        qkv, table, rows, columns, num_heads, scale: those of
            :func:`crossformer_mm.kernels.map_attention`; on the CPU, ``qkv`` in one of ``DTYPES``.

    Returns:
        tuple[Tensor, Tensor]: (B, H, W, heads*d) in the type of ``qkv``; and (B, H, W, heads) in
        float32, the logarithm of the sum of the exponentials of each query's logits, for
        :func:`backward`.

    Raises:
        ValueError: the environment specifies instructions that this processor does not have, or
            the table is too small for the groups.
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
    """Return the gradients of the arguments of :func:`forward`.

    Args:
        grad_out (Tensor): (B, H, W, heads*d), the gradient of ``out``.
        out, norms (Tensor): the results of :func:`forward`.
        qkv, table, rows, columns, num_heads, scale: those of :func:`forward`.

    Returns:
        tuple[Tensor, Tensor]: the gradients of ``qkv``, in its type, and of ``table``, in float32.

    Raises:
        ValueError: as :func:`forward`.
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
    arrays = dict(qkv=qkv, table=table.float(), out=out, norms=norms)
    if grad_out is not None:
        arrays.update(grad_out=grad_out, grad_qkv=grad_qkv, grad_table=grad_table)
    # What is written to is contiguous already.
    arrays = {name: array.contiguous() for name, array in arrays.items()}
    arguments = Arguments(
        dtype=DTYPES.index(qkv.dtype),
        batch=batch,
        height=height,
        width=width,
        heads=heads,
        dim=out.shape[3] // heads,
        table_rows=table.shape[1],
        table_columns=table.shape[2],
        row_rule=tuple(rows),
        column_rule=tuple(columns),
        scale=scale,
        **{name: array.data_ptr() for name, array in arrays.items()},
    )
    run(_native.attend, arguments)


def run(kernel: Callable, arguments: ctypes.Structure) -> None:
    """Run a function of ``_native`` on PyTorch's threads.

    Raises:
        ValueError: the environment specifies instructions that this processor does not have.
    """
    pool = POOL if os.getpid() == PROCESS else 0
    kernel(instructions(), pool, torch.get_num_threads(), bytes(arguments))


attend: Callable[..., Tensor] = map_operator('native_attention', forward, backward)
