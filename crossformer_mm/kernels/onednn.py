"""Linear layers on the CPU through oneDNN, where it is faster than PyTorch's default.

PyTorch multiplies float32 matrices on the CPU with Intel's MKL, which uses 512-bit instructions
only on Intel's processors, and copies the bias into the result first. oneDNN, which runs PyTorch's
convolutions, does neither, but reorders the weight first.
"""

import functools
import platform
from pathlib import Path
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import is_autocast_enabled


def is_float32_on_cpu(x: Tensor) -> bool:
    """Check for float32 on the CPU, outside autocast."""
    return x.device.type == 'cpu' and x.dtype == torch.float32 and not is_autocast_enabled('cpu')


def is_onednn_on() -> bool:
    """Check that this PyTorch has oneDNN and uses it."""
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


def onednn_suits(x: Tensor, weight: Tensor) -> bool:
    """Check whether oneDNN is faster: on processors of other makers than Intel.

    Two of AMD's with AVX-512 multiplied matrices at 215 and 400 GFLOP/s in oneDNN, 134 and 180 in
    MKL. With AVX2 only it was 184 and 178; a forward pass of many tokens took 0.97 of the time in
    oneDNN, but a training step 1.2, as it did on an Intel with AVX-512. Few tokens take MKL, with
    AVX-512 in training alone: reordering the weight costs more than is gained.
    ``torch.backends.mkldnn.flags(enabled=False)`` switches oneDNN off, as it does for convolutions.

    Args:
        x (Tensor): (..., in), of :func:`is_float32_on_cpu`.
        weight (Tensor): (out, in).
    """
    if not is_onednn_on() or is_intel():
        return False
    capability, train = torch.backends.cpu.get_cpu_capability(), torch.is_grad_enabled()
    tokens = x.numel() // x.shape[-1]
    if capability == 'AVX2':
        return not train and tokens >= 512  # by trials, as below
    few = 400 if weight.numel() > 2**20 else 128  # by trials at the shapes of CrossFormer-S
    return capability.startswith('AVX512') and (tokens >= few or not train)


@functools.cache
def is_intel() -> bool:
    """Check for a processor made by Intel."""
    try:
        return 'GenuineIntel' in Path('/proc/cpuinfo').read_text()
    except OSError:  # not Linux
        return 'GenuineIntel' in platform.processor()


def onednn_linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """Compute ``F.linear(x, weight, bias)`` as a 1x1 convolution of one row of pixels.

    Args:
        x (Tensor): (tokens, in) in float32 on the CPU, as are the others.
        weight, bias (Tensor): (out, in) and (out,) or None.

    Returns:
        Tensor: (tokens, out).
    """
    return F.conv2d(as_pixels(x), weight[:, :, None, None], bias).permute(0, 2, 3, 1)[0, 0]


def as_pixels(x: Tensor) -> Tensor:
    """View (tokens, channels) as (1, channels, 1, tokens) in the layout channels last."""
    return x.view(1, 1, *x.shape).permute(0, 3, 1, 2)


def onednn_weight_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> Tuple[Tensor, Tensor]:
    """Return the gradients of the weight and the bias of :func:`onednn_linear`."""
    tensors = as_pixels(grad), as_pixels(x), weight[:, :, None, None]
    geometry = [1, 1], [0, 0], [1, 1], False, [0, 0], 1  # stride, padding, dilation; not transposed
    _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        *tensors, [len(weight)], *geometry, [False, True, True]
    )
    return grad_weight[:, :, 0, 0], grad_bias
