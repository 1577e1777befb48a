"""Position biases: of which pair each entry is, and what each kind of bias says."""

import cv2
import pytest
import torch

from crossformer_mm.attention import GroupAttention
from crossformer_mm.grouping import AxisRule, stage_rules
from crossformer_mm.position_bias import (
    POSITION_BIASES,
    AbsolutePosition,
    DynamicPositionBias,
    NoPositionBias,
    RelativePositionBias,
    build_position_bias,
)

from .helpers import FLOAT16, add_noise


@pytest.fixture
def pos():
    return DynamicPositionBias(channels=64, num_heads=3)


@pytest.mark.parametrize('dtype', [torch.bfloat16, FLOAT16])
def test_autocast_leaves_it_in_float32(pos, dtype):
    reference = pos(300, 1)
    with torch.autocast('cpu', dtype):
        table = pos(300, 1)
    torch.testing.assert_close(table, reference, rtol=0, atol=0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, FLOAT16])
def test_is_finite_over_four_thousand_offsets(pos, dtype):
    table = pos.to(dtype)(2000, 1)
    assert table.shape == (3, 3999, 1) and table.dtype == dtype
    assert table.isfinite().all()


def test_residual_network_adds_the_two_middle_layers_to_what_they_take():
    plain = DynamicPositionBias(channels=64, num_heads=3)
    residual = build_position_bias('dynamic_residual', 64, 3, group_size=7)
    residual.load_state_dict(plain.state_dict())  # the same parameters
    offset = torch.tensor([[2.0, -1.0]])
    first = plain.pos_proj(offset)
    second = first + plain.pos1(first)
    expected = plain.pos3(second + plain.pos2(second))[0]
    torch.testing.assert_close(residual(3, 4)[:, 2 + 2, 3 - 1], expected)
    assert not torch.allclose(plain(3, 4)[:, 2 + 2, 3 - 1], expected)


def test_learnt_table_is_itself_for_groups_of_its_size():
    bias = RelativePositionBias(num_heads=3, group_size=5)
    assert torch.equal(bias(5, 5), bias.relative_position_bias_table)
    assert bias(5, 5).shape == (3, 9, 9)


def bicubic(x, height, width):
    """OpenCV's, for (C, H, W) that becomes larger."""
    channels_last = x.detach().permute(1, 2, 0).numpy()
    resized = cv2.resize(channels_last, (width, height), interpolation=cv2.INTER_CUBIC)
    return torch.from_numpy(resized).permute(2, 0, 1)


@pytest.mark.parametrize('height, width', [(6, 5), (7, 9), (20, 31)])
def test_learnt_table_is_resized_for_groups_of_other_sizes(height, width):
    bias = RelativePositionBias(num_heads=3, group_size=5)
    table = bias(height, width)
    assert table.shape == (3, 2 * height - 1, 2 * width - 1)
    learnt = bias.relative_position_bias_table
    expected = bicubic(learnt, 2 * height - 1, 2 * width - 1)
    torch.testing.assert_close(table, expected, atol=1e-5, rtol=1e-4)
    # No offset stays no offset.
    torch.testing.assert_close(table[:, height - 1, width - 1], learnt[:, 4, 4])


@pytest.mark.parametrize('height, width', [(4, 4), (7, 5), (12, 9)])
def test_absolute_position_adds_its_map_resized(height, width):
    position = AbsolutePosition(channels=3, side=4)
    x = torch.randn(2, height, width, 3)
    expected = bicubic(position.absolute_pos_embed, height, width).permute(1, 2, 0)
    torch.testing.assert_close(position(x) - x, expected.expand_as(x), atol=1e-5, rtol=1e-4)


def test_without_bias_attention_does_not_see_where_tokens_are():
    """Members of a group in another order give the same results in that order."""
    attention = build_attention('none')
    rules = AxisRule(6, 1), AxisRule(6, 1)
    x, order = torch.randn(1, 6, 6, 32), torch.randperm(36)

    def shuffled(m):
        return m.flatten(0, 2)[order].view_as(m)

    torch.testing.assert_close(attention(shuffled(x), *rules), shuffled(attention(x, *rules)))
    told = build_attention('relative')
    assert not torch.allclose(told(shuffled(x), *rules), shuffled(told(x, *rules)), atol=1e-4)


def build_attention(position_bias, num_heads=2, group_size=6):
    attention = GroupAttention(32, num_heads, position_bias=position_bias, group_size=group_size)
    return add_noise(attention.eval(), 0.5)


@pytest.mark.parametrize('shifted', [False, True])
@pytest.mark.parametrize('height, width', [(14, 21), (28, 14)])
def test_with_a_learnt_table_and_shifted_groups_it_is_attention_of_swin(height, width, shifted):
    swin = pytest.importorskip('mmdet.models.backbones.swin')
    theirs = swin.ShiftWindowMSA(32, 4, window_size=7, shift_size=3 if shifted else 0).eval()
    ours = build_attention('relative', num_heads=4, group_size=7)
    table = ours.pos.relative_position_bias_table
    inner = theirs.w_msa
    with torch.no_grad():
        for layer in ('qkv', 'proj'):
            getattr(inner, layer).load_state_dict(getattr(ours, layer).state_dict())
        inner.relative_position_bias_table.copy_(table.flatten(1).T)
    rules = stage_rules(height, width, 7, 1, 'shifted')[int(shifted)]
    x = torch.randn(2, height, width, 32, requires_grad=True)
    ours_out = ours(x, *rules)
    theirs_out = theirs(x.flatten(1, 2), (height, width)).view_as(x)
    torch.testing.assert_close(ours_out, theirs_out, atol=2e-5, rtol=1e-4)
    weights = torch.randn_like(x)
    grads = torch.autograd.grad((ours_out * weights).sum(), (x, table))
    learnt = x, inner.relative_position_bias_table
    references = torch.autograd.grad((theirs_out * weights).sum(), learnt)
    ours = grads[0], grads[1].flatten(1).T
    torch.testing.assert_close(ours, references, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize('name', POSITION_BIASES)
def test_every_kind_of_bias_gives_a_table_of_a_groups_offsets(name):
    bias = build_position_bias(name, channels=32, num_heads=2, group_size=4)
    for height, width in ((4, 4), (1, 1), (3, 9)):
        assert bias(height, width).shape == (2, 2 * height - 1, 2 * width - 1)
    assert isinstance(bias, NoPositionBias) == (name in ('absolute', 'none'))
