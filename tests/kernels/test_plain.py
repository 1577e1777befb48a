"""The definition in PyTorch: its values, and what it does and does not."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crossformer_mm import CrossFormer
from crossformer_mm.attention import GroupAttention
from crossformer_mm.grouping import AxisRule
from crossformer_mm.kernels import Call, choose_path, map_attention, plain

from ..conftest import SMALL
from ..helpers import needs_torch
from .definition import by_loops, random_inputs, values_and_gradients
from .paths import RULE


@pytest.mark.parametrize(
    'rows, columns', [((3, 1), (2, 1)), ((2, 2), (3, 2)), ((4, 1, 2), (3, 1, 2)), ((9, 3), (1, 1))]
)
def test_definition_is_that_of_loops_over_positions(rows, columns):
    rows, columns = AxisRule(*rows), AxisRule(*columns)
    inputs = random_inputs((2, 5, 7), rows, columns, 2, 3, torch.float64, spare=1)
    torch.testing.assert_close(
        plain.attend(*inputs, rows, columns, 2, 0.7),
        by_loops(*inputs, rows, columns, 2, 0.7),
        atol=1e-6,
        rtol=1e-6,
    )


def test_tracers_get_the_definition():
    paths = []

    def forward(qkv):
        paths.append(choose_path(Call.of(qkv, *RULE, 1, 0.0)))
        return qkv + 1

    torch.jit.trace(forward, torch.ones(1, 2, 2, 3), check_trace=False)
    assert paths == ['plain']


def test_a_trace_of_one_image_serves_batches():
    """Other batches got other values, of some images, without an error."""
    backbone = CrossFormer(SMALL).eval()
    with torch.no_grad():
        traced = torch.jit.trace(backbone, torch.rand(1, 3, 64, 96), check_trace=False)
        images = torch.rand(3, 3, 64, 96)
        for one, other in zip(traced(images), backbone(images)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


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


class Operations(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_plain_moves_tokens_without_adding_in_any_order():
    """Its moves are permutations, whose gradients gather, too."""
    qkv, table = random_inputs((2, 7, 9), AxisRule(2, 3), AxisRule(4, 2), 2, 4)
    out = plain.attend(qkv.requires_grad_(), table, AxisRule(2, 3), AxisRule(4, 2), 2, 0.3)
    with Operations() as operations:
        out.sum().backward()
    assert operations.names.count('index_select') == 2
    assert not {'index_add', 'index_add_', 'index_put', 'scatter_add'} & {*operations.names}


@needs_torch('2.4', 'torch.autograd.Function with both kinds of derivatives in torch.func')
def test_plain_is_differentiable_twice():
    qkv, table = random_inputs((1, 3, 4), *RULE, 1, 2, torch.float64)
    inputs = qkv.requires_grad_(), table.double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *x: plain.attend(*x, *RULE, 1, 0.3), inputs)


@needs_torch('2.4', 'torch.compiler.is_compiling inside of a graph')
def test_definition_compiles_to_one_graph():
    inputs = random_inputs((1, 5, 4), *RULE, 2, 4)
    compiled = torch.compile(map_attention, backend='eager', fullgraph=True)
    out = compiled(*inputs, *RULE, 2, 0.3, path='plain')
    torch.testing.assert_close(out, map_attention(*inputs, *RULE, 2, 0.3, path='plain'))


def test_dropout_of_attention_weights_trains_on_the_plain_path():
    attention, x = GroupAttention(16, 2, attn_drop_rate=0.5).train(), torch.rand(1, 6, 6, 16)
    assert not torch.equal(attention(x, *RULE), attention(x, *RULE))
    attention.eval()
    assert torch.equal(attention(x, *RULE), attention(x, *RULE))
