"""Attention in the groups of a map of any size."""

import torch
from einops import rearrange
from torch import Tensor

from .padded_axis import PaddedAxis, padded_axis


def padded_attention(
    qkv: Tensor, table: Tensor, rows: PaddedAxis, columns: PaddedAxis, num_heads: int, scale: float
) -> Tensor:
    """Compute attention as the papers write it, with a mask; store the weights of all groups.

    Args:
        rows, columns (PaddedAxis): the groups.
        others: as of :func:`crossformer_mm.kernels.map_attention`.
    """
    height, width = rows.size, columns.size
    members = select(qkv, rows.positions.flatten(), columns.positions.flatten())
    q, k, v = rearrange(
        members,
        'b (gr r) (gc c) (three h d) -> three b (gr gc) h (r c) d',
        r=height,
        c=width,
        three=3,
        h=num_heads,
    )
    bias = rearrange(
        select(table, rows.offset, columns.offset),
        'h (rq rk) (cq ck) -> h (rq cq) (rk ck)',
        rq=height,
        cq=width,
    )
    real = rearrange(
        rows.real[:, None, :, None] & columns.real[:, None], 'gr gc r c -> (gr gc) 1 1 (r c)'
    )
    logits = q * scale @ k.transpose(-1, -2) + bias
    # Not -inf: a group of padding only is dropped later, and must not become NaN.
    logits = logits.masked_fill(~real, torch.finfo(logits.dtype).min)
    out = rearrange(
        logits.softmax(-1) @ v,
        'b (gr gc) h (r c) d -> b (gr r) (gc c) (h d)',
        gc=columns.positions.shape[0],
        r=height,
    )
    return select(out, rows.inverse, columns.inverse)


def select(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Take and order the rows and columns, dimensions 1 and 2, of a map."""
    return x.index_select(1, rows).index_select(2, columns)


@torch.library.custom_op('crossformer_mm::map_attention', mutates_args=())
def map_attention(
    qkv: Tensor, table: Tensor, rows: Tensor, columns: Tensor, num_heads: int, scale: float
) -> Tensor:
    """Compute :func:`padded_attention` from the rules of the axes.

    The ONNX function takes one row of groups after the other, so that only the weights of few
    groups are in memory at a time.

    Args:
        table (Tensor): (offsets, heads), the bias of each offset, in the order of :func:`offsets`.
        rows, columns (Tensor): as of :func:`offsets`.
        others: as of :func:`crossformer_mm.kernels.map_attention`.
    """
    rows, columns = (
        padded_axis(side, rule[0], rule[1], rule[2], qkv.device)
        for side, rule in zip(qkv.shape[1:3], (rows, columns))
    )
    table = table.t().unflatten(1, (2 * rows.size - 1, 2 * columns.size - 1))
    return padded_attention(qkv, table, rows, columns, num_heads, scale).contiguous()


@map_attention.register_fake
def _(qkv, table, rows, columns, num_heads, scale):
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


MASK_VALUE = -1e9  # of padding keys; the largest number of float32 would overflow


# One more channel, 1 in every query, adds MASK_VALUE to the logits of padding keys: adding it to
# all logits would take as long as their softmax. The Loop takes one row of groups at a time
# (OpenVINO's Scan cannot read values from outside its body).
# Shapes in comments: B images, H x W the map, R x S groups of r x c members, h heads of d channels.
MAP_ATTENTION = """
MapAttention <heads: int, scale: float>
    (qkv, table, row_rule, column_rule) => (out) {
  row_number = Constant <value_int = 1> ()
  column_number = Constant <value_int = 2> ()
  shape_of_map = Shape (qkv)
  length = Gather (shape_of_map, row_number)
  length2 = Gather (shape_of_map, column_number)
  positions, real, inverse, offset = crossformer_mm.PaddedAxis (length, row_rule)
  positions2, real2, inverse2, offset2 = crossformer_mm.PaddedAxis (length2, column_rule)
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  three = Constant <value_ints = [3]> ()
  flat = Constant <value_ints = [-1]> ()
  outer_axes = Constant <value_ints = [0, 2]> ()
  one_more = Constant <value_ints = [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]> ()
  number_one = Constant <value_float = 1.0> ()
  heads_number = Constant <value_int: int = @heads> ()
  heads_size = Reshape (heads_number, one)
  factor = Constant <value_float: float = @scale> ()
  filling = Constant <value_float = MASK_VALUE> ()
  r = Shape <start = 1> (positions)
  groups = Shape (positions2)  # S, c
  c = Shape <start = 1> (positions2)
  width = Shape (inverse2)
  columns = Reshape (positions2, flat)

  doubled_r = Add (r, r)
  doubled_c = Add (c, c)
  offsets_r = Sub (doubled_r, one)
  offsets_c = Sub (doubled_c, one)
  of_heads = Transpose <perm = [1, 0]> (table)
  shape_of_table = Concat <axis = 0> (heads_size, offsets_r, offsets_c)
  in_table = Reshape (of_heads, shape_of_table)
  rows_of_table = Gather <axis = 1> (in_table, offset)
  pairs = Gather <axis = 2> (rows_of_table, offset2)  # h, r r, c c
  shape_of_pairs = Concat <axis = 0> (heads_size, r, r, c, c)
  in_pairs = Reshape (pairs, shape_of_pairs)
  queries_first = Transpose <perm = [0, 1, 3, 2, 4]> (in_pairs)
  members = Mul (r, c)
  shape_of_bias = Concat <axis = 0> (heads_size, members, members)
  bias = Reshape (queries_first, shape_of_bias)

  channels = Shape <start = 3> (qkv)
  channels_out = Div (channels, three)
  split_shape = Concat <axis = 0> (zero, r, groups, heads_size, flat)
  group_shape = Concat <axis = 0> (zero, zero, zero, members, flat)
  apart_shape = Concat <axis = 0> (zero, zero, zero, r, c, flat)
  row_shape = Concat <axis = 0> (zero, zero, flat, channels_out)
  mask_shape = Concat <axis = 0> (flat, one, members, one)
  real_columns = Unsqueeze (real2, one)  # S, 1, c

  row_groups = Shape <end = 1> (positions)
  count = Squeeze (row_groups, zero)
  always = Constant <value = bool {1}> ()
  scanned = Loop (count, always) <body = row_of_groups (int64 i, bool go)
      => (bool going, float[b, nr, w, ch] attended) {
    going = Identity (go)
    at = Gather <axis = 0> (positions, i)
    is_real = Gather <axis = 0> (real, i)
    here = Gather <axis = 1> (qkv, at)
    chosen = Gather <axis = 2> (here, columns)  # B, r, S c, 3 h d
    q, k, v = Split <axis = 3, num_outputs = 3> (chosen)
    q_split = Reshape (q, split_shape)
    k_split = Reshape (k, split_shape)
    v_split = Reshape (v, split_shape)  # B, r, S, c, h, d
    q_groups = Transpose <perm = [0, 2, 4, 1, 3, 5]> (q_split)
    k_groups = Transpose <perm = [0, 2, 4, 1, 3, 5]> (k_split)
    v_groups = Transpose <perm = [0, 2, 4, 1, 3, 5]> (v_split)
    q_members = Reshape (q_groups, group_shape)
    k_members = Reshape (k_groups, group_shape)
    v_members = Reshape (v_groups, group_shape)  # B, S, h, r c, d
    q_scaled = Mul (q_members, factor)
    real_rows = Unsqueeze (is_real, outer_axes)
    both = And (real_rows, real_columns)  # S, r, c
    not_there = Not (both)
    as_numbers = Cast <to = 1> (not_there)
    penalties = Mul (as_numbers, filling)
    mask = Reshape (penalties, mask_shape)  # S, 1, r c, 1
    outer = Shape <end = 3> (k_members)
    column_shape = Concat <axis = 0> (outer, members, one)
    column = Expand (mask, column_shape)  # B, S, h, r c, 1
    k_more = Concat <axis = -1> (k_members, column)
    q_more = Pad <mode = "constant"> (q_scaled, one_more, number_one)
    k_turned = Transpose <perm = [0, 1, 2, 4, 3]> (k_more)
    products = MatMul (q_more, k_turned)
    logits = Add (products, bias)
    weights = Softmax <axis = -1> (logits)
    mixed = MatMul (weights, v_members)
    apart = Reshape (mixed, apart_shape)  # B, S, h, r, c, d
    in_rows = Transpose <perm = [0, 3, 1, 4, 2, 5]> (apart)
    padded = Reshape (in_rows, row_shape)
    attended = Gather <axis = 2> (padded, inverse2)
  }>  # R, B, r, W, h d
  images_first = Transpose <perm = [1, 0, 2, 3, 4]> (scanned)
  map_shape = Concat <axis = 0> (zero, flat, width, channels_out)
  padded_map = Reshape (images_first, map_shape)
  out = Gather <axis = 1> (padded_map, inverse)
}""".replace('MASK_VALUE', str(MASK_VALUE))


def to_onnx(call, qkv, table, rows, columns, num_heads, scale):
    return call(MAP_ATTENTION, [qkv, table, rows, columns], heads=num_heads, scale=scale)
