"""The gradient of a convolution's weight on the CPU, in C++ (csrc/weight_gradient.h)."""

import ctypes
from typing import Sequence

from torch import Tensor

from . import native


class WeightArguments(ctypes.Structure):
    """A call; the same as ``WeightArguments`` in csrc/common.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in 'batch height width channels out_height out_width out_channels'.split()
        ),
        *((name, ctypes.c_int64 * 2) for name in ('kernel', 'stride', 'padding')),
        *((name, ctypes.c_void_p) for name in ('x', 'grad_out', 'grad_weight')),
    ]


def weight_gradient(
    grad_out: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """Return the gradient of the weight of a convolution.

    Args:
        grad_out (Tensor): (B, out, H out, W out), the gradient of the output, in float32 on the
            CPU as is ``x``; best channels last in memory, both.
        x (Tensor): (B, channels, H, W), a multiple of 16 channels.
        kernel, stride, padding (tuple[int, int]): along rows and columns.

    Returns:
        Tensor: (out, channels, *kernel), channels last in memory.

    Raises:
        ValueError: the environment specifies instructions that this processor does not have.
    """
    grad_out, x = (one.permute(0, 2, 3, 1).contiguous() for one in (grad_out, x))
    grad_weight = x.new_empty(grad_out.shape[3], *kernel, x.shape[3])
    arguments = WeightArguments(
        *x.shape,
        *grad_out.shape[1:],
        kernel=tuple(kernel),
        stride=tuple(stride),
        padding=tuple(padding),
        x=x.data_ptr(),
        grad_out=grad_out.data_ptr(),
        grad_weight=grad_weight.data_ptr(),
    )
    native.run(native._native.compute_weight_gradient, arguments)
    return grad_weight.permute(0, 3, 1, 2)
