"""Offsets between queries and keys that occur in the groups of a map."""

import torch
from torch import Tensor

from .padded_axis import fit_rule


@torch.library.custom_op('crossformer_mm::offsets', mutates_args=())
def offsets(qkv: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute the offsets that occur in the groups of a map.

    Args:
        qkv (Tensor): (B, H, W, 3C).
        rows, columns (Tensor): (3,) int64, the size, interval and lead of each axis' rule.

    Returns:
        Tensor: (offsets, 2), row-major.
    """
    sizes = [fit_rule(side, *rule[:2])[0] for side, rule in zip(qkv.shape[1:3], (rows, columns))]
    return torch.cartesian_prod(
        *(torch.arange(1 - int(size), int(size), dtype=qkv.dtype) for size in sizes)
    )


@offsets.register_fake
def _(qkv, rows, columns):
    return qkv.new_empty(torch.library.get_ctx().new_dynamic_size(min=1), 2)


OFFSETS = """
Offsets (qkv, rows, columns) => (pairs) {
  one = Constant <value_int = 1> ()
  two = Constant <value_int = 2> ()
  column_axis = Constant <value_ints = [1]> ()
  row_axis = Constant <value_ints = [0]> ()
  shape = Shape (qkv)
  height = Gather (shape, one)
  width = Gather (shape, two)
  r, interval_r, lead_r = crossformer_mm.FitRule (height, rows)
  c, interval_c, lead_c = crossformer_mm.FitRule (width, columns)
  begin_r = Sub (one, r)
  begin_c = Sub (one, c)
  whole_r = Range (begin_r, r, one)
  whole_c = Range (begin_c, c, one)
  range_r = Cast <to = 1> (whole_r)
  range_c = Cast <to = 1> (whole_c)
  standing = Unsqueeze (range_r, column_axis)
  lying = Unsqueeze (range_c, row_axis)
  shape_r = Shape (standing)
  shape_c = Shape (lying)
  both = Max (shape_r, shape_c)
  all_r = Expand (standing, both)
  all_c = Expand (lying, both)
  one_column = Constant <value_ints = [-1, 1]> ()
  flat_r = Reshape (all_r, one_column)
  flat_c = Reshape (all_c, one_column)
  pairs = Concat <axis = 1> (flat_r, flat_c)
}"""


def to_onnx(call, qkv, rows, columns):
    return call(OFFSETS, [qkv, rows, columns])
