"""Which positions of a map attend to each other: pure geometry, no parameters.

Every kind of group in CrossFormer is the product of a grouping of the rows and one of the columns,
and every such one-dimensional grouping is the same rule with two numbers:

    cut the axis into tiles of ``size * interval`` positions; inside a tile, every ``interval``-th
    position belongs to one group.

=================== ======================= ==========
attention           size                    interval
=================== ======================= ==========
short distance      G                       1
long, ``interval``  ceil(n / I): one tile   I
long, ``block``     G                       I
=================== ======================= ==========

For comparison there are two stand-ins for long distance attention: ``none``, that is short distance
attention again, and ``shifted``, which is that with its groups moved by half their size, as in Swin
(arXiv 2103.14030, section 3.2): a third number, ``lead``, says by how much the first tile begins
before the axis does.

Where the axis ends inside a tile, its last groups simply have fewer members. The authors pad the
map to whole tiles and mask the padded keys instead; a masked key has no weight and a padded query
is thrown away, so both give the same output (CrossFormer, arXiv 2108.00154, section 3.2;
CrossFormer++, arXiv 2303.06908, section 3.2).
"""

from typing import List, NamedTuple, Tuple

import torch
from torch import Tensor

LDA_DEFINITIONS = ('interval', 'block', 'shifted', 'none')


class AxisRule(NamedTuple):
    """The one-dimensional rule above.

    Args:
        size (int): members of a group that is not ragged.
        interval (int): positions from one member to the next.
        lead (int): positions by which the first tile begins before the axis does; less than
            ``size``, and with an interval of 1 only.
    """

    size: int
    interval: int
    lead: int = 0


Rules = Tuple[AxisRule, AxisRule]  # of rows and columns


def fit_rule(length: int, rule: AxisRule) -> AxisRule:
    """The smallest numbers that group an axis in the same way.

    Their ``size`` is the number of members of the largest group.
    """
    # Not min(): of the symbolic lengths of torch.compile it makes ever longer terms, where an `if`
    # is one condition of the graph.
    interval = rule.interval if rule.interval <= length else length
    members = -(-length // interval)
    return AxisRule(rule.size if rule.size <= members else members, interval, rule.lead)


def count_groups(length: int, rule: AxisRule) -> int:
    """Groups of one axis, the ragged ones included.

    Group g starts at position ``g // interval * (size * interval) + g % interval`` (no lead).
    """
    tile = rule.size * rule.interval
    return length // tile * rule.interval + min(length % tile, rule.interval)


def group_axis(length: int, rule: AxisRule, device=None) -> List[Tensor]:
    """Positions of the groups of one axis.

    Returns:
        list[Tensor]: index tables (groups, members), one for each number of members that occurs (at
        most four), together holding every position of ``range(length)`` once.
    """
    size, interval, lead = rule
    tile = size * interval
    positions = torch.arange(length, device=device)
    tables = []
    if lead:
        tables.append(positions[None, : size - lead])
        positions, length = positions[size - lead :], length - (size - lead)
    whole = length - length % tile
    if whole:
        table = positions[:whole].view(-1, size, interval)  # (tile, member, group)
        tables.append(table.transpose(1, 2).reshape(-1, size))
    if whole < length:  # the ragged tile: its first `longer` groups get one member more
        rest = positions[whole:]
        # Not divmod: it is undefined on the symbolic sizes of torch.compile and torch.jit.trace.
        members, longer = (length - whole) // interval, (length - whole) % interval
        table = rest[: members * interval].view(members, interval).t()
        if longer:
            tables.append(torch.cat([table[:longer], rest[members * interval :, None]], 1))
        if members:
            tables.append(table[longer:])
    return tables


def group_map(
    height: int, width: int, rows: AxisRule, columns: AxisRule, device=None
) -> List[Tensor]:
    """The positions, row * width + column, of the members of each group of a map.

    Args:
        height, width (int): of the map.
        rows, columns (AxisRule): which positions of an axis form a group; any is valid.
        device (torch.device, optional): of the tables.

    Returns:
        list[Tensor]: tables (groups, row members, column members), one for each size of group that
        occurs, together holding every position once. Members are row-major, neighbours ``interval``
        apart.
    """
    column_tables = group_axis(width, columns, device)
    return [
        (r[:, None, :, None] * width + c[None, :, None, :]).flatten(0, 1)
        for r in group_axis(height, rows, device)
        for c in column_tables
    ]


def stage_rules(
    height: int, width: int, group_size: int, interval: int, lda: str
) -> Tuple[Rules, Rules]:
    """Rules of short and of long distance attention on a map, in the smallest numbers.

    On a map that is not larger than a group on one side both are short distance, in groups of
    min(H, W) or, under ``block``, of max(H, W), which is what each of the authors' two codes does.

    Args:
        height, width (int): of the map.
        group_size, interval (int): G and I of the stage.
        lda (str): how long distance attention groups, see :class:`.backbone.CrossFormer`.
    """
    short = AxisRule(group_size, 1)
    rows, columns = (
        {
            'interval': AxisRule(-(-side // interval), interval),
            'block': AxisRule(group_size, interval),
            'shifted': AxisRule(group_size, 1, half_lead(group_size)),
            'none': short,
        }[lda]
        for side in (height, width)
    )
    if is_small(height, width, group_size):
        side = max(height, width) if lda == 'block' else min(height, width)
        short = rows = columns = AxisRule(side, 1)
    return (
        (fit_rule(height, short), fit_rule(width, short)),
        (fit_rule(height, rows), fit_rule(width, columns)),
    )


def half_lead(group_size: int) -> int:
    """The lead that leaves half a group, rounded down, at the start; single positions stay."""
    return group_size - group_size // 2 if group_size > 1 else 0


def is_small(height: int, width: int, group_size: int) -> bool:
    return height <= group_size or width <= group_size
