"""The tiled path of attention equals the plain one, and stores less."""
import pytest
import torch
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode

from crossformer_mm import CrossFormer
from crossformer_mm.attention import GroupAttention
from crossformer_mm.grouping import AxisRule, Segment, group_map
from crossformer_mm.kernels import (choose_path, group_attention, plain_attention, tiled,
                                    tiled_attention, tiled_op)

from .older_torch import needs_torch

SMALL = dict(embed_dims=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 4))
CPU = torch.device('cpu')


def values_and_gradients(attention, qkv, table, segments, heads, seed=1):
    """Output and the gradients of qkv and table, for the same random output gradient."""
    qkv, table = qkv.clone().requires_grad_(), table.clone().requires_grad_()
    out = attention(qkv, table, segments, heads, 0.3)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    out.backward(weight.to(out.dtype))
    return out.detach(), qkv.grad, table.grad


def random_inputs(segments, heads, dim, dtype, spare=0):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(groups * height * width for groups, height, width in segments)
    height = max(segment.height for segment in segments) + spare
    width = max(segment.width for segment in segments) + spare
    qkv = torch.randn(tokens, 3 * heads * dim, generator=generator).to(dtype)
    table = torch.randn(heads, 2 * height - 1, 2 * width - 1, generator=generator).to(dtype)
    return qkv, table


def assert_close(ours, reference, tolerance):
    """Every pair of tensors; the tolerance is relative for values above 1."""
    for one, other in zip(ours, reference, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        scale = other.abs().max().clamp_min(1)
        assert (one - other).abs().max() <= tolerance * scale


SEGMENTS = {
    'one member': [(3, 1, 1)],
    'one row': [(2, 1, 9)],
    'one column': [(2, 9, 1)],
    'ragged': [(4, 7, 7), (2, 7, 3), (2, 4, 7), (1, 4, 3)],
    'many groups': [(20, 4, 4)],
    'wide': [(2, 6, 13)],
}


@pytest.mark.parametrize('tile', [1, 700, 2**20])
@pytest.mark.parametrize('case', SEGMENTS)
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize('small', [0, 1000], ids=['fused', 'products'])
def test_tiled_equals_plain(monkeypatch, case, tile, dtype, tolerance, small):
    """Whatever fits a tile: a row of queries of one head, some rows, or all of it."""
    monkeypatch.setattr(tiled, 'TILE', tile)
    monkeypatch.setattr(tiled, 'SMALL', small)
    segments = [Segment(*segment) for segment in SEGMENTS[case]]
    inputs = random_inputs(segments, heads=3, dim=5, dtype=dtype, spare=1)
    assert_close(values_and_gradients(tiled_attention, *inputs, segments, 3),
                 values_and_gradients(plain_attention, *inputs, segments, 3), tolerance)


def test_a_large_group_takes_several_tiles_as_they_are():
    segments = [Segment(2, 28, 38)]
    assert len(list(tiled.query_tiles(segments[0], 2))) > 2
    inputs = random_inputs(segments, heads=2, dim=8, dtype=torch.float32)
    assert_close(values_and_gradients(tiled_attention, *inputs, segments, 2),
                 values_and_gradients(plain_attention, *inputs, segments, 2), 5e-6)


@pytest.mark.parametrize('tile', [1, 300, 2**20])
@pytest.mark.parametrize('segment', [(1, 1, 1), (2, 7, 7), (3, 13, 9), (1, 2, 40), (900, 3, 3)])
def test_tiles_cover_every_query_once_within_the_limit(monkeypatch, segment, tile):
    monkeypatch.setattr(tiled, 'TILE', tile)
    segment = Segment(*segment)
    seen = torch.zeros(4, segment.height, dtype=torch.int)
    for heads, rows in tiled.query_tiles(segment, 4):
        seen[heads, rows] += 1
        pairs = seen[heads, rows].numel() * segment.width * segment.height * segment.width
        assert pairs <= max(tile, segment.width * segment.height * segment.width)
    assert (seen == 1).all()


def test_gradients_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(tiled, 'TILE', 40)
    segments = (Segment(2, 2, 3), Segment(1, 2, 1))
    qkv, table = random_inputs(segments, heads=2, dim=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *inputs: tiled_attention(*inputs, segments, 2, 0.5),
        (qkv.requires_grad_(), table.requires_grad_()))


@pytest.mark.parametrize('dtype, tolerance', [
    (torch.bfloat16, 2e-2),
    pytest.param(torch.float16, 3e-3, marks=needs_torch('2.2', 'baddbmm in float16 on the CPU'))])
def test_half_precision_stays_near_double(monkeypatch, dtype, tolerance):
    monkeypatch.setattr(tiled, 'TILE', 2000)
    segments = [Segment(5, 7, 7), Segment(2, 3, 7)]
    qkv, table = random_inputs(segments, heads=2, dim=16, dtype=dtype)
    ours = values_and_gradients(tiled_attention, qkv, table.float(), segments, 2)
    assert [x.dtype for x in ours] == [dtype, dtype, torch.float32]
    exact = values_and_gradients(plain_attention, qkv.double(), table.double(), segments, 2)
    assert_close([x.double() for x in ours], exact, tolerance)


@pytest.mark.parametrize('largest', [5., 59., 3000.])
def test_bfloat16_does_not_overflow(largest):
    """The bias alone makes the logits so large; what is right, float64 says."""
    segments = [Segment(3, 5, 6)]
    qkv, table = random_inputs(segments, heads=2, dim=16, dtype=torch.bfloat16)
    qkv, table = qkv * .01, table.float() * largest / table.float().abs().max()
    out = tiled_attention(qkv, table, segments, 2, 1.)
    assert out.isfinite().all()
    # The bias is rounded to bfloat16 as it is added; near ties of weights show that.
    exact = plain_attention(qkv.double(), table.bfloat16().double(), segments, 2, 1.)
    assert (out - exact).norm() < 3e-2 * exact.norm()


def test_second_derivative_is_refused():
    segments = [Segment(1, 2, 2)]
    qkv, table = random_inputs(segments, heads=1, dim=2, dtype=torch.float32)
    out = tiled_attention(qkv.requires_grad_(), table, segments, 1, 1.)
    grad, = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


def test_rule_takes_tiled_on_the_cpu_only_without_dropout_and_tracing():
    assert choose_path(CPU, dropout=0.) == 'tiled'
    assert choose_path(CPU, dropout=.1) == 'plain'
    assert choose_path(torch.device('meta'), dropout=0.) == 'plain'
    paths = []
    torch.jit.trace(lambda x: (paths.append(choose_path(CPU, 0.)), x + 1)[1], torch.ones(1),
                    check_trace=False)
    assert paths == ['plain']


def test_compiler_sees_the_plain_path_in_one_graph():
    segments = [Segment(2, 3, 3), Segment(1, 2, 3)]
    qkv, table = random_inputs(segments, heads=2, dim=4, dtype=torch.float32)
    compiled = torch.compile(group_attention, backend='eager', fullgraph=True)
    ours = values_and_gradients(compiled, qkv, table, segments, 2)
    assert_close(ours, values_and_gradients(plain_attention, qkv, table, segments, 2), 0.)


@needs_torch('2.4', 'library.opcheck')
def test_the_operator_keeps_the_rules_of_operators():
    """Its schema, shapes without data, and gradients, as torch.compile relies on them."""
    qkv, table = torch.randn(2 * 7 * 5, 3 * 16), torch.randn(2, 7, 5)
    library.opcheck(tiled_op._attend, (qkv.requires_grad_(), table.requires_grad_(), 2, 7, 5,
                                       4, 2, 3, 2, 2, .5, False))


@pytest.mark.parametrize('rule', [(3, 1), (3, 2), (4, 2)])
def test_the_operator_equals_plain_attention_of_lined_up_tokens(rule):
    rule, heads, sides = AxisRule(*rule), 2, (7, 9)
    qkv = torch.randn(2, *sides, 3 * 10, dtype=torch.float64)
    grouping = group_map(2, *sides, rule, rule)
    table = torch.randn(heads, *(2 * side - 1 for side in grouping.extent), dtype=torch.float64)

    def plain(qkv, table, segments, heads, scale):
        out = plain_attention(qkv.flatten(0, 2)[grouping.order], table, segments, heads, scale)
        return out[grouping.inverse].view(*qkv.shape[:3], -1)

    def operator(qkv, table, segments, heads, scale):
        return tiled_op.tiled_map_attention(qkv, table, grouping.rows, grouping.columns, heads,
                                            scale, avx512=False)

    assert_close(values_and_gradients(operator, qkv, table, grouping.segments, heads),
                 values_and_gradients(plain, qkv, table, grouping.segments, heads), 1e-12)


def test_dropout_of_attention_weights_trains_on_the_plain_path():
    attention = GroupAttention(16, 2, attn_drop_rate=.5).train()
    grouping = group_map(1, 6, 6, AxisRule(3, 1), AxisRule(3, 1))
    x = torch.rand(1, 6, 6, 16)
    assert not torch.equal(attention(x, grouping), attention(x, grouping))
    attention.eval()
    assert torch.equal(attention(x, grouping), attention(x, grouping))


def test_wrong_path_is_refused_by_name():
    with pytest.raises(ValueError, match="attention_path.*'plain', 'tiled', 'avx512', "
                       "'fused'.*'flash'"):
        CrossFormer(SMALL, attention_path='flash')


def test_tiled_is_refused_where_it_cannot_work():
    attention = GroupAttention(16, 2, attn_drop_rate=.5, path='tiled').train()
    grouping = group_map(1, 6, 6, AxisRule(3, 1), AxisRule(3, 1))
    with pytest.raises(ValueError, match="attention_path='tiled'.*attn_drop_rate is 0.5"):
        attention(torch.rand(1, 6, 6, 16), grouping)


def features_and_gradients(path, lda, image, with_cp=False):
    torch.manual_seed(0)
    model = CrossFormer(SMALL, group_size=(4, 4, 3, 3), interval=(4, 2, 2, 1), lda=lda,
                        with_cp=with_cp, attention_path=path).double()
    features = model(image.double())
    generator = torch.Generator().manual_seed(1)
    sum((f * torch.randn(f.shape, generator=generator)).sum() for f in features).backward()
    return [f.detach() for f in features], {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize('lda', ['interval', 'block'])
@pytest.mark.parametrize('size', [(2, 3, 48, 64), (1, 3, 73, 118), (1, 3, 16, 150), (1, 3, 5, 7)])
def test_backbone_is_the_same_on_both_paths(lda, size):
    image = torch.rand(size, generator=torch.Generator().manual_seed(2))
    ours, ours_grads = features_and_gradients('tiled', lda, image)
    reference, reference_grads = features_and_gradients('plain', lda, image)
    assert_close(ours, reference, 1e-10)
    assert all(grad is not None for grad in ours_grads.values())
    largest = max(grad.abs().max() for grad in reference_grads.values())
    for name, grad in reference_grads.items():
        assert (ours_grads[name] - grad).abs().max() <= 1e-10 * largest, name


def test_recomputed_blocks_give_the_same_gradients():
    image = torch.rand(1, 3, 40, 70, generator=torch.Generator().manual_seed(2))
    _, stored = features_and_gradients('tiled', 'interval', image)
    _, recomputed = features_and_gradients('tiled', 'interval', image, with_cp=True)
    for name, grad in stored.items():
        torch.testing.assert_close(recomputed[name], grad, rtol=1e-9, atol=1e-9)


def test_autocast_trains_in_bfloat16_near_float32():
    torch.manual_seed(0)
    attention = GroupAttention(32, 2)
    grouping = group_map(1, 12, 12, AxisRule(3, 4), AxisRule(3, 4))
    x = torch.randn(1, 12, 12, 32)
    grads = []
    for enabled in (False, True):
        attention.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            out = attention(x, grouping)
            assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
            out.float().square().sum().backward()
        grads.append([p.grad.clone() for p in attention.parameters()])
    assert all(grad.dtype == torch.float32 for grad in grads[1])
    scale = max(grad.abs().max() for grad in grads[0])
    for exact, half in zip(*grads):
        assert (exact - half).abs().max() < 3e-2 * scale


def stored_for_backward(path, side):
    """Bytes that a training step keeps between its two passes, each storage once."""
    model = CrossFormer(dict(embed_dims=16, depths=(2,), num_heads=(4,)), merge_sizes=(),
                        group_size=(7,), interval=(8,), out_indices=(0,), attention_path=path)
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        features = model(torch.rand(1, 3, side, side))
    assert all(f.requires_grad for f in features)
    return sum(storages.values()) - sum(p.nbytes for p in model.parameters())


def test_what_training_stores_grows_no_faster_than_the_area():
    stored = {(path, side): stored_for_backward(path, side)
              for path in ('plain', 'tiled') for side in (224, 448)}
    assert stored['tiled', 448] < 4.05 * stored['tiled', 224]
    assert stored['plain', 448] > 6 * stored['plain', 224]  # so the test can tell


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_no_tensor_of_all_pairs_exists(monkeypatch):
    """Not even of one group and head, in either pass; plain has them of all groups."""
    monkeypatch.setattr(tiled, 'TILE', 2**12)
    segments = [Segment(4, 12, 12)]
    inputs = random_inputs(segments, heads=4, dim=4, dtype=torch.float32)
    largest = {}
    for attention in (tiled_attention, plain_attention):
        with LargestTensor() as mode:
            values_and_gradients(attention, *inputs, segments, 4)
        largest[attention] = mode.numel
    assert largest[plain_attention] >= 4 * 4 * 144**2
    assert largest[tiled_attention] < 2 * 144**2
