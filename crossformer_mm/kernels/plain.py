"""Attention inside groups in plain PyTorch: the definition that the other paths are held to."""

import operator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..grouping import AxisRule, group_map
from ..position_bias import bias_of_pairs


def attend(
    qkv: Tensor,
    table: Tensor,
    rows: AxisRule,
    columns: AxisRule,
    num_heads: int,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """See :func:`crossformer_mm.kernels.map_attention`; the groups of one size at a time."""
    # A compiler that kept the sides symbolic here would follow every ragged group there may be
    # (minutes); index() tells it to compile anew for each size (seconds).
    height, width = map(operator.index, qkv.shape[1:3])
    groups = group_map(height, width, rows, columns, qkv.device)
    tokens, attended = qkv.flatten(1, 2), []
    for members in groups:
        q, k, v = rearrange(
            tokens.index_select(1, members.flatten()),
            'b (g n) (three h d) -> three (b g) h n d',
            g=len(members),
            three=3,
            h=num_heads,
        )
        bias = bias_of_pairs(table, *members.shape[1:]).to(qkv.dtype)
        out = F.scaled_dot_product_attention(q, k, v, bias[None], dropout, scale=scale)
        attended.append(rearrange(out, '(b g) h n d -> b (g n) (h d)', b=len(qkv)))
    order = torch.cat([members.flatten() for members in groups])
    return torch.cat(attended, 1).index_select(1, order.argsort()).unflatten(1, (height, width))
