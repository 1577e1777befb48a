"""Forward pass of fused attention: its Triton kernels and their launch. Imports triton.

Groups of one block (at most ``SMALL`` members): a program keeps the bias of all pairs in
registers and loops over groups. Larger groups: a program loops over blocks of keys, and reads
the bias of pairs from strips.

Strips: the bias of query (r, c) and key number k depends on c and on ``k - r * column_size``
only. A strip holds the biases of one c by that difference, so that the biases of a query are
contiguous in k. To be loaded 16 bytes at a time for every r, a strip is stored in up to four
copies, the i-th of which is shifted by i floats. Where all pairs of a head would take
``members ** 2`` floats, strips take 2 to 8 times ``members * column_size``.
"""

from typing import Iterator, Tuple

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
from .triton_launch import Groups, Tile

STRIP_BLOCK = 1024  # numbers of a strip that a program fills


# fmt: off
@triton.jit(do_not_specialize=SIZES)
def fill_strips_kernel(
    table, strips, row_size, column_size, first_head, strip_heads, copies, pitch,
    head_stride, table_row_stride, table_column_stride, origin, BLOCK: tl.constexpr,
):
    # fmt: on
    """One program: a block of one strip, in the order (queries or keys, head, copy, column).

    The strips of keys, which follow those of queries, are for pairs (key, query): the same of
    the table reversed.
    """
    blocks = tl.cdiv(pitch, BLOCK)
    strip = tl.program_id(0) // blocks
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    column = strip % column_size
    shift = strip // column_size % copies * (4 // copies)
    head = strip // column_size // copies % strip_heads
    of_keys = strip // column_size // copies // strip_heads
    # Strips begin with padding, so that the unshifted difference 0 lies at a multiple of 4.
    number = at - shift - (-(row_size - 1) * column_size & 3)
    offset_row = number // column_size
    other_column = number % column_size
    exists = (number >= 0) & (offset_row < 2 * row_size - 1)
    offset_column = other_column - column
    if of_keys == 0:
        offset_row = 2 * (row_size - 1) - offset_row
        offset_column = -offset_column
    bias = tl.load(
        table
        + origin
        + (first_head + head).to(tl.int64) * head_stride
        + offset_row * table_row_stride
        + (offset_column + column_size - 1) * table_column_stride,
        mask=exists,
        other=0.0,
    )
    tl.store(strips + strip.to(tl.int64) * pitch + at, bias.to(tl.float32) * LOG2E, at < pitch)


@triton.jit
def start_in_strips(number, head, row_size, column_size, strip_heads, copies, pitch):
    """Locate the biases of queries (or keys) in the strips: the start of a contiguous row."""
    row, column = split_number(number, column_size)
    row = tl.where(row < row_size, row, 0)  # members that do not exist stay within
    back = row * column_size
    copy = (back & 3) * copies // 4
    centre = (row_size - 1) * column_size
    centre += -centre & 3
    strip = ((head * copies + copy) * column_size + column).to(tl.int64)
    return tl.multiple_of(strip * pitch + (centre - back + (back & 3)), 4)


# fmt: off
@triton.jit(do_not_specialize=SIZES)
def forward_groups_kernel(
    qkv, table, out, norms, scale,
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
    last_below, last_right = (row_size - 1) * row_interval, (column_size - 1) * column_interval
    qkv += head * D
    out += head * D
    norms += head
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
        maps = qkv + step * (3 * D)
        q = load_rows(maps, place, exists, 3 * C, D, BLOCK_D)
        k = load_rows(maps + C, place, exists, 3 * C, D, BLOCK_D)
        v = load_rows(maps + 2 * C, place, exists, 3 * C, D, BLOCK_D)
        biases = bias
        if (last_below >= rows_left) | (last_right >= columns_left):
            biases = tl.where(exists[None, :], bias, float('-inf'))
        logits = multiply(q, tl.trans(k), PRECISION) * (scale * LOG2E) + biases
        largest = tl.max(logits, 1)  # finite: every group has member 0
        weights = tl.exp2(logits - largest[:, None])
        total = tl.sum(weights, 1)
        attended = multiply(weights.to(v.dtype), v, PRECISION) / total[:, None]
        store_rows(out + step * D, attended, place, exists, C, D, BLOCK_D)
        tl.store(norms + step + place * heads, largest + tl.log2(total), mask=exists)
        map_start, row_tile, row_rest, column_tile, column_rest = next_group(
            map_start, row_tile, row_rest, column_tile, column_rest,
            height, width, row_size, row_interval, column_size, column_interval,
        )


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    qkv, strips, out, norms, scale,
    groups, height, width, row_stride, column_stride, row_groups, column_groups,
    row_size, row_interval, column_size, column_interval,
    heads, first_head, strip_heads, copies, pitch,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Large groups. One program: a block of queries of one head and group."""
    C = heads * D
    strip_head = tl.program_id(0) % strip_heads
    head = first_head + strip_head
    blocks = tl.cdiv(row_size * column_size, QUERIES)
    query = tl.program_id(0) // strip_heads % blocks * QUERIES + tl.arange(0, QUERIES)
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
    biases = strips + start_in_strips(
        query, strip_head, row_size, column_size, strip_heads, copies, pitch
    )

    largest = tl.full([QUERIES], float('-inf'), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    attended = tl.zeros([QUERIES, BLOCK_D], tl.float32)
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
        # Finite from the first block on: every group has member 0.
        larger = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(weights, 1)
        attended = attended * shrink[:, None] + multiply(weights.to(v.dtype), v, PRECISION)
        largest = larger
    out += first * C + head * D
    store_rows(out, attended / total[:, None], place, exists, C, D, BLOCK_D)
    tl.store(norms + (first + place) * heads + head, largest + tl.log2(total), mask=exists)


def forward(
    qkv: Tensor, table: Tensor, rows: AxisRule, columns: AxisRule, heads: int, scale: float
) -> Tuple[Tensor, Tensor]:
    """Attention of every position of a map to its group.

    Args:
        qkv, table, rows, columns, heads, scale: as of
            :func:`crossformer_mm.kernels.map_attention`.

    Returns:
        tuple[Tensor, Tensor]: output (B, H, W, heads*d), and (B, H, W, heads) in float32, the
        logarithm to the base 2 of the sum of the exponentials of each query's logits.

    Raises:
        ValueError: a group has too many members, or the table is too small for the groups.
    """
    qkv, groups = qkv.contiguous(), Groups.of(qkv, rows, columns)
    *sides, channels = qkv.shape
    head_dim = channels // (3 * heads)
    out = qkv.new_empty(*sides, channels // 3)
    norms = qkv.new_empty(*sides, heads, dtype=torch.float32)
    if not groups.groups:
        return out, norms
    if groups.is_small(head_dim):
        plan = triton_launch.plan('forward_groups', groups, qkv.dtype, head_dim)
        programs, tensors = heads * groups.count_shares(heads), (qkv, table, out, norms)
        numbers = (scale, *groups, heads, *groups.view(table))
        triton_launch.launch(forward_groups_kernel, programs, tensors, numbers, *plan)
        return out, norms
    constants, tile = triton_launch.plan('forward', groups, qkv.dtype, head_dim)
    blocks = groups.groups * -(-groups.members // tile.queries)
    for strips, layout in fill_strips(table, groups, max(tile[:2])):
        programs, tensors = layout[1] * blocks, (qkv, strips, out, norms)
        numbers = (scale, *groups, heads, *layout)
        triton_launch.launch(forward_kernel, programs, tensors, numbers, constants, tile)
    return out, norms


def fill_strips(
    table: Tensor, groups: Groups, block: int, of_keys: bool = False
) -> Iterator[Tuple[Tensor, Tuple[int, int, int, int]]]:
    """Strips of the biases, of as many heads at a time as ``STRIP_BYTES`` holds.

    Args:
        table (Tensor): (heads, rows, columns), the bias of each offset, strided in any way.
        groups (Groups): large ones.
        block (int): the longest side of a block that is read.
        of_keys (bool): whether to add strips for pairs (key, query).

    Yields:
        tuple: the strips, float32; and ``first_head``, ``strip_heads``, ``copies``, ``pitch`` of
        the kernels that read them.
    """
    view = groups.view(table)
    copies = (1, 4, 2, 4)[groups.column_size % 4]
    # Differences of the offsets that occur, members of a last block that do not exist, shifts.
    pitch = (2 * groups.row_size - 1) * groups.column_size + block + 8 & ~3
    of_head = copies * groups.column_size * pitch
    step = max(1, min(len(table), triton_launch.STRIP_BYTES // (4 * of_head * (1 + of_keys))))
    for first_head in range(0, len(table), step):
        layout = first_head, min(step, len(table) - first_head), copies, pitch
        strips = table.new_empty((1 + of_keys) * layout[1] * of_head, dtype=torch.float32)
        programs = strips.numel() // pitch * -(-pitch // STRIP_BLOCK)
        numbers = (groups.row_size, groups.column_size, *layout, *view)
        plan = (STRIP_BLOCK,), Tile(0, 0, 4, 1)
        triton_launch.launch(fill_strips_kernel, programs, (table, strips), numbers, *plan)
        yield strips, layout
