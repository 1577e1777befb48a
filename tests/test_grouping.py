"""Groups follow their definition on maps of any size."""
import random
from collections import defaultdict

import pytest
import torch

from crossformer_mm.grouping import group_map, long_distance, short_distance


def random_cases(count):
    """(height, width, group size, interval), small numbers so that ragged edges abound."""
    rng = random.Random(0)
    return [(rng.randint(1, 40), rng.randint(1, 40), rng.randint(1, 9), rng.randint(1, 9))
            for _ in range(count)]


CASES = random_cases(25) + [(1, 1, 1, 1), (56, 56, 7, 8), (13, 29, 50, 3), (13, 29, 3, 50),
                            (31, 2, 1, 7), (17, 17, 17, 2), (18, 17, 17, 2), (18, 19, 17, 2)]
every_case = pytest.mark.parametrize('height, width, group_size, interval', CASES)
every_lda = pytest.mark.parametrize('lda', ['interval', 'block'])


def runs(grouping):
    """(tokens of one group in order, its height, its width) for every group."""
    start = 0
    for groups, height, width in grouping.segments:
        for _ in range(groups):
            yield grouping.order[start:start + height * width].tolist(), height, width
            start += height * width
    assert start == grouping.order.numel()


def groups_by(label, batch, height, width):
    """The definition: tokens of one image belong together where ``label(row, column)`` agrees."""
    members = defaultdict(set)
    for image in range(batch):
        for row in range(height):
            for column in range(width):
                members[image, label(row, column)].add((image * height + row) * width + column)
    return {frozenset(tokens) for tokens in members.values()}


def as_sets(grouping):
    return {frozenset(tokens) for tokens, _, _ in runs(grouping)}


def adjacent(size):
    return lambda row, column: (row // size, column // size)


@every_lda
@every_case
def test_short_distance_groups_are_adjacent_squares(height, width, group_size, interval, lda):
    grouping = group_map(2, height, width, *short_distance(height, width, group_size, lda))
    if min(height, width) <= group_size:
        group_size = min(height, width) if lda == 'interval' else max(height, width)
    assert as_sets(grouping) == groups_by(adjacent(group_size), 2, height, width)


@every_lda
@every_case
def test_long_distance_groups_are_every_interval_th_position(height, width, group_size, interval,
                                                             lda):
    grouping = group_map(2, height, width,
                         *long_distance(height, width, group_size, interval, lda))
    tile = group_size * interval

    def label(row, column):
        apart = (row % interval, column % interval)
        return apart if lda == 'interval' else (row // tile, column // tile, *apart)

    if min(height, width) <= group_size:  # small maps: short distance, whatever the block
        label = adjacent(min(height, width) if lda == 'interval' else max(height, width))
    assert as_sets(grouping) == groups_by(label, 2, height, width)


@every_lda
@every_case
def test_order_is_a_permutation_and_inverse_undoes_it(height, width, group_size, interval, lda):
    for rules in (short_distance(height, width, group_size, lda),
                  long_distance(height, width, group_size, interval, lda)):
        grouping = group_map(3, height, width, *rules)
        tokens = torch.arange(3 * height * width)
        assert torch.equal(grouping.order.sort().values, tokens)
        assert torch.equal(grouping.order[grouping.inverse], tokens)
        assert torch.equal(grouping.inverse[grouping.order], tokens)


@every_lda
@every_case
def test_members_are_row_major_and_as_many_as_the_segment_says(height, width, group_size,
                                                               interval, lda):
    rules = long_distance(height, width, group_size, interval, lda)
    grouping = group_map(1, height, width, *rules)
    for tokens, rows, columns in runs(grouping):
        assert tokens == sorted(tokens)
        assert len({token // width for token in tokens}) == rows <= grouping.extent[0]
        assert len({token % width for token in tokens}) == columns <= grouping.extent[1]
        row_members = [token // width for token in tokens[::columns]]
        steps = {b - a for a, b in zip(row_members, row_members[1:])}
        assert steps <= {rules[0].interval}


@every_lda
@pytest.mark.parametrize('side', [56, 100, 199, 331])
def test_segments_stay_few_however_large_the_map(side, lda):
    rules = long_distance(side, side + 1, 7, 8, lda)
    # At most three lengths of group on an axis: whole, and two in the ragged tile.
    assert len(group_map(4, side, side + 1, *rules).segments) <= 9


def test_one_side_at_group_size_makes_the_whole_map_small():
    for lda, size in (('interval', 7), ('block', 90)):
        assert long_distance(7, 90, 7, 8, lda) == short_distance(7, 90, 7, lda)
        assert [rule.size for rule in short_distance(7, 90, 7, lda)] == [size, size]
    assert long_distance(8, 90, 7, 8, 'interval') != short_distance(8, 90, 7, 'interval')


@every_case
def test_shifted_groups_are_squares_moved_by_half_a_group(height, width, group_size, interval):
    grouping = group_map(2, height, width,
                         *long_distance(height, width, group_size, interval, 'shifted'))
    shift, size = -(group_size // 2), group_size  # of a window's start, as Swin counts
    if min(height, width) <= group_size:
        shift, size = 0, min(height, width)
    assert as_sets(grouping) == groups_by(
        lambda row, column: ((row + shift) // size, (column + shift) // size), 2, height, width)
    tokens = torch.arange(2 * height * width)
    assert torch.equal(grouping.order.sort().values, tokens)
    assert torch.equal(grouping.order[grouping.inverse], tokens)


@every_case
def test_without_long_distance_every_block_is_short_distance(height, width, group_size, interval):
    short = short_distance(height, width, group_size, 'none')
    assert long_distance(height, width, group_size, interval, 'none') == short
    assert short == short_distance(height, width, group_size, 'interval')


def test_both_definitions_agree_at_the_training_size_of_imagenet():
    for side, interval in ((56, 8), (28, 4), (14, 2)):
        assert (as_sets(group_map(1, side, side, *long_distance(side, side, 7, interval, 'block')))
                == as_sets(group_map(1, side, side,
                                     *long_distance(side, side, 7, interval, 'interval'))))
