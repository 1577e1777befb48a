"""The MLP of a block on the CPU in float32, some rows at a time.

The hidden layer is four times as wide as the map. In parts it stays in the cache, and their memory
is used again for each: new memory is mapped by the system page by page, which took a fifth of the
time. Where the whole layer is large it is never stored, and the backward pass computes it again.
"""

from typing import List, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .onednn import onednn_suits, product, weight_gradients

# Numbers in the part of the hidden layer that is worked on at a time: 4 MB in float32 where oneDNN
# multiplies, 16 MB where MKL does, and as many numbers in other types, each the fastest of several
# on one processor.
ONEDNN_CHUNK, CHUNK = 2**20, 2**22
# Numbers of a hidden layer that is small enough to be kept for the backward pass, 32 MB: those of
# small images, and the last stages' of large ones. A training step on images of 224x224 takes
# 0.9 of the time with it.
KEPT = 2**23


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """``F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)``. Differentiable once.

    Args:
        x (Tensor): (tokens, channels) in float32 on the CPU, as are the others.
        weight1, bias1 (Tensor): (hidden, channels) and (hidden,).
        weight2, bias2 (Tensor): (channels, hidden) and (channels,).

    Returns:
        Tensor: (tokens, channels).
    """
    return ChunkedMlp.apply(
        x, weight1, bias1, weight2, bias2, onednn_suits(x, weight1), torch.is_grad_enabled()
    )


class ChunkedMlp(torch.autograd.Function):
    """See :func:`mlp`."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, onednn: bool, training: bool) -> Tensor:
        ctx.parts = chunks(len(x), len(weight1), ONEDNN_CHUNK if onednn else CHUNK)
        ctx.onednn = onednn
        kept = (
            x.new_empty(len(x), len(weight1))
            if training and len(x) * len(weight1) <= KEPT
            else None
        )
        hidden, act = part_buffers(x, weight1, ctx.parts)
        out = x.new_empty(len(x), len(weight2))
        for rows in ctx.parts:
            count = len(x[rows])
            place = hidden[:count] if kept is None else kept[rows]
            part = multiply(x[rows], weight1.t(), place, onednn, bias1)
            if kept is not None:
                put(part, place)
            torch.ops.aten.gelu.out(part, out=act[:count])
            put(multiply(act[:count], weight2.t(), out[rows], onednn, bias2), out[rows])
        ctx.save_for_backward(x, weight1, bias1, weight2, kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        x, weight1, bias1, weight2, kept = ctx.saved_tensors
        grad_out, grad_x = grad_out.contiguous(), torch.empty_like(x)
        grad_weight1, grad_weight2 = torch.zeros_like(weight1), torch.zeros_like(weight2)
        grad_bias1, grad_bias2 = torch.zeros_like(bias1), weight2.new_zeros(len(weight2))
        buffers = part_buffers(x, weight1, ctx.parts)
        for rows in ctx.parts:
            hidden, act = buffers[:, : len(x[rows])]
            hidden = (
                multiply(x[rows], weight1.t(), hidden, ctx.onednn, bias1)
                if kept is None
                else kept[rows]
            )
            torch.ops.aten.gelu.out(hidden, out=act)
            add_gradients(grad_out[rows], act, grad_weight2, grad_bias2, ctx.onednn)
            grad = multiply(grad_out[rows], weight2, act, ctx.onednn)  # in the place of act
            torch.ops.aten.gelu_backward.grad_input(grad, hidden, grad_input=grad)
            add_gradients(grad, x[rows], grad_weight1, grad_bias1, ctx.onednn)
            put(multiply(grad, weight1, grad_x[rows], ctx.onednn), grad_x[rows])
        return grad_x, grad_weight1, grad_bias1, grad_weight2, grad_bias2, None, None


def part_buffers(x: Tensor, weight1: Tensor, parts: list) -> Tensor:
    """(2, rows, hidden): memory for parts of the hidden layer before and after its activation."""
    return x.new_empty(2, len(x[parts[0]]) if parts else 0, len(weight1))


def multiply(
    x: Tensor, matrix: Tensor, place: Tensor, onednn: bool, bias: Optional[Tensor] = None
) -> Tensor:
    """``x @ matrix + bias``, in ``place`` if the library takes one."""
    if onednn:
        return product(x, matrix.t(), bias)
    if bias is None:
        return torch.mm(x, matrix, out=place)
    return torch.addmm(bias, x, matrix, out=place)


def put(result: Tensor, place: Tensor) -> None:
    """Copy it there unless it is there already."""
    if result.data_ptr() != place.data_ptr():
        place.copy_(result)


def add_gradients(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, onednn: bool) -> None:
    """``weight += grad.t() @ x`` and ``bias += grad.sum(0)``, the gradients of both."""
    if onednn:
        for total, part in zip((weight, bias), weight_gradients(grad, x, weight)):
            total += part
    else:
        weight.addmm_(grad.t(), x)
        bias += grad.sum(0)


def chunks(rows: int, width: int, numbers: int) -> List[slice]:
    """Slices that cover ``range(rows)``, of about ``numbers / width`` each."""
    count = max(1, -(-rows * width // numbers))
    step = max(1, -(-rows // count))
    return [slice(first, first + step) for first in range(0, rows, step)]
