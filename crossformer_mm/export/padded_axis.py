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


def fit_rule_to_onnx(op, length, rule):
    """Write :func:`fit_rule`, and return size, interval and lead."""
    size, interval, lead = (op.Gather(rule, index) for index in range(3))
    interval = op.Min(interval, length)
    # Div drops the remainder of integers.
    return op.Min(size, op.Div(length + interval - 1, interval)), interval, lead


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


def padded_axis_to_onnx(op, length, rule):
    """Write :func:`padded_axis`, and return the size of its groups and the PaddedAxis."""
    size, interval, lead = fit_rule_to_onnx(op, length, rule)
    tile = size * interval
    tiles = op.Div(length + lead + tile - 1, tile)
    group = op.Range(0, tiles * interval, 1)
    first = op.Div(group, interval) * tile + group % interval
    member = op.Range(0, size, 1)
    table = op.Unsqueeze(first, [1]) + member * interval - lead
    position = op.Range(0, length, 1) + lead
    place = position % tile
    inverse = (op.Div(position, tile) * interval + place % interval) * size
    inverse += op.Div(place, interval)
    offset = op.Reshape(op.Unsqueeze(member, [1]) - member + size - 1, [-1])
    positions = op.Min(op.Max(table, 0), length - 1)
    return size, PaddedAxis(positions, op.And(table >= 0, table < length), inverse, offset)
