"""The Triton kernels of :mod:`.fused`, and how they are launched. Imports triton.

Members of a group are numbered row-major as if it had ``row_size x column_size``
of them; what a ragged group lacks is masked by arithmetic. So a pair of numbers
means the same offset in every group, and the gradient of the bias can be summed
over groups pair by pair, before it is summed by offset.

With ``place = row * (2 * column_size - 1) + column``, the bias of a pair lies at
``place[query] - place[key]`` from the table's centre: one subtraction a pair.

Sums are in float32, of products in the inputs' type. No kernel uses atomics:
each result is written by one program, which sums in a fixed order.
"""

import contextlib
import math
from typing import NamedTuple, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grouping import AxisRule, count_groups, fit_rule
from .fused import SMALL

LOG2E = tl.constexpr(math.log2(math.e))
# What comes with the image and the stage: no kernel may be compiled for each.
SIZES = [
    'groups',
    'height',
    'width',
    'row_groups',
    'column_groups',
    'row_size',
    'row_interval',
    'column_size',
    'column_interval',
    'heads',
    'first_query',
    'queries',
]


@triton.jit
def multiply(a, b, PRECISION: tl.constexpr):
    """``a @ b`` in float32."""
    if PRECISION == 'interpreter':  # which takes the bits of a bfloat16 for a whole number
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision='ieee')
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def locate_group(
    group,
    height,
    width,
    row_groups,
    column_groups,
    row_size,
    row_interval,
    column_size,
    column_interval,
):
    """Position of a group's first member in the batch of maps, its rows and its columns."""
    column_group = group % column_groups
    row_group = group // column_groups % row_groups
    image = group // column_groups // row_groups
    row = row_group // row_interval * (row_size * row_interval) + row_group % row_interval
    column = (
        column_group // column_interval * (column_size * column_interval)
        + column_group % column_interval
    )
    rows = tl.minimum(row_size, (height - row + row_interval - 1) // row_interval)
    columns = tl.minimum(column_size, (width - column + column_interval - 1) // column_interval)
    return (image * height + row).to(tl.int64) * width + column, rows, columns


@triton.jit
def split_number(number, column_size):
    """Row and column of members; exact below MEMBERS_LIMIT, and faster than a division."""
    row = ((number + 0.5) * (1.0 / column_size)).to(tl.int32)
    return row, number - row * column_size


@triton.jit
def locate_members(number, first, rows, columns, column_size, row_step, column_step):
    """Positions (64 bits) of a group's members, and whether it has them."""
    row, column = split_number(number, column_size)
    exists = (row < rows) & (column < columns)
    return first + (row * row_step + column * column_step), exists


@triton.jit
def find_place(number, row_size, column_size):
    """``place`` of members, see above; 0 for numbers of none, to stay within the table."""
    row, _ = split_number(number, column_size)
    return tl.where(row < row_size, number + row * (column_size - 1), 0)


@triton.jit
def find_centre(table, head, row_size, column_size):
    """Where the table has the bias of a head for offset 0."""
    columns = 2 * column_size - 1
    return table + (head * (2 * row_size - 1) + row_size - 1) * columns + column_size - 1


@triton.jit
def load_rows(start, position, exists, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(members, BLOCK_D): the D numbers at each position, else 0."""
    d = tl.arange(0, BLOCK_D)
    mask = exists[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    return tl.load(start + position[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(start, values, position, exists, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The reverse of load_rows."""
    d = tl.arange(0, BLOCK_D)
    mask = exists[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    tl.store(
        start + position[:, None] * stride + d[None, :],
        values.to(start.dtype.element_ty),
        mask=mask,
    )


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    qkv,
    table,
    out,
    norms,
    scale,
    height,
    width,
    row_groups,
    column_groups,
    row_size,
    row_interval,
    column_size,
    column_interval,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: a block of queries of one head and group."""
    C = heads * D
    head = tl.program_id(0) % heads
    blocks = tl.cdiv(row_size * column_size, QUERIES)
    query = tl.program_id(0) // heads % blocks * QUERIES + tl.arange(0, QUERIES)
    first, rows, columns = locate_group(
        tl.program_id(0) // heads // blocks,
        height,
        width,
        row_groups,
        column_groups,
        row_size,
        row_interval,
        column_size,
        column_interval,
    )
    position, exists = locate_members(
        query, first, rows, columns, column_size, row_interval * width, column_interval
    )
    centre = find_centre(table, head, row_size, column_size)
    place = find_place(query, row_size, column_size)
    q = load_rows(qkv + head * D, position, exists, 3 * C, D, BLOCK_D)

    largest = tl.full([QUERIES], float('-inf'), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    attended = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for start in range(0, rows * column_size, KEYS):
        key = start + tl.arange(0, KEYS)
        key_position, key_exists = locate_members(
            key, first, rows, columns, column_size, row_interval * width, column_interval
        )
        key_place = find_place(key, row_size, column_size)
        k = load_rows(qkv + C + head * D, key_position, key_exists, 3 * C, D, BLOCK_D)
        v = load_rows(qkv + 2 * C + head * D, key_position, key_exists, 3 * C, D, BLOCK_D)
        bias = tl.load(centre + (place[:, None] - key_place[None, :]))
        logits = multiply(q, tl.trans(k), PRECISION) * scale + bias
        logits = tl.where(key_exists[None, :], logits, float('-inf'))
        # Finite from the first block on: every group has member 0.
        larger = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits * LOG2E - (larger * LOG2E)[:, None])
        shrink = tl.exp2((largest - larger) * LOG2E)
        total = total * shrink + tl.sum(weights, 1)
        attended = attended * shrink[:, None] + multiply(weights.to(v.dtype), v, PRECISION)
        largest = larger
    store_rows(out + head * D, attended / total[:, None], position, exists, C, D, BLOCK_D)
    tl.store(norms + position * heads + head, largest * LOG2E + tl.log2(total), mask=exists)


@triton.jit(do_not_specialize=SIZES)
def backward_groups_kernel(
    qkv,
    table,
    out,
    norms,
    grad_out,
    grad_qkv,
    grad_pairs,
    scale,
    groups,
    height,
    width,
    row_groups,
    column_groups,
    row_size,
    row_interval,
    column_size,
    column_interval,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MEMBERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Small groups. One program: every n-th group of one head, each as a single block."""
    C = heads * D
    head = tl.program_id(0) % heads
    number = tl.arange(0, MEMBERS)
    place = find_place(number, row_size, column_size)
    centre = find_centre(table, head, row_size, column_size)
    bias = tl.load(centre + (place[:, None] - place[None, :]))
    grad_bias = tl.zeros([MEMBERS, MEMBERS], tl.float32)
    for group in range(tl.program_id(0) // heads, groups, tl.num_programs(0) // heads):
        first, rows, columns = locate_group(
            group,
            height,
            width,
            row_groups,
            column_groups,
            row_size,
            row_interval,
            column_size,
            column_interval,
        )
        position, exists = locate_members(
            number, first, rows, columns, column_size, row_interval * width, column_interval
        )
        q = load_rows(qkv + head * D, position, exists, 3 * C, D, BLOCK_D)
        k = load_rows(qkv + C + head * D, position, exists, 3 * C, D, BLOCK_D)
        v = load_rows(qkv + 2 * C + head * D, position, exists, 3 * C, D, BLOCK_D)
        grad = load_rows(grad_out + head * D, position, exists, C, D, BLOCK_D)
        attended = load_rows(out + head * D, position, exists, C, D, BLOCK_D)
        # What does not exist gets no weight: as query by its infinite norm, as key by the mask.
        norm = tl.load(norms + position * heads + head, mask=exists, other=float('inf'))
        logits = multiply(q, tl.trans(k), PRECISION) * scale + bias
        weights = tl.exp2(logits * LOG2E - norm[:, None])
        weights = tl.where(exists[None, :], weights, 0.0)
        grad_v = multiply(tl.trans(weights.to(q.dtype)), grad, PRECISION)
        delta = tl.sum(grad.to(tl.float32) * attended.to(tl.float32), 1)
        grad_logits = weights * (multiply(grad, tl.trans(v), PRECISION) - delta[:, None])
        grad_bias += grad_logits
        grad_logits = grad_logits.to(q.dtype)
        grad_q = multiply(grad_logits, k, PRECISION) * scale
        grad_k = multiply(tl.trans(grad_logits), q, PRECISION) * scale
        store_rows(grad_qkv + head * D, grad_q, position, exists, 3 * C, D, BLOCK_D)
        store_rows(grad_qkv + C + head * D, grad_k, position, exists, 3 * C, D, BLOCK_D)
        store_rows(grad_qkv + 2 * C + head * D, grad_v, position, exists, 3 * C, D, BLOCK_D)
    pairs = grad_pairs + tl.program_id(0).to(tl.int64) * (MEMBERS * MEMBERS)
    tl.store(pairs + number[:, None] * MEMBERS + number[None, :], grad_bias)


@triton.jit(do_not_specialize=SIZES)
def backward_queries_kernel(
    qkv,
    table,
    out,
    norms,
    grad_out,
    grad_qkv,
    deltas,
    scale,
    height,
    width,
    row_groups,
    column_groups,
    row_size,
    row_interval,
    column_size,
    column_interval,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Large groups. One program: the gradient of a block of queries, and their ``deltas``."""
    C = heads * D
    head = tl.program_id(0) % heads
    blocks = tl.cdiv(row_size * column_size, QUERIES)
    query = tl.program_id(0) // heads % blocks * QUERIES + tl.arange(0, QUERIES)
    first, rows, columns = locate_group(
        tl.program_id(0) // heads // blocks,
        height,
        width,
        row_groups,
        column_groups,
        row_size,
        row_interval,
        column_size,
        column_interval,
    )
    position, exists = locate_members(
        query, first, rows, columns, column_size, row_interval * width, column_interval
    )
    centre = find_centre(table, head, row_size, column_size)
    place = find_place(query, row_size, column_size)
    q = load_rows(qkv + head * D, position, exists, 3 * C, D, BLOCK_D)
    grad = load_rows(grad_out + head * D, position, exists, C, D, BLOCK_D)
    attended = load_rows(out + head * D, position, exists, C, D, BLOCK_D)
    norm = tl.load(norms + position * heads + head, mask=exists, other=float('inf'))
    delta = tl.sum(grad.to(tl.float32) * attended.to(tl.float32), 1)
    tl.store(deltas + position * heads + head, delta, mask=exists)

    grad_q = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for start in range(0, rows * column_size, KEYS):
        key = start + tl.arange(0, KEYS)
        key_position, key_exists = locate_members(
            key, first, rows, columns, column_size, row_interval * width, column_interval
        )
        key_place = find_place(key, row_size, column_size)
        k = load_rows(qkv + C + head * D, key_position, key_exists, 3 * C, D, BLOCK_D)
        v = load_rows(qkv + 2 * C + head * D, key_position, key_exists, 3 * C, D, BLOCK_D)
        bias = tl.load(centre + (place[:, None] - key_place[None, :]))
        logits = multiply(q, tl.trans(k), PRECISION) * scale + bias
        weights = tl.exp2(logits * LOG2E - norm[:, None])
        weights = tl.where(key_exists[None, :], weights, 0.0)
        grad_logits = weights * (multiply(grad, tl.trans(v), PRECISION) - delta[:, None])
        grad_q += multiply(grad_logits.to(k.dtype), k, PRECISION)
    store_rows(grad_qkv + head * D, grad_q * scale, position, exists, 3 * C, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def backward_keys_kernel(
    qkv,
    table,
    norms,
    deltas,
    grad_out,
    grad_qkv,
    scale,
    height,
    width,
    row_groups,
    column_groups,
    row_size,
    row_interval,
    column_size,
    column_interval,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Large groups. One program: the gradients of a block of keys and of their values.

    Pairs are (key, query) here, so that no block of them need be transposed.
    """
    C = heads * D
    head = tl.program_id(0) % heads
    blocks = tl.cdiv(row_size * column_size, KEYS)
    key = tl.program_id(0) // heads % blocks * KEYS + tl.arange(0, KEYS)
    first, rows, columns = locate_group(
        tl.program_id(0) // heads // blocks,
        height,
        width,
        row_groups,
        column_groups,
        row_size,
        row_interval,
        column_size,
        column_interval,
    )
    position, exists = locate_members(
        key, first, rows, columns, column_size, row_interval * width, column_interval
    )
    centre = find_centre(table, head, row_size, column_size)
    place = find_place(key, row_size, column_size)
    k = load_rows(qkv + C + head * D, position, exists, 3 * C, D, BLOCK_D)
    v = load_rows(qkv + 2 * C + head * D, position, exists, 3 * C, D, BLOCK_D)

    grad_k = tl.zeros([KEYS, BLOCK_D], tl.float32)
    grad_v = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for start in range(0, rows * column_size, QUERIES):
        query = start + tl.arange(0, QUERIES)
        query_position, query_exists = locate_members(
            query, first, rows, columns, column_size, row_interval * width, column_interval
        )
        query_place = find_place(query, row_size, column_size)
        q = load_rows(qkv + head * D, query_position, query_exists, 3 * C, D, BLOCK_D)
        grad = load_rows(grad_out + head * D, query_position, query_exists, C, D, BLOCK_D)
        row = query_position * heads + head
        norm = tl.load(norms + row, mask=query_exists, other=float('inf'))
        delta = tl.load(deltas + row, mask=query_exists, other=0.0)
        bias = tl.load(centre + (query_place[None, :] - place[:, None]))
        logits = multiply(k, tl.trans(q), PRECISION) * scale + bias
        # Keys that do not exist get weights too: nothing of their rows is stored.
        weights = tl.exp2(logits * LOG2E - norm[None, :])
        grad_v += multiply(weights.to(grad.dtype), grad, PRECISION)
        grad_logits = weights * (multiply(v, tl.trans(grad), PRECISION) - delta[None, :])
        grad_k += multiply(grad_logits.to(q.dtype), q, PRECISION)
    store_rows(grad_qkv + C + head * D, grad_k * scale, position, exists, 3 * C, D, BLOCK_D)
    store_rows(grad_qkv + 2 * C + head * D, grad_v, position, exists, 3 * C, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def backward_pairs_kernel(
    qkv,
    table,
    norms,
    deltas,
    grad_out,
    grad_pairs,
    scale,
    groups,
    height,
    width,
    row_groups,
    column_groups,
    row_size,
    row_interval,
    column_size,
    column_interval,
    first_query,
    queries,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Large groups. One program: the gradient of the bias of a block of pairs of one head,
    summed over every n-th group, for ``queries`` numbers from ``first_query``."""
    C = heads * D
    head = tl.program_id(0) % heads
    key_blocks = tl.cdiv(row_size * column_size, KEYS)
    query_blocks = queries // QUERIES
    key = tl.program_id(0) // heads % key_blocks * KEYS + tl.arange(0, KEYS)
    row = tl.program_id(0) // heads // key_blocks % query_blocks * QUERIES + tl.arange(0, QUERIES)
    query = first_query + row
    share = tl.program_id(0) // heads // key_blocks // query_blocks
    shares = tl.num_programs(0) // heads // key_blocks // query_blocks
    place = find_place(query, row_size, column_size)
    key_place = find_place(key, row_size, column_size)
    centre = find_centre(table, head, row_size, column_size)
    bias = tl.load(centre + (place[:, None] - key_place[None, :]))
    grad_bias = tl.zeros([QUERIES, KEYS], tl.float32)
    for group in range(share, groups, shares):
        first, rows, columns = locate_group(
            group,
            height,
            width,
            row_groups,
            column_groups,
            row_size,
            row_interval,
            column_size,
            column_interval,
        )
        position, exists = locate_members(
            query, first, rows, columns, column_size, row_interval * width, column_interval
        )
        key_position, key_exists = locate_members(
            key, first, rows, columns, column_size, row_interval * width, column_interval
        )
        q = load_rows(qkv + head * D, position, exists, 3 * C, D, BLOCK_D)
        grad = load_rows(grad_out + head * D, position, exists, C, D, BLOCK_D)
        k = load_rows(qkv + C + head * D, key_position, key_exists, 3 * C, D, BLOCK_D)
        v = load_rows(qkv + 2 * C + head * D, key_position, key_exists, 3 * C, D, BLOCK_D)
        norm = tl.load(norms + position * heads + head, mask=exists, other=float('inf'))
        delta = tl.load(deltas + position * heads + head, mask=exists, other=0.0)
        logits = multiply(q, tl.trans(k), PRECISION) * scale + bias
        weights = tl.exp2(logits * LOG2E - norm[:, None])
        weights = tl.where(key_exists[None, :], weights, 0.0)
        grad_bias += weights * (multiply(grad, tl.trans(v), PRECISION) - delta[:, None])
    pairs = grad_pairs + ((share * heads + head) * queries + row).to(tl.int64)[:, None] * (
        key_blocks * KEYS
    )
    tl.store(pairs + key[None, :], grad_bias)


@triton.jit(do_not_specialize=SIZES + ['pitch'])
def sum_pairs_kernel(
    grad_pairs,
    grad_table,
    first_query,
    queries,
    pitch,
    row_size,
    column_size,
    heads,
    QUERIES: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """Add the gradient of pairs, (heads, queries, pitch), to that of their offsets.

    One program: one head, one offset of rows, a block of offsets of columns.
    """
    head = tl.program_id(0) % heads
    blocks = tl.cdiv(2 * column_size - 1, OFFSETS)
    rows_apart = tl.program_id(0) // heads // blocks - (row_size - 1)
    number = tl.program_id(0) // heads % blocks * OFFSETS + tl.arange(0, OFFSETS)
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
    columns = 2 * column_size - 1
    sums = grad_table + (head * (2 * row_size - 1) + rows_apart + row_size - 1) * columns + number
    tl.store(
        sums,
        tl.load(sums, mask=number < columns, other=0.0) + tl.sum(total, 0),
        mask=number < columns,
    )


# With TRITON_INTERPRET=1 Triton runs kernels in Python, on the CPU.
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


class Tile(NamedTuple):
    """Queries and keys of a block, warps of a program, stages of its pipeline of loads."""

    queries: int
    keys: int
    warps: int
    stages: int


# For groups of more than SMALL members, by kernel and bytes of a number. Chosen by what ptxas
# says of registers and shared memory for sm_90 and heads of 32 channels; not yet measured.
# `python benchmarks/gpu.py` times these and others and prints a table to put here.
TILES = {
    ('forward', 2): Tile(64, 64, 4, 2),
    ('forward', 4): Tile(64, 64, 8, 1),
    ('backward_queries', 2): Tile(64, 64, 4, 1),
    ('backward_queries', 4): Tile(64, 32, 4, 1),
    ('backward_keys', 2): Tile(64, 64, 4, 2),
    ('backward_keys', 4): Tile(32, 64, 8, 1),
    ('backward_pairs', 2): Tile(64, 64, 8, 1),
    ('backward_pairs', 4): Tile(64, 64, 8, 1),
}
# Warps and stages for those, where the block has that many members; smaller ones take fewer warps.
SMALL_TILES = {
    ('forward', 2): (4, 1),
    ('forward', 4): (8, 1),
    ('backward_groups', 2): (4, 2),
    ('backward_groups', 4): (8, 1),
}
MEMBERS_LIMIT = 2**20  # of a group, see split_number
PROGRAMS = 1024  # that should share the work where groups are summed over
PAIR_BYTES = 2**26  # of gradients of pairs to hold at a time, if one block of queries allows


def choose_tile(kernel: str, members: int, dtype: torch.dtype) -> Tile:
    """How a kernel cuts groups of at most so many members."""
    if members <= SMALL:
        side = block_size(members)
        warps, stages = SMALL_TILES[kernel, dtype.itemsize]
        return Tile(side, side, max(1, warps * side // SMALL), stages)
    return TILES[kernel, dtype.itemsize]


def block_size(number: int) -> int:
    """The least side of a block that holds so many and that tensor cores take."""
    return max(16, triton.next_power_of_2(number))


class Groups(NamedTuple):
    """What kernels take of the geometry: the groups of a batch of maps, as numbers."""

    groups: int
    height: int
    width: int
    row_groups: int
    column_groups: int
    row_size: int
    row_interval: int
    column_size: int
    column_interval: int

    @classmethod
    def of(cls, qkv: Tensor, rows: AxisRule, columns: AxisRule) -> 'Groups':
        batch, height, width, _ = qkv.shape
        rows, columns = fit_rule(height, rows), fit_rule(width, columns)
        row_groups, column_groups = count_groups(height, rows), count_groups(width, columns)
        groups = cls(
            batch * row_groups * column_groups,
            height,
            width,
            row_groups,
            column_groups,
            *rows[:2],
            *columns[:2],
        )
        if groups.members > MEMBERS_LIMIT:
            raise ValueError(
                'CrossFormer: fused attention takes groups of at most '
                f'{MEMBERS_LIMIT} positions, got {groups.members}: choose a larger '
                'interval.'
            )
        return groups

    @property
    def members(self) -> int:
        """Of the largest groups."""
        return self.row_size * self.column_size


def forward(
    qkv: Tensor, table: Tensor, rows: AxisRule, columns: AxisRule, heads: int, scale: float
) -> Tuple[Tensor, Tensor]:
    """Output (B, H, W, heads*d), and norms (B, H, W, heads) of the softmax, in log2."""
    qkv, groups = qkv.contiguous(), Groups.of(qkv, rows, columns)
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    norms = qkv.new_empty(*qkv.shape[:3], heads, dtype=torch.float32)
    launch(
        forward_kernel,
        qkv,
        heads,
        groups.members,
        lambda tile: groups.groups * triton.cdiv(groups.members, tile.queries),
        qkv,
        crop_table(table, groups),
        out,
        norms,
        scale,
        *groups[1:],
    )
    return out, norms


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
    """Gradients of ``qkv`` and ``table``."""
    grad_out, qkv, groups = grad_out.contiguous(), qkv.contiguous(), Groups.of(qkv, rows, columns)
    cropped = crop_table(table, groups)
    grad_qkv, grad_cropped = torch.empty_like(qkv), torch.zeros_like(cropped)

    if groups.members <= SMALL:
        side = block_size(groups.members)
        shares = min(groups.groups, triton.cdiv(PROGRAMS, heads))
        pairs = cropped.new_empty(shares, heads, side, side)
        launch(
            backward_groups_kernel,
            qkv,
            heads,
            groups.members,
            lambda tile: shares,
            qkv,
            cropped,
            out,
            norms,
            grad_out,
            grad_qkv,
            pairs,
            scale,
            *groups,
        )
        sum_pairs(pairs, grad_cropped, 0, groups, heads)
    else:
        deltas = torch.empty_like(norms)
        launch(
            backward_queries_kernel,
            qkv,
            heads,
            groups.members,
            lambda tile: groups.groups * triton.cdiv(groups.members, tile.queries),
            qkv,
            cropped,
            out,
            norms,
            grad_out,
            grad_qkv,
            deltas,
            scale,
            *groups[1:],
        )
        launch(
            backward_keys_kernel,
            qkv,
            heads,
            groups.members,
            lambda tile: groups.groups * triton.cdiv(groups.members, tile.keys),
            qkv,
            cropped,
            norms,
            deltas,
            grad_out,
            grad_qkv,
            scale,
            *groups[1:],
        )
        backward_table(grad_out, qkv, cropped, norms, deltas, grad_cropped, groups, heads, scale)

    if grad_cropped.shape == table.shape and grad_cropped.dtype == table.dtype:
        return grad_qkv, grad_cropped
    grad_table = table.new_zeros(table.shape)
    centre(grad_table, groups).copy_(grad_cropped)
    return grad_qkv, grad_table


def backward_table(
    grad_out: Tensor,
    qkv: Tensor,
    table: Tensor,
    norms: Tensor,
    deltas: Tensor,
    grad_table: Tensor,
    groups: Groups,
    heads: int,
    scale: float,
) -> None:
    """Add the gradient of the bias to that of the table, some rows of pairs at a time."""
    tile = choose_tile('backward_pairs', groups.members, qkv.dtype)
    key_blocks = triton.cdiv(groups.members, tile.keys)
    pitch = key_blocks * tile.keys
    query_blocks = triton.cdiv(groups.members, tile.queries)
    step = min(query_blocks, max(1, PAIR_BYTES // (heads * tile.queries * pitch * 4)))
    shares = min(groups.groups, triton.cdiv(PROGRAMS, heads * step * key_blocks))
    for block in range(0, query_blocks, step):
        blocks = min(step, query_blocks - block)
        first, queries = block * tile.queries, blocks * tile.queries
        pairs = table.new_empty(shares, heads, queries, pitch)
        launch(
            backward_pairs_kernel,
            qkv,
            heads,
            groups.members,
            lambda tile: shares * blocks * key_blocks,
            qkv,
            table,
            norms,
            deltas,
            grad_out,
            pairs,
            scale,
            *groups,
            first,
            queries,
        )
        sum_pairs(pairs, grad_table, first, groups, heads)


def sum_pairs(
    pairs: Tensor, grad_table: Tensor, first_query: int, groups: Groups, heads: int
) -> None:
    """Add gradients of pairs (shares, heads, queries, pitch) to those of their offsets."""
    shares, _, queries, pitch = pairs.shape
    pairs = pairs.sum(0) if shares > 1 else pairs
    offsets = 64
    programs = heads * (2 * groups.row_size - 1) * triton.cdiv(2 * groups.column_size - 1, offsets)
    with on_device_of(pairs):
        sum_pairs_kernel[(programs,)](
            pairs,
            grad_table,
            first_query,
            queries,
            pitch,
            groups.row_size,
            groups.column_size,
            heads,
            QUERIES=64,
            OFFSETS=offsets,
            num_warps=4,
        )


def launch(kernel, qkv: Tensor, heads: int, members: int, programs, *arguments) -> None:
    """Run a kernel with its tile: ``programs(tile)`` for each head."""
    name = kernel.__name__.removesuffix('_kernel')
    head_dim = qkv.shape[3] // (3 * heads)
    tile = choose_tile(name, members, qkv.dtype)
    sizes = (
        dict(MEMBERS=tile.keys)
        if name == 'backward_groups'
        else dict(QUERIES=tile.queries, KEYS=tile.keys)
    )
    with on_device_of(qkv):
        kernel[(heads * programs(tile),)](
            *arguments,
            heads,
            D=head_dim,
            BLOCK_D=block_size(head_dim),
            **sizes,
            PRECISION=precision(head_dim),
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )


def on_device_of(tensor: Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def precision(head_dim: int) -> str:
    """How to multiply float32: as PyTorch does."""
    if INTERPRETED:
        return 'interpreter'
    if head_dim > 32:  # blocks in TF32 would take more shared memory than some GPUs have
        return 'ieee'
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, 'fp32_precision'):  # since PyTorch 2.9; then allow_tf32 may raise
        return 'tf32' if matmul.fp32_precision == 'tf32' else 'ieee'
    return 'tf32' if matmul.allow_tf32 else 'ieee'


def centre(table: Tensor, groups: Groups) -> Tensor:
    """The offsets that occur, a view (heads, 2*row_size-1, 2*column_size-1)."""
    top = table.shape[1] // 2 - (groups.row_size - 1)
    left = table.shape[2] // 2 - (groups.column_size - 1)
    return table[:, top : top + 2 * groups.row_size - 1, left : left + 2 * groups.column_size - 1]


def crop_table(table: Tensor, groups: Groups) -> Tensor:
    """:func:`centre`, contiguous in float32."""
    return centre(table, groups).float().contiguous()
