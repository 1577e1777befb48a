"""The definition in PyTorch: its values, and what it does and does not."""

import numpy as np
import pytest
import torch

from crossformer_mm.attention import GroupAttention
from crossformer_mm.grouping import AxisRule
from crossformer_mm.kernels import Call, choose_path, plain

from ..helpers import needs_torch
from .definition import Operations, random_inputs, values_and_gradients
from .paths import RULE


def by_loops(qkv, table, rows, columns, heads, scale) -> torch.Tensor:
    """One query at a time, with nothing of the package."""
    batch, height, width, channels = qkv.shape
    q, k, v = np.split(qkv.numpy().reshape(batch, height, width, 3, heads, -1), 3, 3)
    out = np.zeros((batch, height, width, heads, q.shape[-1]))

    def group(position, rule):
        tile = (position + rule.lead) // (rule.size * rule.interval)
        return tile, (position + rule.lead) % rule.interval

    centre = table.shape[1] // 2, table.shape[2] // 2
    for r, c in np.ndindex(height, width):
        members = [
            (y, x)
            for y, x in np.ndindex(height, width)
            if group(y, rows) == group(r, rows) and group(x, columns) == group(c, columns)
        ]
        offsets = [
            (centre[0] + (r - y) // rows.interval, centre[1] + (c - x) // columns.interval)
            for y, x in members
        ]
        for image, head in np.ndindex(batch, heads):
            keys = np.array([k[image, y, x, 0, head] for y, x in members])
            values = np.array([v[image, y, x, 0, head] for y, x in members])
            bias = np.array([float(table[(head, *offset)]) for offset in offsets])
            logits = scale * keys @ q[image, r, c, 0, head] + bias
            weights = np.exp(logits - logits.max())
            out[image, r, c, head] = weights @ values / weights.sum()
    return torch.from_numpy(out.reshape(batch, height, width, -1))


@pytest.mark.parametrize(
    'rows, columns', [((3, 1), (2, 1)), ((2, 2), (3, 2)), ((4, 1, 2), (3, 1, 2)), ((9, 3), (1, 1))]
)
def test_definition_is_that_of_loops_over_positions(rows, columns):
    rows, columns = AxisRule(*rows), AxisRule(*columns)
    inputs = random_inputs((2, 5, 7), rows, columns, 2, 3, torch.float64, spare=1)
    arguments = *inputs, rows, columns, 2, 0.7
    expected = by_loops(*arguments)
    torch.testing.assert_close(plain.attend(*arguments), expected, atol=1e-6, rtol=1e-6)


def test_tracers_get_the_definition():
    paths = []

    def forward(qkv):
        paths.append(choose_path(Call.of(qkv, *RULE, 1, 0.0)))
        return qkv + 1

    torch.jit.trace(forward, torch.ones(1, 2, 2, 3), check_trace=False)
    assert paths == ['plain']


def test_plain_splits_what_is_too_much_for_one_call(monkeypatch):
    """CUDA fails on as many groups as a map of 3840x2160 in a batch of 8 has."""
    inputs, sizes = random_inputs((2, 7, 9), *RULE, 2, 4), []
    expected = values_and_gradients('plain', *inputs, *RULE, 2, 0.3)
    attend = torch.nn.functional.scaled_dot_product_attention

    def watch(q, *args, **options):
        sizes.append(len(q))
        return attend(q, *args, **options)

    monkeypatch.setattr(plain, 'MOST_GROUPS', 5)
    monkeypatch.setattr(plain.F, 'scaled_dot_product_attention', watch)
    found = values_and_gradients('plain', *inputs, *RULE, 2, 0.3)
    torch.testing.assert_close(found, expected)
    assert max(sizes) == 5 and sum(sizes) == 2 * 9


def test_plain_moves_tokens_without_adding_in_any_order():
    """Its moves are permutations, whose gradients gather, too."""
    rules = AxisRule(2, 3), AxisRule(4, 2)
    qkv, table = random_inputs((2, 7, 9), *rules, 2, 4)
    out = plain.attend(qkv.requires_grad_(), table, *rules, 2, 0.3)
    with Operations() as operations:
        out.sum().backward()
    names = [name.split('.')[1] for name in operations.names]  # aten.index_select.default
    assert names.count('index_select') == 2
    assert not {'index_add', 'index_add_', 'index_put', 'scatter_add'} & {*names}


@needs_torch('2.4', 'torch.autograd.Function with both kinds of derivatives in torch.func')
def test_plain_is_differentiable_twice():
    qkv, table = random_inputs((1, 3, 4), *RULE, 1, 2, torch.float64)
    inputs = qkv.requires_grad_(), table.double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *x: plain.attend(*x, *RULE, 1, 0.3), inputs)


def test_dropout_of_attention_weights_trains_on_the_plain_path():
    attention, x = GroupAttention(16, 2, attn_drop_rate=0.5), torch.rand(1, 6, 6, 16)
    for training in (True, False):
        attention.train(training)
        assert torch.equal(attention(x, *RULE), attention(x, *RULE)) != training
