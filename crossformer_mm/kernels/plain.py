"""Attention inside groups in PyTorch: the definition that the other paths are compared with."""

import operator
from contextlib import nullcontext
from typing import Iterator, List, Tuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..compat import math_attention
from ..exact import CAPTURES, TRANSFORMS, interception
from ..grouping import AxisRule, group_map
from ..position_bias import bias_of_pairs

MOST_GROUPS = 65535  # of one call: a limit of PyTorch's memory-efficient attention on CUDA
MOST_PAIRS = 2**27  # of one step of `gradients`, which holds five matrices of them


def attend(
    qkv: Tensor,
    table: Tensor,
    rows: AxisRule,
    columns: AxisRule,
    num_heads: int,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Compute :func:`crossformer_mm.kernels.map_attention`, the groups of one size at a time."""
    groups, order, inverse = sort_by_group(qkv, rows, columns)
    tokens, attended = permute(qkv.flatten(1, 2), order, inverse), []
    for members, part in split_by_size(tokens, groups):
        q, k, v = heads_of_groups(part, members, 3, num_heads)
        bias = bias_of_pairs(table, *members.shape[1:]).to(qkv.dtype)[None]
        out = scaled_attention(q, k, v, bias, dropout, scale)
        # Not len(qkv): torch.jit.trace would record it as a constant.
        attended.append(rearrange(out, '(b g) h n d -> b (g n) (h d)', b=qkv.shape[0]))
    return permute(torch.cat(attended, 1), inverse, order).view(*qkv.shape[:3], -1)


def gradients(
    grad_out: Tensor,
    qkv: Tensor,
    table: Tensor,
    rows: AxisRule,
    columns: AxisRule,
    num_heads: int,
    scale: float,
) -> Tuple[Tensor, Tensor]:
    """Compute the gradients of :func:`attend` without autograd.

    For code that runs inside an operator or in another thread during a backward pass, where
    autograd is off or would wait for that pass.

    Args:
        grad_out (Tensor): (B, H, W, heads*d), the gradient of the output.
        qkv, table, rows, columns, num_heads, scale: as of :func:`attend`.

    Returns:
        tuple[Tensor, Tensor]: the gradients of ``qkv`` and of ``table``, in their types.
    """
    groups, order, inverse = sort_by_group(qkv, rows, columns)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    grad_table = table.new_zeros(table.shape, dtype=wide).flatten(1)
    offsets = torch.arange(grad_table.shape[1], device=qkv.device).view(1, *table.shape[1:])
    maps = [x.flatten(1, 2).index_select(1, order) for x in (qkv, grad_out)]
    grads = []
    for (members, part), (_, grad) in zip(*(split_by_size(x, groups) for x in maps)):
        height, width = members.shape[1:]
        bias = bias_of_pairs(table, height, width).to(wide)
        places = bias_of_pairs(offsets, height, width).flatten()
        step = max(1, MOST_PAIRS // bias.numel())
        inputs = (*heads_of_groups(part, members, 3, num_heads),)
        inputs += (*heads_of_groups(grad, members, 1, num_heads),)
        outputs = []
        for q, k, v, g in zip(*(x.to(wide).split(step) for x in inputs)):
            weights = (scale * q @ k.mT + bias).softmax(-1)
            grad_weights = g @ v.mT
            grad_logits = grad_weights - (weights * grad_weights).sum(-1, keepdim=True)
            grad_logits = weights * grad_logits
            grad_table.index_add_(1, places, grad_logits.sum(0).flatten(1))
            grad_q, grad_k = scale * grad_logits @ k, scale * grad_logits.mT @ q
            outputs.append(torch.stack([grad_q, grad_k, weights.mT @ g]))
        grads.append(
            rearrange(torch.cat(outputs, 1), 'three (b g) h n d -> b (g n) (three h d)', b=len(qkv))
        )
    grad_qkv = torch.cat(grads, 1).index_select(1, inverse).view(qkv.shape)
    return grad_qkv.to(qkv.dtype), grad_table.view(table.shape).to(table.dtype)


def sort_by_group(
    qkv: Tensor, rows: AxisRule, columns: AxisRule
) -> Tuple[List[Tensor], Tensor, Tensor]:
    """Return the groups of a map, the permutation that sorts positions by group, its inverse."""
    # A compiler that kept the sides symbolic here would trace every ragged group there may be
    # (minutes); index() makes it recompile for each size (seconds).
    height, width = map(operator.index, qkv.shape[1:3])
    groups = group_map(height, width, rows, columns, qkv.device)
    order = torch.cat([members.flatten() for members in groups])
    return groups, order, order.argsort()


def split_by_size(tokens: Tensor, groups: List[Tensor]) -> Iterator[Tuple[Tensor, Tensor]]:
    """Split tokens in the order of groups, (B, H*W, C), into those of each array of groups."""
    return zip(groups, tokens.split([members.numel() for members in groups], 1))


def heads_of_groups(part: Tensor, members: Tensor, count: int, num_heads: int) -> Tensor:
    """Rearrange (B, groups*members, count*heads*d) to (count, B*groups, heads, members, d)."""
    return rearrange(
        part, 'b (g n) (count h d) -> count (b g) h n d', g=len(members), count=count, h=num_heads
    )


def scaled_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float, scale: float
) -> Tensor:
    """``F.scaled_dot_product_attention`` of any number of groups."""
    follower = interception()
    # PyTorch's fused attention has no rule for a transform of the bias.
    with math_attention() if follower in TRANSFORMS else nullcontext():
        if follower == 'export' or len(q) <= MOST_GROUPS:  # an exported graph takes any number
            return F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale)
        parts = zip(*(x.split(MOST_GROUPS) for x in (q, k, v)))
        return torch.cat(
            [F.scaled_dot_product_attention(*part, bias, dropout, scale=scale) for part in parts]
        )


class Permutation(torch.autograd.Function):
    """Compute ``x.index_select(1, order)`` with a gradient that gathers, too.

    The gradient of ``index_select`` adds with atomics on CUDA, because an index may occur twice.

    Args:
        x (Tensor): (B, N, C).
        order, inverse (Tensor): (N,), a permutation of ``range(N)`` and its inverse.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(1, order)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad: Tensor):
        order, inverse = ctx.saved_tensors
        return Permutation.apply(grad, inverse, order), None, None

    @staticmethod
    def jvp(ctx, tangent: Tensor, *_):
        order, inverse = ctx.saved_tensors
        return Permutation.apply(tangent, order, inverse)


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Compute ``x.index_select(1, order)`` by :class:`Permutation` where a gradient is needed."""
    if x.requires_grad and torch.is_grad_enabled() and interception() not in CAPTURES:
        return Permutation.apply(x, order, inverse)
    return x.index_select(1, order)
