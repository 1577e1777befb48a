"""Long-short distance attention: attention inside the groups of a map."""
from typing import Optional, Tuple

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from .grouping import Grouping
from .kernels import check_path, group_attention, map_attention, works_on_maps
from .linear import Linear
from .position_bias import build_position_bias


def reorder(tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``tokens[order]`` for a permutation whose inverse is ``inverse``."""
    if torch.jit.is_tracing():  # a trace with a Python function in it cannot be saved
        return tokens.index_select(0, order)
    return Reorder.apply(tokens, order, inverse)


class Reorder(torch.autograd.Function):
    """``tokens[order]``, whose gradient is the gather ``grad[inverse]``.

    Autograd's own gradient of indexing adds into a zeroed tensor, for it cannot
    know that ``order`` is a permutation; on the CPU that is many times slower.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return tokens.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return Reorder.apply(grad, inverse, order), None, None


class GroupAttention(BaseModule):
    """Multi-head attention among the members of each group, with position bias.

    Which groups these are, short or long distance, comes with the call; the
    parameters are the same for both (arXiv 2108.00154, section 3.2).

    Args:
        channels (int): channels of the map, a multiple of ``num_heads``.
        num_heads (int): attention heads.
        qkv_bias (bool): give the projection to queries, keys, values a bias.
        qk_scale (float, optional): factor on the logits. None: head_dim^-0.5.
        attn_drop_rate (float): dropout on attention weights while training.
        proj_drop_rate (float): dropout on the output while training.
        path (str, optional): how to compute, see :mod:`crossformer_mm.kernels`.
            None: chosen by device and mode.
        position_bias (str): one of :mod:`crossformer_mm.position_bias`.
        group_size (int): G, for a position bias that has a size.
    """

    def __init__(self, channels: int, num_heads: int, qkv_bias: bool = True, qk_scale=None,
                 attn_drop_rate: float = 0., proj_drop_rate: float = 0.,
                 path: Optional[str] = None, position_bias: str = 'dynamic',
                 group_size: int = 7):
        super().__init__()
        check_path(path)
        self.num_heads = num_heads
        self.scale = (channels // num_heads)**-0.5 if qk_scale is None else qk_scale
        self.attn_drop_rate = attn_drop_rate
        self.path = path
        self.pos = build_position_bias(position_bias, channels, num_heads, group_size)
        self.qkv = Linear(channels, channels * 3, bias=qkv_bias)
        self.proj = Linear(channels, channels)
        self.proj_drop = nn.Dropout(proj_drop_rate)

    @property
    def dropout(self) -> float:
        """Of attention weights, in the present mode."""
        return self.attn_drop_rate if self.training else 0.

    def works_in_place(self, x: Tensor) -> bool:
        """Whether no token of the map need be moved, so that a grouping without order will do."""
        return works_on_maps(x.device, x.dtype, x.shape[-1] // self.num_heads, self.dropout,
                             self.path)

    def forward(self, x: Tensor, grouping: Grouping) -> Tensor:
        """(B, H, W, C) to the same, each position attending within its group."""
        if self.works_in_place(x) and not grouping.is_shifted:
            out = map_attention(self.qkv(x), self.pos(*grouping.extent), grouping.rows,
                                grouping.columns, self.num_heads, self.scale, self.path)
            return self.proj_drop(self.proj(out))

        tokens = reorder(x.flatten(0, 2), grouping.order, grouping.inverse)
        qkv = self.qkv(tokens)  # (B*H*W, 3*C)
        table = self.pos(*grouping.extent)
        out = group_attention(qkv, table, grouping.segments, self.num_heads, self.scale,
                              self.dropout, self.path)
        out = self.proj_drop(self.proj(out))
        return reorder(out, grouping.inverse, grouping.order).view_as(x)
