"""Dynamic position bias: an MLP of query - key, looked up per pair."""
import pytest
import torch

from crossformer_mm.position_bias import DynamicPositionBias, bias_of_pairs


@pytest.fixture
def pos():
    return DynamicPositionBias(channels=64, num_heads=3)


def mlp(pos, row, column):
    """The network itself on one offset."""
    offset = torch.tensor([[row, column]], dtype=pos.pos_proj.weight.dtype)
    return pos.pos3(pos.pos2(pos.pos1(pos.pos_proj(offset))))[0]


@pytest.mark.parametrize('height, width', [(1, 1), (1, 6), (5, 1), (3, 4), (7, 7)])
@pytest.mark.parametrize('larger', [(0, 0), (2, 0), (1, 5)])
def test_pairs_read_the_table_at_query_minus_key(height, width, larger):
    rows, columns = height + larger[0], width + larger[1]
    table = torch.randn(2, 2 * rows - 1, 2 * columns - 1)
    bias = bias_of_pairs(table, height, width)
    assert bias.shape == (2, height * width, height * width)
    for query in range(height * width):
        for key in range(height * width):
            down = query // width - key // width
            right = query % width - key % width
            assert torch.equal(bias[:, query, key],
                               table[:, down + rows - 1, right + columns - 1])


def test_bias_of_a_pair_is_the_network_at_query_minus_key(pos):
    bias = bias_of_pairs(pos(3, 4), 3, 4)
    torch.testing.assert_close(bias[:, 2 * 4 + 1, 0 * 4 + 3], mlp(pos, 2, -2))
    torch.testing.assert_close(bias[:, 0 * 4 + 3, 2 * 4 + 1], mlp(pos, -2, 2))
    assert not torch.allclose(mlp(pos, 2, -2), mlp(pos, -2, 2))  # else the sign would be untested


def test_table_of_a_large_group_contains_that_of_a_small_one(pos):
    large, small = pos(9, 6), pos(4, 5)
    assert large.shape == (3, 17, 11) and small.shape == (3, 7, 9)
    torch.testing.assert_close(large[:, 5:12, 1:10], small)


def test_network_is_a_sixteenth_as_wide_as_the_stage(pos):
    assert pos.pos_proj.weight.shape == (4, 2)
    assert pos.pos1[2].weight.shape == pos.pos2[2].weight.shape == (4, 4)
    assert pos.pos3[2].weight.shape == (3, 4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_leaves_it_in_float32(pos, dtype):
    reference = pos(300, 1)
    with torch.autocast('cpu', dtype):
        table = pos(300, 1)
    assert table.dtype == torch.float32
    assert torch.equal(table, reference)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_is_finite_over_four_thousand_offsets(pos, dtype):
    table = pos.to(dtype)(2000, 1)
    assert table.shape == (3, 3999, 1) and table.dtype == dtype
    assert table.isfinite().all()
