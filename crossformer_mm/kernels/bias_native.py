"""The kernels of :mod:`.bias` on the CPU, in C++ (csrc/position_bias.h)."""

import ctypes
from typing import Sequence, Tuple

from torch import Tensor

from . import native


class BiasArguments(ctypes.Structure):
    """A call; the same as ``BiasArguments`` in csrc/common.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in 'rows columns width heads residual'.split()),
        ('parameters', ctypes.c_void_p * 14),
        *((name, ctypes.c_void_p) for name in 'table grad_table grads'.split()),
        ('eps', ctypes.c_float),
    ]


def forward(
    height: int, width: int, parameters: Sequence[Tensor], residual: bool, eps: float
) -> Tensor:
    """Compute what :func:`.bias_triton.forward` does, from the same arguments."""
    table = parameters[-1].new_empty(len(parameters[-1]), 2 * height - 1, 2 * width - 1)
    call_kernel(table.shape, parameters, residual, eps, table=table.data_ptr())
    return table


def backward(
    grad_table: Tensor, parameters: Sequence[Tensor], residual: bool, eps: float
) -> Tuple[Tensor, ...]:
    """Compute what :func:`.bias_triton.backward` does, from the same arguments."""
    sizes = [parameter.numel() for parameter in parameters]
    grads, grad_table = grad_table.new_empty(sum(sizes)), grad_table.contiguous()
    arrays = dict(grad_table=grad_table.data_ptr(), grads=grads.data_ptr())
    call_kernel(grad_table.shape, parameters, residual, eps, **arrays)
    parts = grads.split(sizes)
    return tuple(grad.view(one.shape) for grad, one in zip(parts, parameters))


def call_kernel(shape: Sequence[int], parameters, residual: bool, eps: float, **arrays) -> None:
    """Call the kernel, which takes addresses; without gradients it is the forward pass."""
    heads, rows, columns = shape
    native.run(
        native._native.compute_bias,
        BiasArguments(
            rows=rows,
            columns=columns,
            width=parameters[-2].shape[1],
            heads=heads,
            residual=residual,
            parameters=tuple(parameter.data_ptr() for parameter in parameters),
            eps=eps,
            **arrays,
        ),
    )
