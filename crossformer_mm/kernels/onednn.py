"""Layers on the CPU through oneDNN: linear layers where it is faster than PyTorch's default, and
convolutions by large kernels in a form for which it has fast code.

PyTorch multiplies float32 matrices on the CPU with Intel's MKL, which uses 512-bit instructions
only on Intel's processors, and copies the bias into the result first. oneDNN, which runs PyTorch's
convolutions, does neither, but reorders the weight first.
"""

import functools
import platform
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compat import is_autocast_enabled


def is_float32_on_cpu(x: Tensor) -> bool:
    """Check for float32 on the CPU, outside autocast."""
    return x.device.type == 'cpu' and x.dtype == torch.float32 and not is_autocast_enabled('cpu')


def is_onednn_on() -> bool:
    """Check that this PyTorch has oneDNN and uses it."""
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


def onednn_suits(x: Tensor, weight: Tensor) -> bool:
    """Check whether oneDNN is faster: on AVX-512 processors of other makers than Intel.

    Two of AMD's multiplied matrices at 215 and 400 GFLOP/s in oneDNN, 134 and 180 in MKL. One with
    AVX2 only did at 184 and 178, and its training step took 1.2 of the time in oneDNN; so did that
    of an Intel with AVX-512. Few tokens in training take MKL: reordering the weight for three
    products costs more than is gained. ``torch.backends.mkldnn.flags(enabled=False)`` switches
    oneDNN off, as it does for convolutions.
    """
    tokens = x.numel() // x.shape[-1]
    few = 400 if weight.numel() > 2**20 else 128  # by trials at the shapes of CrossFormer-S
    return (
        is_float32_on_cpu(x)
        and is_onednn_on()
        and torch.backends.cpu.get_cpu_capability().startswith('AVX512')
        and not is_intel()
        and (tokens >= few or not torch.is_grad_enabled())
    )


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


def blocks_suit(x: Tensor, conv: nn.Conv2d) -> bool:
    """Check whether :func:`convolve_blocks` takes a convolution, and is faster.

    For few channels and large kernels, oneDNN has vector code for AVX-512 only. With AVX2 it copies
    the pixels of all windows, hundreds of MB. Where that is more memory than it allows itself, as
    with one thread, it takes code without vectors, a hundred times as slow.

    Args:
        x (Tensor): (B, channels, H, W), float32 on the CPU, see :func:`is_float32_on_cpu`.
        conv (nn.Conv2d): unmodified.
    """
    kernel, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    return (
        is_onednn_on()
        and torch.backends.cpu.get_cpu_capability() == 'AVX2'
        and conv.in_channels <= 4
        and kernel >= 16
        and not any(side % stride for side in (kernel, *x.shape[2:]))
        and (conv.kernel_size, conv.stride, conv.padding, 2 * padding)
        == ((kernel, kernel), (stride, stride), (padding, padding), kernel - stride)
        and (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, 'zeros')
    )


def convolve_blocks(x: Tensor, convs: Sequence[nn.Conv2d]) -> List[Tensor]:
    """Apply convolutions with blocks of stride x stride pixels as channels, at a stride of 1.

    Args:
        x (Tensor): (B, channels, H, W), sides that are multiples of the stride.
        convs (Sequence[nn.Conv2d]): of one stride; their kernels are multiples of it, centred by
            their padding.

    Returns:
        List[Tensor]: of (B, out, H/stride, W/stride).
    """

    @functools.cache  # kernels of 16 and 32 take the same blocks
    def blocks(stride: int, beside: int) -> Tensor:
        unshuffled = F.pixel_unshuffle(F.pad(x, (beside,) * 4), stride)
        return unshuffled.contiguous(memory_format=torch.channels_last)

    return [
        F.conv2d(
            blocks(stride, padding % stride),
            F.pixel_unshuffle(conv.weight, stride),
            conv.bias,
            padding=padding // stride,
        )
        for conv, stride, padding in ((conv, conv.stride[0], conv.padding[0]) for conv in convs)
    ]
