"""Attention in the groups of a map of one size, with tokens ordered group by group."""

from typing import List, Sequence

import torch
from torch import Tensor

from ...position_bias import bias_of_pairs


@torch.library.custom_op('crossformer_mm::fixed_size_attention', mutates_args=())
def fixed_size_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    segments: Sequence[int],
    num_heads: int,
    scale: float,
) -> Tensor:
    """Compute attention of tokens that stand group by group.

    Args:
        q, k, v (Tensor): (tokens, C).
        table (Tensor): (heads, 2*R-1, 2*S-1), the bias of each offset in groups of R x S.
        segments: of each size of group, one after the other, how many groups there are, and of how
            many rows and columns.
        num_heads, scale: as of :func:`crossformer_mm.kernels.map_attention`.

    Returns:
        Tensor: (tokens, C).
    """
    start, outs = 0, []
    for groups, rows, columns in triples(segments):
        stop = start + groups * rows * columns
        queries, keys, values = (
            one[start:stop].view(groups, rows * columns, num_heads, -1).transpose(1, 2)
            for one in (q, k, v)
        )
        start = stop
        logits = queries * scale @ keys.transpose(-1, -2) + bias_of_pairs(table, rows, columns)
        outs.append((logits.softmax(-1) @ values).transpose(1, 2).flatten(0, 1).flatten(1))
    return torch.cat(outs)


@fixed_size_attention.register_fake
def _(q, k, v, table, segments, num_heads, scale):
    return torch.empty_like(q)


def triples(numbers: Sequence[int]) -> List[Sequence[int]]:
    return [numbers[at : at + 3] for at in range(0, len(numbers), 3)]


CHUNK = 96e6  # bytes of attention weights computed at a time


def to_onnx(op, q, k, v, table, segments, num_heads, scale):
    start, outs = 0, []
    for groups, rows, columns in triples(segments):
        members = rows * columns
        bias = table
        for axis, size in ((1, rows), (2, columns)):
            zero = table.shape[axis] // 2  # where the offset 0 stands
            offsets = [zero + query - key for query in range(size) for key in range(size)]
            bias = op.Gather(bias, offsets, axis=axis)
        bias = op.Reshape(bias, [num_heads, rows, rows, columns, columns])
        bias = op.Transpose(bias, perm=[0, 1, 3, 2, 4])
        bias = op.Reshape(bias, [num_heads, members, members])
        chunks = min(groups, max(1, round(groups * num_heads * members**2 * 4 / CHUNK)))
        for chunk in range(chunks):
            count = groups * (chunk + 1) // chunks - groups * chunk // chunks
            stop = start + count * members
            queries, keys, values = (
                op.Reshape(op.Slice(one, [start], [stop], [0]), [count, members, num_heads, -1])
                for one in (q, k, v)
            )
            start = stop
            queries = op.Transpose(queries, perm=[0, 2, 1, 3]) * scale
            logits = queries @ op.Transpose(keys, perm=[0, 2, 3, 1]) + bias
            out = op.Softmax(logits, axis=-1) @ op.Transpose(values, perm=[0, 2, 1, 3])
            out = op.Transpose(out, perm=[0, 2, 1, 3])
            outs.append(op.Reshape(out, [-1, q.shape[1]]))
    return op.Concat(*outs, axis=0)
