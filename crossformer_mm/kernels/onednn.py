"""Linear layers and the MLP on the CPU, through oneDNN.

PyTorch multiplies float32 matrices on the CPU with MKL, which leaves half of what
the processors of some makers can do (their 512-bit units) unused, copies the bias
into the result first, and computes GELU in a pass of its own. oneDNN, which is in
the same PyTorch and runs its convolutions, does none of that.

The MLP goes over some rows at a time, so that the hidden layer, four times as wide
as the map, stays in the cache and is never stored whole; the backward pass computes
it again. That costs less time than writing and reading it.
"""
from typing import Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..compat import is_autocast_enabled
from .call import watcher

# Numbers in the part of the hidden layer that is worked on at a time: 4 MB in float32.
CHUNK = 2**20


def onednn_suits(x: Tensor, weight: Tensor) -> bool:
    """Whether these are to be used: float32 on the CPU, no autocast, nobody watching.

    Nor for few tokens in training: oneDNN lays the weight out in its own way first,
    for each of three products. ``torch.backends.mkldnn.flags(enabled=False)`` switches
    it off, as it does for convolutions.
    """
    tokens = x.numel() // x.shape[-1]
    few = 400 if weight.numel() > 2**20 else 128
    return (x.device.type == 'cpu' and x.dtype == torch.float32 and not watcher()
            and not is_autocast_enabled('cpu') and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled
            and (tokens >= few or not torch.is_grad_enabled()))


def onednn_linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """``F.linear(x, weight, bias)`` in value and gradient. Differentiable once.

    Args:
        x (Tensor): (tokens, in) in float32 on the CPU, as are the others.
        weight, bias (Tensor): (out, in) and (out,) or None.

    Returns:
        Tensor: (tokens, out).
    """
    return OneDNNLinear.apply(x, weight, bias)


def onednn_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor,
               bias2: Tensor) -> Tensor:
    """``F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)``. Differentiable once.

    Args:
        x (Tensor): (tokens, channels) in float32 on the CPU, as are the others.
        weight1, bias1 (Tensor): (hidden, channels) and (hidden,).
        weight2, bias2 (Tensor): (channels, hidden) and (channels,).

    Returns:
        Tensor: (tokens, channels).
    """
    return OneDNNMlp.apply(x, weight1, bias1, weight2, bias2)


class OneDNNLinear(torch.autograd.Function):
    """See :func:`onednn_linear`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        need_x, *need_weights = ctx.needs_input_grad
        grad_x = product(grad, weight.t()) if need_x else None
        grads = weight_gradients(grad, x, weight) if any(need_weights) else (None, None)
        return (grad_x, *(g if need else None for g, need in zip(grads, need_weights)))


class OneDNNMlp(torch.autograd.Function):
    """See :func:`onednn_mlp`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor,
                bias2: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight1, bias1, weight2)
        out = x.new_empty(len(x), len(weight2))
        for rows in chunks(len(x), len(weight1)):
            out[rows] = product(F.gelu(product(x[rows], weight1, bias1)), weight2, bias2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        x, weight1, bias1, weight2 = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grad_x = torch.empty_like(x)
        sums = [x.new_zeros(shape) for shape in (weight1.shape, bias1.shape, weight2.shape,
                                                 weight2.shape[:1])]
        for rows in chunks(len(x), len(weight1)):
            hidden = product(x[rows], weight1, bias1)
            grad_act = product(grad_out[rows], weight2.t())
            grad_hidden = torch.ops.aten.gelu_backward(grad_act, hidden)
            grad_x[rows] = product(grad_hidden, weight1.t())
            parts = (*weight_gradients(grad_hidden, x[rows], weight1),
                     *weight_gradients(grad_out[rows], F.gelu(hidden), weight2))
            for total, part in zip(sums, parts):
                total += part
        return (grad_x, *sums)


def product(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """``F.linear(x, weight, bias)`` as a 1x1 convolution of one row of pixels."""
    return F.conv2d(as_pixels(x), weight[:, :, None, None], bias).permute(0, 2, 3, 1).flatten(0, 2)


def as_pixels(x: Tensor) -> Tensor:
    """(tokens, channels) as a view (1, channels, 1, tokens) in the layout channels last."""
    return x.view(1, 1, *x.shape).permute(0, 3, 1, 2)


def weight_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> Tuple[Tensor, Tensor]:
    """``grad.t() @ x`` and ``grad.sum(0)``: those of a 1x1 convolution on one row of pixels."""
    _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        as_pixels(grad), as_pixels(x), weight[:, :, None, None], [len(weight)], [1, 1], [0, 0],
        [1, 1], False, [0, 0], 1, [False, True, True])
    return grad_weight[:, :, 0, 0], grad_bias


def chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices that cover ``range(rows)``, of about CHUNK / width each."""
    count = -(-rows * width // CHUNK)
    step = -(-rows // count)
    for first in range(0, rows, step):
        yield slice(first, first + step)
