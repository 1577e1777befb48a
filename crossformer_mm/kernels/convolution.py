"""Convolutions on the CPU in forms for which its libraries have faster code."""

import functools
from typing import List, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import native
from .convolution_native import weight_gradient
from .onednn import is_onednn_on
from .operator import is_intercepted

# Numbers of the largest map for which oneDNN's gradient of the weight is as fast as ours.
SMALL = 2**19


def convolve_on_cpu(convs: Sequence[nn.Conv2d], x: Tensor) -> List[Tensor]:
    """Apply unmodified convolutions to one map in float32 on the CPU."""
    if not is_onednn_on():
        return [conv(x) for conv in convs]
    # Channels last, the outputs are joined as the blocks take them, without a copy. In training
    # oneDNN has no fast code for that layout of an image and a large kernel.
    if not torch.is_grad_enabled():
        x = x.contiguous(memory_format=torch.channels_last)
    elif x.shape[1] <= 4:
        x = x.contiguous()
    in_blocks = [conv for conv in convs if blocks_suit(x, conv)]
    outs = dict(zip(in_blocks, convolve_blocks(x, in_blocks)))
    for conv in convs:
        if conv in outs:
            continue
        if windows_suit(x, conv):
            outs[conv] = convolve_windows(x, conv)
        elif is_plain(conv) and conv.dilation == (1, 1):
            outs[conv] = convolve(x, conv.weight, conv.bias, conv.stride, conv.padding)
        else:
            outs[conv] = conv(x)
    return [outs[conv] for conv in convs]


def blocks_suit(x: Tensor, conv: nn.Conv2d) -> bool:
    """Check whether :func:`convolve_blocks` takes a convolution, and is faster.

    For few channels and large kernels, oneDNN has vector code for AVX-512 only. With AVX2 it copies
    the pixels of all windows, hundreds of MB. Where that is more memory than it allows itself, as
    with one thread, it takes code without vectors, a hundred times as slow.

    Args:
        x (Tensor): (B, channels, H, W), float32 on the CPU, for oneDNN.
        conv (nn.Conv2d): unmodified.
    """
    kernel, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    return (
        torch.backends.cpu.get_cpu_capability() == 'AVX2'
        and conv.in_channels <= 4
        and kernel >= 16
        and not any(side % stride for side in (kernel, *x.shape[2:]))
        and (conv.kernel_size, conv.stride, conv.padding, 2 * padding)
        == ((kernel, kernel), (stride, stride), (padding, padding), kernel - stride)
        and conv.dilation == (1, 1)
        and is_plain(conv)
    )


def is_plain(conv: nn.Conv2d) -> bool:
    """Check for a convolution of one group, padded with a number of zeros."""
    is_number = not isinstance(conv.padding, str)
    return is_number and (conv.groups, conv.padding_mode) == (1, 'zeros')


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
        padded = F.pad(x, (beside,) * 4).unflatten(3, (-1, stride)).unflatten(2, (-1, stride))
        return padded.permute(0, 2, 4, 1, 3, 5).flatten(3).permute(0, 3, 1, 2)

    outs = []
    for conv in convs:
        stride, padding = conv.stride[0], conv.padding[0]
        weight = F.pixel_unshuffle(conv.weight, stride)
        x_blocks = blocks(stride, padding % stride)
        outs.append(convolve(x_blocks, weight, conv.bias, (1, 1), (padding // stride,) * 2))
    return outs


def windows_suit(x: Tensor, conv: nn.Conv2d) -> bool:
    """Check whether :func:`convolve_windows` takes a convolution, and is faster.

    oneDNN reorders the weight in each call. For few pixels out and a large weight, as in the last
    merging of a small image, that takes most of the time: 49 pixels by 2.4 M weights took 8.5 ms,
    and 22 ms with the gradients, where the product takes 2.4 and 7.5.

    Args:
        x (Tensor): (B, channels, H, W), float32 on the CPU, for oneDNN.
        conv (nn.Conv2d): unmodified.
    """
    return (
        conv.weight.numel() > 2**20
        and is_plain(conv)
        and x.numel() // x.shape[1] <= 128 * conv.stride[0] * conv.stride[1]
    )


def convolve_windows(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Compute ``conv(x)`` as the product of its weight and the windows under its kernel.

    Args:
        x (Tensor): (B, channels, H, W).
        conv (nn.Conv2d): of one group, padded with zeros.

    Returns:
        Tensor: (B, out, H out, W out), channels last in memory.
    """
    windows = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    span = conv.dilation[0] * (conv.kernel_size[0] - 1)
    height = (x.shape[2] + 2 * conv.padding[0] - span - 1) // conv.stride[0] + 1
    out = F.linear(windows.transpose(1, 2), conv.weight.flatten(1), conv.bias)
    return out.unflatten(1, (height, -1)).permute(0, 3, 1, 2)


def convolve(x: Tensor, weight: Tensor, bias: Optional[Tensor], stride, padding) -> Tensor:
    """Compute ``F.conv2d``, with a faster gradient of the weight where there is one.

    Args:
        x (Tensor): (B, channels, H, W), float32 on the CPU.
        weight, bias (Tensor): (out, channels, *kernel) and (out,) or None.
        stride, padding (tuple[int, int]): along rows and columns.

    Returns:
        Tensor: (B, out, H out, W out).
    """
    if torch.is_grad_enabled() and weight.requires_grad and weight_gradient_suits(x, weight):
        return Convolution.apply(x, weight, bias, stride, padding)
    return F.conv2d(x, weight, bias, stride, padding)


def weight_gradient_suits(x: Tensor, weight: Tensor) -> bool:
    """Check whether :func:`.convolution_native.weight_gradient` takes a convolution, and is faster.

    With AVX2, oneDNN's takes up to seven times as long as the output: at 800x1216, 0.25 s in the
    three mergings and 0.08 in the first embedding, where ours takes 0.10 and 0.03.

    Args:
        x (Tensor): (B, channels, H, W), float32 on the CPU, for oneDNN.
        weight (Tensor): (out, channels, *kernel).
    """
    return (
        not native.MISSING
        and torch.backends.cpu.get_cpu_capability() == 'AVX2'
        and weight.shape[1] % 16 == 0
        and x.numel() > SMALL
    )


class Convolution(torch.autograd.Function):
    """Implement :func:`convolve` with :func:`.convolution_native.weight_gradient`."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        (x, weight), (of_x, of_weight, of_bias, *_) = ctx.saved_tensors, ctx.needs_input_grad
        # What differentiates or follows operators needs PyTorch's.
        ours = of_weight and not torch.is_grad_enabled() and not is_intercepted(grad_out, x)
        if ours:
            grad_out = grad_out.contiguous(memory_format=torch.channels_last)
        geometry = *ctx.geometry, [1, 1], False, [0, 0], 1  # dilation; not transposed
        mask = [of_x, of_weight and not ours, of_bias and not ours]
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_out, x, weight, [len(weight)], *geometry, mask
        )
        if ours:
            grad_weight = weight_gradient(grad_out, x, weight.shape[2:], *ctx.geometry)
            # oneDNN would compute the gradient of the weight with it.
            grad_bias = grad_out.sum((0, 2, 3)) if of_bias else None
        return grad_x, grad_weight, grad_bias, None, None
