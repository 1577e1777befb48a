"""Groups follow their definition on maps of any size."""

import random
from collections import defaultdict

import pytest

from crossformer_mm.grouping import LDA_DEFINITIONS, group_map, stage_rules


def short_distance(height, width, group_size, lda):
    return stage_rules(height, width, group_size, 1, lda)[0]


def long_distance(height, width, group_size, interval, lda):
    return stage_rules(height, width, group_size, interval, lda)[1]


# Height, width, group size, interval: small numbers, so that ragged edges abound.
RANDOM = random.Random(0)
CASES = [tuple(RANDOM.randint(1, most) for most in (40, 40, 9, 9)) for _ in range(25)] + [
    (1, 1, 1, 1),
    (56, 56, 7, 8),
    (13, 29, 50, 3),
    (13, 29, 3, 50),
    (31, 2, 1, 7),
    (17, 17, 17, 2),
    (18, 17, 17, 2),
    (18, 19, 17, 2),
]
every_case = pytest.mark.parametrize('height, width, group_size, interval', CASES)
every_lda = pytest.mark.parametrize('lda', ['interval', 'block'])


def runs(tables):
    """(positions of one group in order, its height, its width) for every group."""
    for table in tables:
        for members in table:
            yield members.flatten().tolist(), *members.shape


def groups_by(label, height, width):
    """The definition: positions belong together where ``label(row, column)`` agrees."""
    members = defaultdict(list)
    for row in range(height):
        for column in range(width):
            members[label(row, column)].append(row * width + column)
    return sorted(members.values())


def in_order(tables):
    """Members of every group, in row-major order."""
    return sorted(tokens for tokens, _, _ in runs(tables))


def adjacent(size):
    return lambda row, column: (row // size, column // size)


@every_lda
@every_case
def test_short_distance_groups_are_adjacent_squares(height, width, group_size, interval, lda):
    grouping = group_map(height, width, *short_distance(height, width, group_size, lda))
    if min(height, width) <= group_size:
        group_size = min(height, width) if lda == 'interval' else max(height, width)
    assert in_order(grouping) == groups_by(adjacent(group_size), height, width)


@every_lda
@every_case
def test_long_distance_groups_are_every_interval_th_position(
    height, width, group_size, interval, lda
):
    grouping = group_map(height, width, *long_distance(height, width, group_size, interval, lda))
    tile = group_size * interval

    def label(row, column):
        apart = (row % interval, column % interval)
        return apart if lda == 'interval' else (row // tile, column // tile, *apart)

    if min(height, width) <= group_size:  # small maps: short distance, whatever the block
        label = adjacent(min(height, width) if lda == 'interval' else max(height, width))
    assert in_order(grouping) == groups_by(label, height, width)


@every_case
@pytest.mark.parametrize('lda', LDA_DEFINITIONS)
def test_rules_of_a_stage_are_in_the_smallest_numbers(height, width, group_size, interval, lda):
    for rows, columns in stage_rules(height, width, group_size, interval, lda):
        tables = group_map(height, width, rows, columns)
        assert not rows.lead <= 0 or rows.size == max(table.shape[1] for table in tables)
        assert not columns.lead <= 0 or columns.size == max(table.shape[2] for table in tables)


@every_lda
@every_case
def test_members_are_as_many_as_the_segment_says_and_an_interval_apart(
    height, width, group_size, interval, lda
):
    rules = long_distance(height, width, group_size, interval, lda)
    (tall, _, _), (wide, _, _) = rules
    for tokens, rows, columns in runs(group_map(height, width, *rules)):
        assert len({token // width for token in tokens}) == rows <= tall
        assert len({token % width for token in tokens}) == columns <= wide
        row_members = [token // width for token in tokens[::columns]]
        steps = {b - a for a, b in zip(row_members, row_members[1:])}
        assert steps <= {rules[0].interval}


@every_lda
@pytest.mark.parametrize('side', [56, 100, 199, 331])
def test_sizes_of_groups_stay_few_however_large_the_map(side, lda):
    rules = long_distance(side, side + 1, 7, 8, lda)
    # At most three lengths of group on an axis: whole, and two in the ragged tile.
    assert len(group_map(side, side + 1, *rules)) <= 9


def test_one_side_at_group_size_makes_the_whole_map_small():
    for lda, sizes in (('interval', [7, 7]), ('block', [7, 90])):
        assert long_distance(7, 90, 7, 8, lda) == short_distance(7, 90, 7, lda)
        assert [rule.size for rule in short_distance(7, 90, 7, lda)] == sizes
    assert long_distance(8, 90, 7, 8, 'interval') != short_distance(8, 90, 7, 'interval')


@every_case
def test_shifted_groups_are_squares_moved_by_half_a_group(height, width, group_size, interval):
    rules = long_distance(height, width, group_size, interval, 'shifted')
    grouping = group_map(height, width, *rules)
    shift, size = -(group_size // 2), group_size  # of a window's start, as Swin counts
    if min(height, width) <= group_size:
        shift, size = 0, min(height, width)
    assert in_order(grouping) == groups_by(
        lambda row, column: ((row + shift) // size, (column + shift) // size), height, width
    )


@every_case
def test_without_long_distance_every_block_is_short_distance(height, width, group_size, interval):
    short = short_distance(height, width, group_size, 'none')
    assert long_distance(height, width, group_size, interval, 'none') == short
    assert short == short_distance(height, width, group_size, 'interval')


def test_both_definitions_agree_at_the_training_size_of_imagenet():
    for side, interval in ((56, 8), (28, 4), (14, 2)):
        block, every = (
            in_order(group_map(side, side, *long_distance(side, side, 7, interval, lda)))
            for lda in ('block', 'interval')
        )
        assert block == every
