"""Groups of one axis as a rectangular table of positions, with its ragged end padded and masked.

The rule of an axis is arithmetic on sizes that an exported graph repeats for every image.
"""

from typing import NamedTuple, Tuple

import torch
from torch import Tensor


class PaddedAxis(NamedTuple):
    """Groups of one axis as one table, instead of an :class:`.grouping.AxisRule`.

    Args:
        positions (Tensor): (groups, members), each of ``range(length)``.
        real (Tensor): (groups, members), False at padding.
        inverse (Tensor): (length,) where in the flat ``positions`` each position stands.
        offset (Tensor): (members * members,) query - key of each pair, counted from the smallest.
    """

    positions: Tensor
    real: Tensor
    inverse: Tensor
    offset: Tensor

    @property
    def size(self) -> int:
        """Members of a group."""
        return self.positions.shape[1]


def fit_rule(length: int, size: Tensor, interval: Tensor) -> Tuple[Tensor, Tensor]:
    """Fit the size and interval of groups to an axis, as :func:`crossformer_mm.grouping.fit_rule`
    does, without an ``if``. A learnt table of biases is resized to the size that is returned."""
    interval = interval.clamp(max=length)
    return torch.minimum(size, (length + interval - 1) // interval), interval


FIT_RULE = """
FitRule (length, rule) => (size, interval, lead) {
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  two = Constant <value_int = 2> ()
  most = Gather (rule, zero)
  widest = Gather (rule, one)
  lead = Gather (rule, two)
  interval = Min (widest, length)
  before_last = Sub (interval, one)
  to_divide = Add (length, before_last)
  there = Div (to_divide, interval)
  size = Min (most, there)
}"""


def padded_axis(length: int, size: Tensor, interval: Tensor, lead: Tensor, device) -> PaddedAxis:
    """Cut an axis into groups of ``size`` members that are ``interval`` apart (0-d tensors), the
    first tile of which begins ``lead`` positions before the axis."""
    size, interval = fit_rule(length, size, interval)
    tile = size * interval
    tiles = (length + lead + tile - 1) // tile
    # item() makes a size of its own, of which an exporter assumes nothing; one that it could
    # compute from the image's sides it would compare with 1, and remember the answer.
    groups, members = (tiles * interval).item(), size.item()
    group = torch.arange(groups, device=device)
    first = group // interval * tile + group % interval
    table = first[:, None] + torch.arange(members, device=device) * interval - lead
    position = torch.arange(length, device=device) + lead
    place = position % tile
    inverse = (position // tile * interval + place % interval) * members + place // interval
    member = torch.arange(members, device=device)
    offset = (member[:, None] - member + members - 1).flatten()
    return PaddedAxis(table.clamp(0, length - 1), (table >= 0) & (table < length), inverse, offset)


PADDED_AXIS = """
PaddedAxis (length, rule) => (positions, real, inverse, offset) {
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  second_axis = Constant <value_ints = [1]> ()
  flat = Constant <value_ints = [-1]> ()
  size, interval, lead = crossformer_mm.FitRule (length, rule)
  tile = Mul (size, interval)
  with_lead = Add (length, lead)
  tile_less_one = Sub (tile, one)
  to_cut = Add (with_lead, tile_less_one)
  tiles = Div (to_cut, tile)
  groups = Mul (tiles, interval)
  group = Range (zero, groups, one)
  tile_of_group = Div (group, interval)
  begin_of_tile = Mul (tile_of_group, tile)
  in_tile = Mod (group, interval)
  first = Add (begin_of_tile, in_tile)
  first_column = Unsqueeze (first, second_axis)
  member = Range (zero, size, one)
  steps = Mul (member, interval)
  shifted = Add (first_column, steps)
  table = Sub (shifted, lead)
  last = Sub (length, one)
  not_below = Max (table, zero)
  positions = Min (not_below, last)
  after_begin = GreaterOrEqual (table, zero)
  before_end = Less (table, length)
  real = And (after_begin, before_end)
  index = Range (zero, length, one)
  position = Add (index, lead)
  place = Mod (position, tile)
  tile_number = Div (position, tile)
  groups_before = Mul (tile_number, interval)
  group_in_tile = Mod (place, interval)
  group_number = Add (groups_before, group_in_tile)
  members_before = Mul (group_number, size)
  member_number = Div (place, interval)
  inverse = Add (members_before, member_number)
  query = Unsqueeze (member, second_axis)
  difference = Sub (query, member)
  last_member = Sub (size, one)
  from_smallest = Add (difference, last_member)
  offset = Reshape (from_smallest, flat)
}"""
