"""Functions that the Triton kernels of fused attention share. Imports triton.

The members of a group are numbered row-major as if it had ``row_size x column_size`` of them;
members that a ragged group lacks are masked. So a pair of numbers has the same offset in every
group. A group's columns are its shorter side: rows and columns of a group are those of the map,
or are swapped (``row_stride`` and ``column_stride`` are the positions from one row or column of
the map to the next).

Products are of the inputs' type, sums are in float32. Softmax is to the base 2: ``LOG2E`` is
folded into scale and bias.
"""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
# Arguments that depend on image and stage: a kernel must not be compiled for each value.
SIZES = [
    *('groups', 'height', 'width', 'row_stride', 'column_stride', 'row_groups', 'column_groups'),
    *('row_size', 'row_interval', 'column_size', 'column_interval', 'heads', 'first_head'),
    *('strip_heads', 'copies', 'pitch', 'first_query', 'queries'),
    # The table may be a view at any address, and be strided.
    *('table', 'grad_table', 'head_stride', 'table_row_stride', 'table_column_stride', 'origin'),
]


@triton.jit
def multiply(a, b, PRECISION: tl.constexpr):
    """``a @ b`` in float32."""
    if PRECISION == 'interpreter':  # takes the bits of a bfloat16 for an integer
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision='ieee')
    return tl.dot(a, b, input_precision=PRECISION)


# fmt: off
@triton.jit
def find_group(
    group, height, width, row_groups, column_groups,
    row_size, row_interval, column_size, column_interval,
):
    # fmt: on
    """Locate a group: start of its map, then start of its tile and offset in it, by axis."""
    column_group = group % column_groups
    row_group = group // column_groups % row_groups
    return (
        (group // column_groups // row_groups).to(tl.int64) * height * width,
        row_group // row_interval * (row_size * row_interval),
        row_group % row_interval,
        column_group // column_interval * (column_size * column_interval),
        column_group % column_interval,
    )


# fmt: off
@triton.jit
def next_group(
    map_start, row_tile, row_rest, column_tile, column_rest,
    height, width, row_size, row_interval, column_size, column_interval,
):
    # fmt: on
    """Locate the next group, without the divisions of :func:`find_group`."""
    column_rest += 1
    if (column_rest == column_interval) | (column_tile + column_rest >= width):
        column_rest = 0
        column_tile += column_size * column_interval
        if column_tile >= width:
            column_tile = 0
            row_rest += 1
            if (row_rest == row_interval) | (row_tile + row_rest >= height):
                row_rest = 0
                row_tile += row_size * row_interval
                if row_tile >= height:
                    row_tile = 0
                    map_start += height.to(tl.int64) * width
    return map_start, row_tile, row_rest, column_tile, column_rest


@triton.jit
def split_number(number, column_size):
    """Row and column of members. Exact below MEMBERS_LIMIT, and faster than a division."""
    row = ((number + 0.5) * (1.0 / column_size)).to(tl.int32)
    return row, number - row * column_size


# fmt: off
@triton.jit
def start_group(
    map_start, row_tile, row_rest, column_tile, column_rest,
    height, width, row_stride, column_stride,
):
    # fmt: on
    """Position of a group's first member in the batch of maps, and the sides of the map from it."""
    row, column = row_tile + row_rest, column_tile + column_rest
    first = map_start + row * row_stride + column * column_stride
    return first, height - row, width - column


# fmt: off
@triton.jit
def locate_group(
    group, height, width, row_stride, column_stride, row_groups, column_groups,
    row_size, row_interval, column_size, column_interval,
):
    """Position of a group's first member in the batch of maps, its rows and its columns."""
    map_start, row_tile, row_rest, column_tile, column_rest = find_group(
        group, height, width, row_groups, column_groups,
        row_size, row_interval, column_size, column_interval,
    )
    first, rows_left, columns_left = start_group(
        map_start, row_tile, row_rest, column_tile, column_rest,
        height, width, row_stride, column_stride,
    )
    # fmt: on
    rows = tl.minimum(row_size, tl.cdiv(rows_left, row_interval))
    columns = tl.minimum(column_size, tl.cdiv(columns_left, column_interval))
    return first, rows, columns


@triton.jit
def place_members(number, rows, columns, column_size, row_step, column_step):
    """Distances of a group's members from its first one, and whether they exist."""
    row, column = split_number(number, column_size)
    return row * row_step + column * column_step, (row < rows) & (column < columns)


@triton.jit
def share_of(groups, share, shares):
    """First group of a share of them, and of the next share."""
    each, more = groups // shares, groups % shares
    start = share * each + tl.minimum(share, more)
    return start, start + each + (share < more).to(tl.int32)


# fmt: off
@triton.jit
def spread_members(
    number, row_stride, column_stride, row_size, row_interval, column_size, column_interval
):
    # fmt: on
    """Distances of members from the first one: down the map, along it, in positions.

    Numbers of no member are below every map.
    """
    row, column = split_number(number, column_size)
    below, right = row * row_interval, column * column_interval
    place = below * row_stride + right * column_stride
    return tl.where(row < row_size, below, 2**31 - 1), right, place


@triton.jit
def load_rows(start, position, exists, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(members, BLOCK_D): the D numbers at each position, else 0."""
    d = tl.arange(0, BLOCK_D)
    mask = exists[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    offsets = position[:, None].to(tl.int64) * stride + d[None, :]
    return tl.load(start + offsets, mask=mask, other=0.0)


@triton.jit
def store_rows(start, values, position, exists, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The reverse of load_rows."""
    d = tl.arange(0, BLOCK_D)
    mask = exists[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    offsets = position[:, None].to(tl.int64) * stride + d[None, :]
    tl.store(start + offsets, values.to(start.dtype.element_ty), mask=mask)


@triton.jit
def load_bias(
    table, number, row_stride, column_stride, row_size, column_size
):
    """The bias of all pairs (members, members) of a small group, to the base 2.

    ``table`` is where a head's offsets that occur begin. The offset of a pair lies at
    ``place[query] - place[key]`` from that of a member to itself. Keys beyond the group: -inf.
    """
    row, column = split_number(number, column_size)
    place = tl.where(row < row_size, row * row_stride + column * column_stride, 0)
    centre = (row_size - 1) * row_stride + (column_size - 1) * column_stride
    bias = tl.load(table + (centre + place[:, None] - place[None, :]))
    return tl.where((row < row_size)[None, :], bias.to(tl.float32) * LOG2E, float('-inf'))
