"""Group attention on the CPU, forward and backward, one tile of pairs at a time.

PyTorch's fused attention on the CPU has no gradient for the bias: with one that
needs it, ``scaled_dot_product_attention`` stores every weight of every group,
which for long distance attention grows with the square of the image's area.
Here the forward pass still is the fused attention, fed with the bias of a tile
of queries at a time (or, where that is faster, products of batches of groups);
the backward pass computes the weights of a tile again, uses them and forgets
them. What is kept between the two is input and output.

Tiles hold some heads and whole rows of queries of the group, and in the
backward pass some groups, but always all the keys: so the softmax is a plain one.

Queries are taken from the last to the first. Then the bias of a group is two
sliding windows over the table with its offsets flipped, both moving forward
with the query: one strided copy, and its gradient one sum along diagonals.
"""
from typing import Iterator, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..grouping import Segment
from .avx512 import attend_avx512
from .plain import split_heads

# Pairs in a tile: 4 MB in float32. The backward pass holds four such tiles, which
# should fit the last level cache; much smaller ones are lost in calling overhead.
TILE = 2**20

# Members of a group up to which :func:`multiply` is the faster one in float32.
SMALL = 200


def tiled_attention(qkv: Tensor, table: Tensor, segments: Sequence[Segment], num_heads: int,
                    scale: float, avx512: bool = False) -> Tensor:
    """Attention inside the groups of a map, in memory linear in its area.

    Equals, for the queries, keys, values and bias of each segment,

        logits = q @ k.transpose(-1, -2) * scale + bias_of_pairs(table, height, width)
        out = logits.softmax(-1) @ v

    in value and in the gradients of ``qkv`` and ``table``, which are summed in
    float32 where the input is of a smaller type. Differentiable once.

    Args:
        qkv (Tensor): (tokens, 3*heads*d) on the CPU, groups one after another.
        table (Tensor): (heads, 2*H-1, 2*W-1), the bias of every offset.
        segments (Sequence[Segment]): the runs of equally large groups.
        num_heads (int): heads.
        scale (float): factor on ``q @ k``.
        avx512 (bool): the forward pass is :mod:`.avx512`'s, for which nothing may be
            in the way.

    Returns:
        Tensor: (tokens, heads*d) in the type of ``qkv``.
    """
    return TiledAttention.apply(qkv, table, tuple(segments), num_heads, scale, avx512)


class TiledAttention(torch.autograd.Function):
    """See :func:`tiled_attention`."""

    @staticmethod
    def forward(ctx, qkv: Tensor, table: Tensor, segments: Tuple[Segment, ...], num_heads: int,
                scale: float, avx512: bool) -> Tensor:
        out = attend_segments(qkv, table, segments, num_heads, scale, avx512)
        ctx.save_for_backward(qkv, table, out)
        ctx.segments, ctx.num_heads, ctx.scale = segments, num_heads, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        grads = attend_segments_backward(grad_out, *ctx.saved_tensors, ctx.segments, ctx.num_heads,
                                         ctx.scale)
        return (*grads, None, None, None, None)


def attend_segments(qkv: Tensor, table: Tensor, segments: Sequence[Segment], num_heads: int,
                    scale: float, avx512: bool) -> Tensor:
    """The forward pass of :func:`tiled_attention`."""
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    for segment, tokens in runs(segments):
        flipped = centre(table, segment).flip(1, 2)
        if avx512:
            attend_avx512(qkv[tokens], out[tokens], flipped, segment, num_heads, scale)
        else:
            attend(split_heads(qkv[tokens], segment.groups, 3, num_heads),
                   split_heads(out[tokens], segment.groups, 1, num_heads)[0],
                   flipped, segment, scale)
    return out


def attend_segments_backward(grad_out: Tensor, qkv: Tensor, table: Tensor, out: Tensor,
                             segments: Sequence[Segment], num_heads: int,
                             scale: float) -> Tuple[Tensor, Tensor]:
    """The backward pass of :func:`tiled_attention`: gradients of ``qkv`` and ``table``."""
    exact = torch.promote_types(qkv.dtype, torch.float32)
    grad_qkv = torch.empty_like(qkv, dtype=exact)
    grad_table = torch.zeros_like(table, dtype=exact)
    # A caller's autocast would turn the products below to half precision.
    with torch.autocast('cpu', enabled=False):
        for segment, tokens in runs(segments):
            attend_backward(split_heads(grad_out[tokens], segment.groups, 1, num_heads)[0],
                            split_heads(out[tokens], segment.groups, 1, num_heads)[0],
                            split_heads(qkv[tokens], segment.groups, 3, num_heads),
                            split_heads(grad_qkv[tokens], segment.groups, 3, num_heads),
                            table.to(exact), grad_table, segment, scale)
    return grad_qkv.to(qkv.dtype), grad_table.to(table.dtype)


def runs(segments: Sequence[Segment]) -> Iterator[Tuple[Segment, slice]]:
    """Each segment and which tokens are its."""
    start = 0
    for segment in segments:
        end = start + segment.groups * segment.height * segment.width
        yield segment, slice(start, end)
        start = end


def attend(qkv: Tensor, out: Tensor, table: Tensor, segment: Segment, scale: float) -> None:
    """Write the attention of one segment into ``out``.

    Args:
        qkv (Tensor): (3, groups, heads, N, d), of any strides.
        out (Tensor): (groups, heads, N, d), of any strides.
        table (Tensor): (heads, 2*height-1, 2*width-1), flipped: of key - query.
        segment, scale: see :func:`tiled_attention`.
    """
    q, k, v = qkv
    num_groups, num_heads = q.shape[:2]
    multiplied = multiplies(segment, q.dtype)
    size = tile_size(segment, num_heads)
    step = max(1, TILE // 4 // size) if multiplied else num_groups
    scratch = table.new_empty(size)
    for heads, rows in query_tiles(segment, num_heads):
        bias = bias_of_rows(table[heads], segment, rows, scratch).to(q.dtype)
        queries = queries_of_rows(segment, rows)
        for first in range(0, num_groups, step):
            tile = slice(first, first + step), heads
            parts = q[tile][:, :, queries].flip(2), k[tile], v[tile]
            if multiplied:
                attended = multiply(*parts, bias, scale)
            else:
                attended = F.scaled_dot_product_attention(*parts, attn_mask=bias[None], scale=scale)
            out[tile][:, :, queries] = attended.flip(2)


def multiplies(segment: Segment, dtype: torch.dtype) -> bool:
    """Whether :func:`multiply` is faster than PyTorch's fused attention.

    It is for small groups, on which that one spends its time between products,
    and in bfloat16, in which that one gains nothing over float32.
    """
    return dtype == torch.bfloat16 or segment.height * segment.width <= SMALL


def multiply(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """``(q @ k.mT * scale + bias).softmax(-1) @ v``.

    Args:
        q, k, v (Tensor): (groups, heads, n, d) each.
        bias (Tensor): (heads, queries, keys).
        scale (float): factor on ``q @ k``.
    """
    groups, heads = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    if groups == 1:
        logits = torch.baddbmm(bias, q, k.mT, alpha=scale)
    else:
        logits = torch.bmm(q, k.mT)
        by_group = logits.view(groups, *bias.shape)
        torch.add(bias, by_group, alpha=scale, out=by_group)
    return torch.bmm(logits.softmax(-1), v).view(groups, heads, logits.shape[1], -1)


def attend_backward(grad_out: Tensor, out: Tensor, qkv: Tensor, grad_qkv: Tensor, table: Tensor,
                    grad_table: Tensor, segment: Segment, scale: float) -> None:
    """Write the gradients of one segment to ``grad_qkv``, add to ``grad_table``.

    Equals, with the weights ``p`` of each group,

        grad_v = p.mT @ grad_out
        grad_logits = p * (grad_out @ v.mT - (grad_out * out).sum(-1, keepdim=True))
        grad_q, grad_k = scale * grad_logits @ k, scale * grad_logits.mT @ q

    and ``grad_logits``, summed over groups, is the gradient of the bias.

    Args:
        grad_out, out (Tensor): (groups, heads, N, d).
        qkv, grad_qkv (Tensor): (3, groups, heads, N, d).
        table, grad_table (Tensor): (heads, 2*H-1, 2*W-1), in the type to compute in.
        segment, scale: see :func:`tiled_attention`.
    """
    num_groups, num_heads = grad_out.shape[:2]
    table = centre(table, segment).flip(1, 2)
    grad_flipped = torch.zeros_like(table)
    size = tile_size(segment, num_heads)
    step = min(num_groups, max(1, TILE // size))
    scratch, grad_scratch = table.new_empty(2, size)
    pairs = table.new_empty(2, step * size)
    for heads, rows in query_tiles(segment, num_heads):
        bias = bias_of_rows(table[heads], segment, rows, scratch)
        grad_bias = grad_scratch[:bias.numel()].view_as(bias).zero_()
        queries = queries_of_rows(segment, rows)
        for first in range(0, num_groups, step):
            tile = slice(first, first + step), heads
            attend_backward_tile(grad_out[tile][:, :, queries], out[tile][:, :, queries],
                                 qkv[(slice(None), *tile)], grad_qkv[(slice(None), *tile)],
                                 bias, grad_bias, queries, scale, pairs, first_rows=rows.start == 0)
        add_bias_of_rows(grad_flipped[heads], grad_bias, segment, rows)
    centre(grad_table, segment).add_(grad_flipped.flip(1, 2))


def attend_backward_tile(grad_out: Tensor, out: Tensor, qkv: Tensor, grad_qkv: Tensor,
                         bias: Tensor, grad_bias: Tensor, queries: slice, scale: float,
                         scratch: Tensor, first_rows: bool) -> None:
    """The step of :func:`attend_backward` for some groups, heads and queries.

    Args:
        grad_out, out (Tensor): (groups, heads, queries, d).
        qkv, grad_qkv (Tensor): (3, groups, heads, N, d).
        bias, grad_bias (Tensor): (heads, queries, N), the last query first.
        queries (slice): which of the N.
        scratch (Tensor): (2, groups*heads*queries*N or more) to compute in.
        first_rows (bool): write the gradients of keys and values, which the
            tiles with other queries of the groups then add to.
    """
    groups, heads = grad_out.shape[:2]

    def batch(x: Tensor) -> Tensor:  # (groups, heads, n, d) to (groups*heads, n, d)
        return x.to(bias.dtype).flatten(0, 1)

    def unbatch(x: Tensor) -> Tensor:
        return x.view(groups, heads, *x.shape[1:])

    q, k, v = batch(qkv[0, :, :, queries].flip(2)) * scale, batch(qkv[1]), batch(qkv[2])
    grad_out, out = batch(grad_out.flip(2)), batch(out.flip(2))
    weights, grad_logits = scratch[:, :groups * bias.numel()].view(2, groups * heads,
                                                                   *bias.shape[1:])
    unbatch(weights).copy_(bias)
    torch.softmax(weights.baddbmm_(q, k.mT), -1, out=weights)
    grad_logits.copy_((grad_out * out).sum(-1, keepdim=True))
    grad_logits.baddbmm_(grad_out, v.mT, beta=-1).mul_(weights)
    # Straight into the sum over groups; sum(0) would need a tile for its result.
    sums = grad_bias.view(-1)
    torch.addmv(sums, grad_logits.view(groups, -1).T, sums.new_ones(groups), out=sums)

    put = torch.Tensor.copy_ if first_rows else torch.Tensor.add_
    grad_qkv[0, :, :, queries] = unbatch(torch.bmm(grad_logits, k).mul_(scale)).flip(2)
    put(grad_qkv[1], unbatch(torch.bmm(grad_logits.mT, q)))
    put(grad_qkv[2], unbatch(torch.bmm(weights.mT, grad_out)))


def tile_shape(segment: Segment, num_heads: int) -> Tuple[int, int]:
    """Heads and rows of queries whose pairs with all keys of a group make a tile."""
    _, height, width = segment
    pairs_of_row = width * height * width
    heads = min(num_heads, max(1, TILE // (pairs_of_row * height)))
    rows = min(height, max(1, TILE // (pairs_of_row * heads)))
    return heads, -(-height // -(-height // rows))  # as many tiles, of more equal rows


def tile_size(segment: Segment, num_heads: int) -> int:
    """Pairs of the largest of :func:`query_tiles`."""
    heads, rows = tile_shape(segment, num_heads)
    return heads * rows * segment.width * segment.height * segment.width


def query_tiles(segment: Segment, num_heads: int) -> Iterator[Tuple[slice, slice]]:
    """Slices of the heads and of a group's rows, one pair for each tile of queries.

    Rows are counted from the last, here and below.
    """
    heads, rows = tile_shape(segment, num_heads)
    for head in range(0, num_heads, heads):
        for row in range(0, segment.height, rows):
            yield (slice(head, min(head + heads, num_heads)),
                   slice(row, min(row + rows, segment.height)))


def queries_of_rows(segment: Segment, rows: slice) -> slice:
    """The members in rows that are counted from the last."""
    _, height, width = segment
    return slice((height - rows.stop) * width, (height - rows.start) * width)


def centre(table: Tensor, segment: Segment) -> Tensor:
    """The offsets that occur in a segment, a view (heads, 2*height-1, 2*width-1)."""
    _, height, width = segment
    top, left = table.shape[1] // 2 - (height - 1), table.shape[2] // 2 - (width - 1)
    return table[:, top:top + 2 * height - 1, left:left + 2 * width - 1]


def bias_of_rows(table: Tensor, segment: Segment, rows: slice, scratch: Tensor) -> Tensor:
    """The bias of some rows of queries, taken from the last to the first.

    Equals ``bias_of_pairs(table.flip(1, 2), height, width).flip(1)`` at them.

    Args:
        table (Tensor): (heads, 2*height-1, 2*width-1), flipped: of key - query.
        segment (Segment): the size of the group.
        rows (slice): rows of queries, counted from the last.
        scratch (Tensor): storage to write to, as long as the result at least.

    Returns:
        Tensor: (heads, queries, height*width).
    """
    _, height, width = segment
    reach = slice(rows.start, rows.stop + height - 1)
    # (heads, query row, query column, key row, key column)
    windows = table[:, reach].unfold(1, height, 1).unfold(2, width, 1)
    bias = scratch[:windows.numel()].view(windows.shape).copy_(windows)
    return bias.view(len(table), -1, height * width)


def add_bias_of_rows(table: Tensor, bias: Tensor, segment: Segment, rows: slice) -> None:
    """Add a gradient to where :func:`bias_of_rows` had read; its transpose."""
    heads, (_, height, width) = len(table), segment
    reach = slice(rows.start, rows.stop + height - 1)
    by_row = bias.view(heads, -1, width, height, width).transpose(2, 3)
    by_column = sum_diagonals(by_row.reshape(heads, -1, height, width * width))
    by_column = by_column.reshape(-1, width, width, 1)
    table[:, reach] += sum_diagonals(by_column).view(heads, -1, 2 * width - 1)


def sum_diagonals(x: Tensor) -> Tensor:
    """Sum the entries ``x[:, i, j]`` of equal ``i + j``: (n, a, b, m) to (n, a+b-1, m).

    Rows of a+b entries, read as rows of a+b-1, stand one further right each.
    """
    n, a, b, m = x.shape
    padded = x.new_zeros(n, a, a + b, m)
    padded[:, :, :b] = x
    return padded.flatten(1, 2)[:, :a * (a + b - 1)].view(n, a, a + b - 1, m).sum(1)
