"""Group attention in plain PyTorch: the definition that fast paths are held to."""
from typing import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..grouping import Segment
from ..position_bias import bias_of_pairs


def split_heads(tokens: Tensor, groups: int, parts: int, num_heads: int) -> Tensor:
    """(groups*N, parts*heads*d) as a view (parts, groups, heads, N, d)."""
    return rearrange(tokens, '(g n) (parts h d) -> parts g h n d', g=groups, parts=parts,
                     h=num_heads)


def plain_attention(qkv: Tensor, table: Tensor, segments: Sequence[Segment], num_heads: int,
                    scale: float, dropout: float = 0.) -> Tensor:
    """Attention inside the groups of a map, each segment in one call of PyTorch's.

    Runs on every device, under ``torch.compile`` and tracing, and with dropout.

    Args:
        qkv (Tensor): (tokens, 3*heads*d), groups one after another.
        table (Tensor): (heads, 2*H-1, 2*W-1), the bias of every offset.
        segments (Sequence[Segment]): the runs of equally large groups.
        num_heads (int): heads.
        scale (float): factor on ``q @ k``.
        dropout (float): dropout of the attention weights.

    Returns:
        Tensor: (tokens, heads*d).
    """
    attended, start = [], 0
    for groups, height, width in segments:
        end = start + groups * height * width
        q, k, v = split_heads(qkv[start:end], groups, 3, num_heads)
        bias = bias_of_pairs(table, height, width)[None].to(qkv.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout,
                                             scale=scale)
        attended.append(rearrange(out, 'g h n d -> (g n) (h d)'))
        start = end
    return torch.cat(attended)
