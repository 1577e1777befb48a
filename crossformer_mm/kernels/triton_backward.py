"""Backward pass of fused attention: its Triton kernels and their launch. Imports triton.

The gradient of the table is summed in two steps, without atomic writes: first over groups, pair
by pair, then over the pairs of each offset. Each sum has one program and a fixed order.
"""

from typing import Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grouping import AxisRule
from . import triton_launch
from .triton_blocks import (
    LOG2E,
    SIZES,
    find_group,
    load_bias,
    load_rows,
    locate_group,
    multiply,
    next_group,
    place_members,
    share_of,
    split_number,
    spread_members,
    start_group,
    store_rows,
)
from .triton_forward import fill_strips, start_in_strips
from .triton_launch import Groups, Tile


# fmt: off
@triton.jit(do_not_specialize=SIZES)
def backward_groups_kernel(
    qkv, table, norms, grad_out, grad_qkv, grad_pairs, scale,
    groups, height, width, row_stride, column_stride, row_groups, column_groups,
    row_size, row_interval, column_size, column_interval,
    heads, head_stride, table_row_stride, table_column_stride, origin,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MEMBERS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Small groups. One program: a share of the groups of one head, each as a single block."""
    C = heads * D
    head = tl.program_id(0) % heads
    share, shares = tl.program_id(0) // heads, tl.num_programs(0) // heads
    start, end = share_of(groups, share, shares)
    number = tl.arange(0, MEMBERS)
    table += origin + head.to(tl.int64) * head_stride
    bias = load_bias(table, number, table_row_stride, table_column_stride, row_size, column_size)
    below, right, place = spread_members(
        number, row_stride, column_stride, row_size, row_interval, column_size, column_interval
    )
    qkv += head * D
    grad_out += head * D
    grad_qkv += head * D
    norms += head
    grad_bias = tl.zeros([MEMBERS, MEMBERS], tl.float32)
    map_start, row_tile, row_rest, column_tile, column_rest = find_group(
        start, height, width, row_groups, column_groups,
        row_size, row_interval, column_size, column_interval,
    )
    for _ in range(start, end):
        first, rows_left, columns_left = start_group(
            map_start, row_tile, row_rest, column_tile, column_rest,
            height, width, row_stride, column_stride,
        )
        exists = (below < rows_left) & (right < columns_left)
        step = first * heads
        maps, grads = qkv + step * (3 * D), grad_qkv + step * (3 * D)
        q = load_rows(maps, place, exists, 3 * C, D, BLOCK_D)
        k = load_rows(maps + C, place, exists, 3 * C, D, BLOCK_D)
        # Members that do not exist get no weight: as queries by an infinite norm, as keys by the
        # mask. Each gradient is stored as soon as it is there, which leaves registers for the rest.
        norm = tl.load(norms + step + place * heads, mask=exists, other=float('inf'))
        logits = multiply(q, tl.trans(k), PRECISION) * (scale * LOG2E) + bias
        weights = tl.exp2(logits - norm[:, None])
        weights = tl.where(exists[None, :], weights, 0.0)
        v = load_rows(maps + 2 * C, place, exists, 3 * C, D, BLOCK_D)
        grad = load_rows(grad_out + step * D, place, exists, C, D, BLOCK_D)
        grad_v = multiply(tl.trans(weights.to(q.dtype)), grad, PRECISION)
        store_rows(grads + 2 * C, grad_v, place, exists, 3 * C, D, BLOCK_D)
        grad_weights = multiply(grad, tl.trans(v), PRECISION)
        delta = tl.sum(weights * grad_weights, 1)
        grad_logits = weights * (grad_weights - delta[:, None])
        grad_bias += grad_logits
        grad_logits = grad_logits.to(q.dtype)
        grad_q = multiply(grad_logits, k, PRECISION) * scale
        store_rows(grads, grad_q, place, exists, 3 * C, D, BLOCK_D)
        grad_k = multiply(tl.trans(grad_logits), q, PRECISION) * scale
        store_rows(grads + C, grad_k, place, exists, 3 * C, D, BLOCK_D)
        map_start, row_tile, row_rest, column_tile, column_rest = next_group(
            map_start, row_tile, row_rest, column_tile, column_rest,
            height, width, row_size, row_interval, column_size, column_interval,
        )
    # fmt: on
    pairs = grad_pairs + tl.program_id(0).to(tl.int64) * (MEMBERS * MEMBERS)
    tl.store(pairs + number[:, None] * MEMBERS + number[None, :], grad_bias)


# fmt: off
@triton.jit(do_not_specialize=SIZES)
def backward_queries_kernel(
    qkv, strips, out, norms, grad_out, grad_qkv, deltas, scale,
    groups, height, width, row_stride, column_stride, row_groups, column_groups,
    row_size, row_interval, column_size, column_interval,
    heads, first_head, strip_heads, copies, pitch,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # fmt: on
    """Large groups. One program: the gradient of a block of queries, and their ``deltas``."""
    C = heads * D
    strip_head = tl.program_id(0) % strip_heads
    head = first_head + strip_head
    blocks = tl.cdiv(row_size * column_size, QUERIES)
    query = tl.program_id(0) // strip_heads % blocks * QUERIES + tl.arange(0, QUERIES)
    # fmt: off
    first, rows, columns = locate_group(
        tl.program_id(0) // strip_heads // blocks,
        height, width, row_stride, column_stride, row_groups, column_groups,
        row_size, row_interval, column_size, column_interval,
    )
    # fmt: on
    row_step, column_step = row_interval * row_stride, column_interval * column_stride
    place, exists = place_members(query, rows, columns, column_size, row_step, column_step)
    qkv += first * (3 * C) + head * D
    q = load_rows(qkv, place, exists, 3 * C, D, BLOCK_D)
    grad = load_rows(grad_out + first * C + head * D, place, exists, C, D, BLOCK_D)
    attended = load_rows(out + first * C + head * D, place, exists, C, D, BLOCK_D)
    number = (first + place) * heads + head
    norm = tl.load(norms + number, mask=exists, other=float('inf'))
    delta = tl.sum(grad.to(tl.float32) * attended.to(tl.float32), 1)
    tl.store(deltas + number, delta, mask=exists)
    biases = strips + start_in_strips(
        query, strip_head, row_size, column_size, strip_heads, copies, pitch
    )

    grad_q = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    end = rows * column_size
    unmasked = tl.where(columns == column_size, end, 0)
    for start in range(0, end, KEYS):
        key = start + tl.arange(0, KEYS)
        key_place, key_exists = place_members(
            key, rows, columns, column_size, row_step, column_step
        )
        k = load_rows(qkv + C, key_place, key_exists, 3 * C, D, BLOCK_D)
        v = load_rows(qkv + 2 * C, key_place, key_exists, 3 * C, D, BLOCK_D)
        bias = tl.load(biases[:, None] + key[None, :])
        if start + KEYS > unmasked:
            bias = tl.where(key_exists[None, :], bias, float('-inf'))
        logits = multiply(q, tl.trans(k), PRECISION) * (scale * LOG2E) + bias
        weights = tl.exp2(logits - norm[:, None])
        grad_logits = weights * (multiply(grad, tl.trans(v), PRECISION) - delta[:, None])
        grad_q += multiply(grad_logits.to(k.dtype), k, PRECISION)
    grad_qkv += first * (3 * C) + head * D
    store_rows(grad_qkv, grad_q * scale, place, exists, 3 * C, D, BLOCK_D)


# fmt: off
@triton.jit(do_not_specialize=SIZES)
def backward_keys_kernel(
    qkv, strips, norms, deltas, grad_out, grad_qkv, scale,
    groups, height, width, row_stride, column_stride, row_groups, column_groups,
    row_size, row_interval, column_size, column_interval,
    heads, first_head, strip_heads, copies, pitch,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # fmt: on
    """Large groups. One program: the gradients of a block of keys and of their values.

    Pairs are (key, query) here, so that no block of them need be transposed.
    """
    C = heads * D
    strip_head = tl.program_id(0) % strip_heads
    head = first_head + strip_head
    blocks = tl.cdiv(row_size * column_size, KEYS)
    key = tl.program_id(0) // strip_heads % blocks * KEYS + tl.arange(0, KEYS)
    # fmt: off
    first, rows, columns = locate_group(
        tl.program_id(0) // strip_heads // blocks,
        height, width, row_stride, column_stride, row_groups, column_groups,
        row_size, row_interval, column_size, column_interval,
    )
    # fmt: on
    row_step, column_step = row_interval * row_stride, column_interval * column_stride
    place, exists = place_members(key, rows, columns, column_size, row_step, column_step)
    qkv += first * (3 * C) + head * D
    k = load_rows(qkv + C, place, exists, 3 * C, D, BLOCK_D)
    v = load_rows(qkv + 2 * C, place, exists, 3 * C, D, BLOCK_D)
    biases = strips + start_in_strips(
        key, strip_heads + strip_head, row_size, column_size, strip_heads, copies, pitch
    )
    grad_out += first * C + head * D
    norms += first * heads + head
    deltas += first * heads + head

    grad_k = tl.zeros([KEYS, BLOCK_D], tl.float32)
    grad_v = tl.zeros([KEYS, BLOCK_D], tl.float32)
    end = rows * column_size
    unmasked = tl.where(columns == column_size, end, 0)
    for start in range(0, end, QUERIES):
        query = start + tl.arange(0, QUERIES)
        query_place, query_exists = place_members(
            query, rows, columns, column_size, row_step, column_step
        )
        q = load_rows(qkv, query_place, query_exists, 3 * C, D, BLOCK_D)
        grad = load_rows(grad_out, query_place, query_exists, C, D, BLOCK_D)
        norm = tl.load(norms + query_place * heads, mask=query_exists, other=0.0)
        delta = tl.load(deltas + query_place * heads, mask=query_exists, other=0.0)
        bias = tl.load(biases[:, None] + query[None, :])
        if start + QUERIES > unmasked:
            bias = tl.where(query_exists[None, :], bias, float('-inf'))
        logits = multiply(k, tl.trans(q), PRECISION) * (scale * LOG2E) + bias
        # Keys that do not exist get weights too: nothing of their rows is stored.
        weights = tl.exp2(logits - norm[None, :])
        grad_v += multiply(weights.to(grad.dtype), grad, PRECISION)
        grad_logits = weights * (multiply(v, tl.trans(grad), PRECISION) - delta[None, :])
        grad_k += multiply(grad_logits.to(q.dtype), q, PRECISION)
    grad_qkv += first * (3 * C) + head * D
    store_rows(grad_qkv + C, grad_k * scale, place, exists, 3 * C, D, BLOCK_D)
    store_rows(grad_qkv + 2 * C, grad_v, place, exists, 3 * C, D, BLOCK_D)


# fmt: off
@triton.jit(do_not_specialize=SIZES)
def backward_pairs_kernel(
    qkv, strips, norms, deltas, grad_out, grad_pairs, scale,
    groups, height, width, row_stride, column_stride, row_groups, column_groups,
    row_size, row_interval, column_size, column_interval,
    heads, first_head, strip_heads, copies, pitch, first_query, queries,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # fmt: on
    """Large groups. One program: the gradient of the bias of a block of pairs of one head,
    summed over a share of the groups, for ``queries`` numbers from ``first_query``."""
    C = heads * D
    strip_head = tl.program_id(0) % strip_heads
    head = first_head + strip_head
    key_blocks = tl.cdiv(row_size * column_size, KEYS)
    query_blocks = queries // QUERIES
    block = tl.program_id(0) // strip_heads
    key = block % key_blocks * KEYS + tl.arange(0, KEYS)
    line = block // key_blocks % query_blocks * QUERIES + tl.arange(0, QUERIES)
    query = first_query + line
    share = block // key_blocks // query_blocks
    shares = tl.num_programs(0) // strip_heads // key_blocks // query_blocks
    biases = strips + start_in_strips(
        query, strip_head, row_size, column_size, strip_heads, copies, pitch
    )
    bias = tl.load(biases[:, None] + key[None, :])
    qkv += head * D
    grad_out += head * D
    norms += head
    deltas += head
    # fmt: off
    below, right, place = spread_members(
        query, row_stride, column_stride, row_size, row_interval, column_size, column_interval
    )
    key_below, key_right, key_place = spread_members(
        key, row_stride, column_stride, row_size, row_interval, column_size, column_interval
    )
    last_below, last_right = (row_size - 1) * row_interval, (column_size - 1) * column_interval
    grad_bias = tl.zeros([QUERIES, KEYS], tl.float32)
    start, end = share_of(groups, share, shares)
    map_start, row_tile, row_rest, column_tile, column_rest = find_group(
        start, height, width, row_groups, column_groups,
        row_size, row_interval, column_size, column_interval,
    )
    for _ in range(start, end):
        first, rows_left, columns_left = start_group(
            map_start, row_tile, row_rest, column_tile, column_rest,
            height, width, row_stride, column_stride,
        )
        exists = (below < rows_left) & (right < columns_left)
        key_exists = (key_below < rows_left) & (key_right < columns_left)
        step = first * heads
        maps = qkv + step * (3 * D)
        q = load_rows(maps, place, exists, 3 * C, D, BLOCK_D)
        k = load_rows(maps + C, key_place, key_exists, 3 * C, D, BLOCK_D)
        v = load_rows(maps + 2 * C, key_place, key_exists, 3 * C, D, BLOCK_D)
        grad = load_rows(grad_out + step * D, place, exists, C, D, BLOCK_D)
        number = place * heads
        norm = tl.load(norms + step + number, mask=exists, other=float('inf'))
        delta = tl.load(deltas + step + number, mask=exists, other=0.0)
        logits = multiply(q, tl.trans(k), PRECISION) * (scale * LOG2E) + bias
        weights = tl.exp2(logits - norm[:, None])
        slopes = multiply(grad, tl.trans(v), PRECISION) - delta[:, None]
        is_full = (last_below < rows_left) & (last_right < columns_left)
        if not is_full:
            weights = tl.where(key_exists[None, :], weights, 0.0)
        grad_bias += weights * slopes
        map_start, row_tile, row_rest, column_tile, column_rest = next_group(
            map_start, row_tile, row_rest, column_tile, column_rest,
            height, width, row_size, row_interval, column_size, column_interval,
        )
    # fmt: on
    pairs = grad_pairs + ((share * strip_heads + strip_head) * queries + line).to(tl.int64)[
        :, None
    ] * (key_blocks * KEYS)
    tl.store(pairs + key[None, :], grad_bias)


# fmt: off
@triton.jit(do_not_specialize=SIZES)
def sum_pairs_kernel(
    grad_pairs, grad_table, first_head, strip_heads, first_query, queries, pitch,
    row_size, column_size, head_stride, table_row_stride, table_column_stride, origin,
    QUERIES: tl.constexpr, OFFSETS: tl.constexpr,
):
    # fmt: on
    """Add the gradient of pairs, (heads, queries, pitch), to that of their offsets.

    One program: one head, one offset of rows, a block of offsets of columns.
    """
    head = tl.program_id(0) % strip_heads
    blocks = tl.cdiv(2 * column_size - 1, OFFSETS)
    rows_apart = tl.program_id(0) // strip_heads // blocks - (row_size - 1)
    number = tl.program_id(0) // strip_heads % blocks * OFFSETS + tl.arange(0, OFFSETS)
    columns_apart = number - (column_size - 1)
    # Queries whose key is on the map, of those at hand.
    start = tl.maximum(first_query, tl.maximum(rows_apart, 0) * column_size)
    end = tl.minimum(first_query + queries, (row_size + tl.minimum(rows_apart, 0)) * column_size)
    total = tl.zeros([QUERIES, OFFSETS], tl.float32)
    for block in range(start, end, QUERIES):
        query = block + tl.arange(0, QUERIES)
        row, column = split_number(query, column_size)
        key_column = column[:, None] - columns_apart[None, :]
        exists = (query < end)[:, None] & (key_column >= 0) & (key_column < column_size)
        key = ((row - rows_apart) * column_size)[:, None] + key_column
        pairs = grad_pairs + (head * queries + query - first_query).to(tl.int64)[:, None] * pitch
        total += tl.load(pairs + key, mask=exists, other=0.0)
    sums = (
        grad_table
        + origin
        + (first_head + head).to(tl.int64) * head_stride
        + (rows_apart + row_size - 1) * table_row_stride
        + number * table_column_stride
    )
    exists = number < 2 * column_size - 1
    tl.store(sums, tl.load(sums, mask=exists, other=0.0) + tl.sum(total, 0), mask=exists)


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    table: Tensor,
    out: Tensor,
    norms: Tensor,
    rows: AxisRule,
    columns: AxisRule,
    heads: int,
    scale: float,
) -> Tuple[Tensor, Tensor]:
    """Gradients of what :func:`.triton_forward.forward` takes.

    Args:
        grad_out (Tensor): (B, H, W, heads*d), the gradient of ``out``.
        qkv, table, rows, columns, heads, scale: as there.
        out, norms (Tensor): what it returned.

    Returns:
        tuple[Tensor, Tensor]: gradients of ``qkv``, in its type, and of ``table``, in float32.
    """
    grad_out, qkv, groups = grad_out.contiguous(), qkv.contiguous(), Groups.of(qkv, rows, columns)
    head_dim = grad_out.shape[3] // heads
    grad_qkv = torch.empty_like(qkv)
    grad_table = table.new_zeros(table.shape, dtype=torch.float32)
    if not groups.groups:
        return grad_qkv, grad_table
    if groups.is_small(head_dim):
        constants, tile = triton_launch.plan('backward_groups', groups, qkv.dtype, head_dim)
        shares = groups.count_shares(heads)
        grad_pairs = grad_table.new_empty(shares, heads, tile.queries, tile.keys)
        programs, numbers = heads * shares, (scale, *groups, heads, *groups.view(table))
        tensors: Tuple[Tensor, ...] = qkv, table, norms, grad_out, grad_qkv, grad_pairs
        triton_launch.launch(backward_groups_kernel, programs, tensors, numbers, constants, tile)
        sum_pairs(grad_pairs, grad_table, (0, heads), 0, groups)
        return grad_qkv, grad_table

    plans = [
        triton_launch.plan(f'backward_{name}', groups, qkv.dtype, head_dim)
        for name in ('queries', 'keys', 'pairs')
    ]
    queries, keys, pairs = plans
    deltas = torch.empty_like(norms)
    block = max(side for _, tile in plans for side in tile[:2])
    for strips, layout in fill_strips(table, groups, block, of_keys=True):
        numbers, parts = (scale, *groups, heads, *layout), layout[1] * groups.groups
        programs = parts * -(-groups.members // queries[1].queries)
        tensors = qkv, strips, out, norms, grad_out, grad_qkv, deltas
        triton_launch.launch(backward_queries_kernel, programs, tensors, numbers, *queries)
        programs = parts * -(-groups.members // keys[1].keys)
        tensors = qkv, strips, norms, deltas, grad_out
        triton_launch.launch(backward_keys_kernel, programs, (*tensors, grad_qkv), numbers, *keys)
        backward_table(tensors, grad_table, groups, numbers, layout[:2], *pairs)
    return grad_qkv, grad_table


def backward_table(
    tensors: Tuple[Tensor, ...],
    grad_table: Tensor,
    groups: Groups,
    numbers: tuple,
    which_heads: Tuple[int, int],
    constants: tuple,
    tile: Tile,
) -> None:
    """Add the gradient of the bias to that of the table, some rows of pairs at a time."""
    _, heads = which_heads
    key_blocks = -(-groups.members // tile.keys)
    pitch = key_blocks * tile.keys
    query_blocks = -(-groups.members // tile.queries)
    block_bytes = 4 * heads * tile.queries * pitch
    step = min(query_blocks, max(1, triton_launch.PAIR_BYTES // block_bytes))
    shares = groups.count_shares(heads * step * key_blocks)
    for block in range(0, query_blocks, step):
        blocks = min(step, query_blocks - block)
        first, queries = block * tile.queries, blocks * tile.queries
        pairs = grad_table.new_empty(shares, heads, queries, pitch)
        triton_launch.launch(
            backward_pairs_kernel,
            heads * shares * blocks * key_blocks,
            (*tensors, pairs),
            (*numbers, first, queries),
            constants,
            tile,
        )
        sum_pairs(pairs, grad_table, which_heads, first, groups)


def sum_pairs(
    pairs: Tensor, grad_table: Tensor, which_heads: Tuple[int, int], first: int, groups: Groups
) -> None:
    """Add gradients of pairs (shares, heads, queries, pitch) to those of their offsets."""
    shares, heads, queries, pitch = pairs.shape
    offsets, sides = 64, (groups.row_size, groups.column_size)
    programs = heads * (2 * sides[0] - 1) * -(-(2 * sides[1] - 1) // offsets)
    tensors = (pairs.sum(0) if shares > 1 else pairs, grad_table)
    numbers = (*which_heads, first, queries, pitch, *sides, *groups.view(grad_table))
    plan = (64, offsets), Tile(0, 0, 4, 1)
    triton_launch.launch(sum_pairs_kernel, programs, tensors, numbers, *plan)
