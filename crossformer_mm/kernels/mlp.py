"""MLP of a block on the CPU in float32, with less of its hidden layer in memory.

The hidden layer is four times as wide as the map. PyTorch's layers keep it twice for the backward
pass, before and after GELU; here it is kept once. A large one is recomputed instead, in chunks of
rows that stay in the cache.
"""

from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .onednn import onednn_linear, onednn_suits, onednn_weight_gradients
from .operator import is_intercepted

# Numbers in a chunk of the hidden layer, by trials: backward, and forward for maps of few channels,
# whose products are limited by memory.
CHUNK = 2**21
NARROW, NARROW_CHUNK = 192, 2**20
# Numbers of the largest hidden layer that is computed at once, or kept.
KEPT = 2**23
# Numbers of the largest hidden layer that is left to PyTorch's layers, which are as fast there.
SMALL = 2**21


def mlp_suits(x: Tensor, hidden: int) -> bool:
    """Check for a hidden layer so large that :func:`mlp` is better than PyTorch's layers."""
    return x.numel() // x.shape[-1] * hidden > SMALL


def mlp(
    x: Tensor, weight1: Tensor, bias1: Optional[Tensor], weight2: Tensor, bias2: Optional[Tensor]
) -> Tensor:
    """Compute ``F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)``.

    Differentiable any number of times.

    Args:
        x (Tensor): (tokens, channels), one or more tokens, in float32 on the CPU, as are the
            others.
        weight1, bias1 (Tensor): (hidden, channels) and (hidden,) or None.
        weight2, bias2 (Tensor): (out, hidden) and (out,) or None.

    Returns:
        Tensor: (tokens, out).
    """
    layers = weight1, bias1, weight2, bias2
    return ChunkedMlp.apply(x, *layers, onednn_suits(x, weight1), torch.is_grad_enabled())


class ChunkedMlp(torch.autograd.Function):
    """Implement :func:`mlp`."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, onednn: bool, train: bool) -> Tensor:
        ctx.linear, ctx.weight_gradients = (
            (onednn_linear, onednn_weight_gradients) if onednn else (F.linear, weight_gradients)
        )
        # Under no_grad, parameters need gradients, too; in here, is_grad_enabled() is always False.
        if train and any(ctx.needs_input_grad) and len(x) * len(weight1) <= KEPT:
            ctx.chunks = [slice(None)]
            hidden = ctx.linear(x, weight1, bias1)
            ctx.save_for_backward(x, weight1, bias1, weight2, hidden)
            return ctx.linear(F.gelu(hidden), weight2, bias2)
        ctx.chunks = chunks(len(x), len(weight1), CHUNK)
        ctx.save_for_backward(x, weight1, bias1, weight2)
        out = x.new_empty(len(x), len(weight2))
        numbers = NARROW_CHUNK if x.shape[1] < NARROW else KEPT
        for rows in chunks(len(x), len(weight1), numbers):
            # In place, so that more of it stays in the cache.
            hidden = torch.ops.aten.gelu_(ctx.linear(x[rows], weight1, bias1))
            if onednn or bias2 is None:
                out[rows] = ctx.linear(hidden, weight2, bias2)
            else:
                torch.addmm(bias2, hidden, weight2.t(), out=out[rows])
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        x, weight1, bias1, weight2, *kept = ctx.saved_tensors
        # All operators are differentiable and act on tensors with a history, which a hidden layer
        # that was kept has not, so that PyTorch can differentiate the gradient again.
        if torch.is_grad_enabled():  # create_graph=True
            kept = []
        in_place = not torch.is_grad_enabled() and not is_intercepted(grad_out)
        grad_out, grads_x, sums = grad_out.contiguous(), [], ()
        for rows in ctx.chunks:
            hidden = kept[0] if kept else ctx.linear(x[rows], weight1, bias1)
            second = ctx.weight_gradients(grad_out[rows], F.gelu(hidden), weight2)
            grad = ctx.linear(grad_out[rows], weight2.t())
            if in_place:
                torch.ops.aten.gelu_backward(grad, hidden, grad_input=grad)
            else:
                grad = torch.ops.aten.gelu_backward(grad, hidden)
            parts = (*ctx.weight_gradients(grad, x[rows], weight1), *second)
            sums = [total + part for total, part in zip(sums, parts)] if sums else parts
            grads_x.append(ctx.linear(grad, weight1.t()))
        grad_x = grads_x[0] if len(grads_x) == 1 else torch.cat(grads_x)
        grads = grad_x, *sums, None, None
        return tuple(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad))


def weight_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> Tuple[Tensor, Tensor]:
    """Return the gradients of the weight and the bias of ``F.linear(x, weight, bias)``."""
    return grad.t() @ x, grad.sum(0)


def chunks(rows: int, width: int, numbers: int) -> List[slice]:
    """Return slices that cover ``range(rows)``, of about ``numbers / width`` each."""
    count = max(1, -(-rows * width // numbers))
    step = max(1, -(-rows // count))
    return [slice(first, first + step) for first in range(0, rows, step)]
