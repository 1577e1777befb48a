"""Every way to compute attention equals the definition; one table chooses among them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from crossformer_mm import CrossFormer, kernels
from crossformer_mm.attention import GroupAttention
from crossformer_mm.compat import TORCH
from crossformer_mm.grouping import LDA_DEFINITIONS, AxisRule, fit_rule, stage_rules
from crossformer_mm.kernels import Call, choose_path, fused, map_attention, native, plain

from .older_torch import needs_torch

CPU = torch.device('cpu')
SMALL = dict(embed_dims=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
RULE = AxisRule(3, 1), AxisRule(3, 1)


def values_and_gradients(qkv, table, *arguments, **options):
    """Output and the gradients of qkv and table, for the same random output gradient."""
    qkv, table = qkv.clone().requires_grad_(), table.clone().requires_grad_()
    out = map_attention(qkv, table, *arguments, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(weight.to(out))
    return out.detach(), qkv.grad, table.grad


def random_inputs(shape, rows, columns, heads, dim, dtype=torch.float32, spare=0):
    """A map of queries, keys and values; biases for ``spare`` members more than there are."""
    batch, height, width = shape
    generator = torch.Generator().manual_seed(0)
    sides = [
        2 * (fit_rule(side, rule).size + spare) - 1
        for side, rule in ((height, rows), (width, columns))
    ]
    qkv = torch.randn(batch, height, width, 3 * heads * dim, generator=generator)
    return qkv.to(dtype), torch.randn(heads, *sides, generator=generator)


def by_loops(qkv, table, rows, columns, heads, scale):
    """The definition once more, one query at a time, with nothing of the package."""
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
        for image, head in np.ndindex(batch, heads):
            logits = np.array(
                [
                    scale * (q[image, r, c, 0, head] * k[image, y, x, 0, head]).sum()
                    + float(
                        table[
                            head,
                            centre[0] + (r - y) // rows.interval,
                            centre[1] + (c - x) // columns.interval,
                        ]
                    )
                    for y, x in members
                ]
            )
            weights = np.exp(logits - logits.max())
            out[image, r, c, head] = (
                sum(weight * v[image, y, x, 0, head] for weight, (y, x) in zip(weights, members))
                / weights.sum()
            )
    return torch.from_numpy(out.reshape(batch, height, width, -1))


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


SERVED = [
    name for name in kernels.PATHS if name != 'fused' and not kernels.PATHS[name].why_not(Call(CPU))
]


@pytest.mark.parametrize('path', SERVED)
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_path_equals_the_definition_in_float64(path, dtype, tolerance, data):
    number = st.integers
    height, width = data.draw(number(1, 23)), data.draw(number(1, 23))
    size, interval = data.draw(number(1, 8)), data.draw(number(1, 5))
    lda = data.draw(st.sampled_from(LDA_DEFINITIONS))
    rules = stage_rules(height, width, size, interval, lda)[data.draw(number(0, 1))]
    heads, dim = data.draw(number(1, 3)), data.draw(st.sampled_from((1, 5, 16, 32, 40)))
    inputs = random_inputs(
        (data.draw(number(1, 2)), height, width),
        *rules,
        heads,
        dim,
        dtype,
        spare=data.draw(number(0, 2)),
    )
    if path == 'plain' and dtype == torch.bfloat16:
        tolerance = 3e-2  # PyTorch 2.1 rounds in more places
    ours = values_and_gradients(*inputs, *rules, heads, 0.3, path=path)
    exact = values_and_gradients(*(x.double() for x in inputs), *rules, heads, 0.3, path='plain')
    assert [x.dtype for x in ours] == [dtype, dtype, torch.float32]
    # A gradient of the table is a sum over all positions, in which rounding adds up.
    for one, other, least in zip(ours, exact, (1, 1, (height * width) ** 0.5)):
        assert (one - other).abs().max() <= tolerance * max(other.abs().max(), least)


@pytest.mark.parametrize(
    'call, path',
    [
        (Call(CPU), 'native'),
        (Call(CPU, has_lead=True), 'native'),
        (Call(CPU, capture_mode='compile'), 'native'),
        (Call(CPU, torch.bfloat16, 40), 'native'),
        (Call(CPU, dropout=0.1), 'plain'),
        (Call(CPU, torch.float64), 'plain'),
        (Call(CPU, head_dim=129), 'plain'),
        (Call(CPU, capture_mode='export'), 'plain'),
        (Call(torch.device('meta')), 'plain'),
    ],
)
def test_the_best_path_that_serves_is_chosen(monkeypatch, call, path):
    monkeypatch.setattr(fused, 'has_triton', lambda: False)  # whose interpreter tests turn on
    monkeypatch.setattr(native, 'MISSING', '')  # as where there is a compiler
    assert choose_path(call) == path
    monkeypatch.setattr(native, 'MISSING', 'it was not compiled')
    assert choose_path(call) == 'plain'


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
    expected = values_and_gradients(*inputs, *RULE, 2, 0.3, path='plain')
    attend = torch.nn.functional.scaled_dot_product_attention

    def watch(q, *args, **options):
        sizes.append(len(q))
        return attend(q, *args, **options)

    monkeypatch.setattr(plain, 'MOST_GROUPS', 5)
    monkeypatch.setattr(plain.F, 'scaled_dot_product_attention', watch)
    found = values_and_gradients(*inputs, *RULE, 2, 0.3, path='plain')
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


@pytest.mark.parametrize(
    'option, reason',
    [
        (dict(dropout=0.5), 'attn_drop_rate is 0.5'),
        (dict(dtype=torch.float64), 'got torch.float64'),
        (dict(head_dim=129), 'at most 128 channels, but they have 129'),
        (dict(capture_mode='export'), 'an exporter'),
        (dict(device=torch.device('meta')), 'got .* meta'),
    ],
)
def test_a_path_that_cannot_serve_is_refused_not_replaced(option, reason):
    with pytest.raises(ValueError, match=f"attention_path='native'.*{reason}.*'plain'"):
        choose_path(Call(**{'device': CPU, **option}), 'native')


def test_wrong_path_is_refused_by_name():
    with pytest.raises(ValueError, match="attention_path.*'native', 'fused', 'plain'.*'flash'"):
        CrossFormer(SMALL, attention_path='flash')


@needs_torch('2.4', 'torch.compiler.is_compiling inside of a graph')
def test_definition_compiles_to_one_graph():
    inputs = random_inputs((1, 5, 4), *RULE, 2, 4)
    compiled = torch.compile(map_attention, backend='eager', fullgraph=True)
    out = compiled(*inputs, *RULE, 2, 0.3, path='plain')
    torch.testing.assert_close(out, map_attention(*inputs, *RULE, 2, 0.3, path='plain'))


needs_native = pytest.mark.skipif(
    bool(native.why_not(Call(CPU))), reason=f'native attention: {native.why_not(Call(CPU))}'
)


@needs_native
@needs_torch('2.4', 'torch.library.opcheck')
def test_the_operator_keeps_the_rules_of_operators():
    """Its schema, shapes without data, and gradients, as torch.compile relies on them."""
    qkv, table = torch.randn(2 * 7 * 5, 3 * 16), torch.randn(2, 7, 5)
    torch.library.opcheck(
        torch.ops.crossformer_mm.native_attention.default,
        (qkv.requires_grad_(), table.requires_grad_(), [2, 7, 5], [4, 2, 0], [3, 2, 0], 2, 0.5),
    )


@needs_native
def test_second_derivative_is_refused():
    qkv, table = random_inputs((1, 2, 2), *RULE, 1, 8)
    out = native.attend(qkv.requires_grad_(), table, *RULE, 1, 1.0)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match='no autograd formula|once_differentiable'):
        grad.sum().backward()


@needs_native
@needs_torch('2.4', 'torch.library.register_fake')
@pytest.mark.parametrize('lda', ['interval', 'shifted'])
def test_compiler_makes_one_graph_for_images_of_many_sizes(lda):
    backbone = CrossFormer(
        dict(embed_dims=16, depths=(2,), num_heads=(1,)),
        group_size=(3,),
        interval=(2,),
        merge_sizes=(),
        out_indices=(0,),
        lda=lda,
    ).eval()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(backbone, backend=count, dynamic=True, fullgraph=True)
    for height, width in ((64, 80), (57, 131), (90, 44)):
        image = torch.rand(1, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(compiled(image), backbone(image))
    assert len(graphs) == 1 or TORCH <= (2, 6)  # which makes one for each size


def test_dropout_of_attention_weights_trains_on_the_plain_path():
    attention, x = GroupAttention(16, 2, attn_drop_rate=0.5).train(), torch.rand(1, 6, 6, 16)
    assert not torch.equal(attention(x, *RULE), attention(x, *RULE))
    attention.eval()
    assert torch.equal(attention(x, *RULE), attention(x, *RULE))


def features_and_gradients(path, lda, image, with_cp=False):
    torch.manual_seed(0)
    model = CrossFormer(
        SMALL,
        group_size=(4, 4, 3, 3),
        interval=(4, 2, 2, 1),
        lda=lda,
        with_cp=with_cp,
        attention_path=path,
    )
    features = model(image)
    generator = torch.Generator().manual_seed(1)
    sum((f * torch.randn(f.shape, generator=generator)).sum() for f in features).backward()
    return [f.detach() for f in features], {n: p.grad for n, p in model.named_parameters()}


@needs_native
@pytest.mark.parametrize('lda', LDA_DEFINITIONS)
@pytest.mark.parametrize('size', [(2, 3, 48, 64), (1, 3, 73, 118), (1, 3, 16, 150), (1, 3, 5, 7)])
def test_backbone_is_the_same_on_both_paths(lda, size):
    image = torch.rand(size, generator=torch.Generator().manual_seed(2))
    ours, ours_grads = features_and_gradients('native', lda, image)
    reference, reference_grads = features_and_gradients('plain', lda, image)
    for one, other in zip(ours, reference):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    assert all(grad is not None for grad in ours_grads.values())
    largest = max(grad.abs().max() for grad in reference_grads.values())
    for name, grad in reference_grads.items():
        assert (ours_grads[name] - grad).abs().max() <= 1e-5 * largest, name


def test_recomputed_blocks_give_the_same_gradients():
    image = torch.rand(1, 3, 40, 70, generator=torch.Generator().manual_seed(2))
    _, stored = features_and_gradients(None, 'interval', image)
    _, recomputed = features_and_gradients(None, 'interval', image, with_cp=True)
    for name, grad in stored.items():
        torch.testing.assert_close(recomputed[name], grad, rtol=1e-5, atol=1e-5)


def test_autocast_trains_in_bfloat16_near_float32():
    torch.manual_seed(0)
    attention, rules = GroupAttention(32, 2), (AxisRule(3, 4), AxisRule(3, 4))
    x, grads = torch.randn(1, 12, 12, 32), []
    for enabled in (False, True):
        attention.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            out = attention(x, *rules)
            assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
            out.float().square().sum().backward()
        grads.append([p.grad.clone() for p in attention.parameters()])
    assert all(grad.dtype == torch.float32 for grad in grads[1])
    scale = max(grad.abs().max() for grad in grads[0])
    for exact, half in zip(*grads):
        assert (exact - half).abs().max() < 3e-2 * scale


def stored_for_backward(path, side):
    """Bytes that a training step keeps between its two passes, each storage once."""
    model = CrossFormer(
        dict(embed_dims=16, depths=(2,), num_heads=(4,)),
        merge_sizes=(),
        group_size=(7,),
        interval=(8,),
        out_indices=(0,),
        attention_path=path,
    )
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        features = model(torch.rand(1, 3, side, side))
    assert all(f.requires_grad for f in features)
    return sum(storages.values()) - sum(p.numel() * 4 for p in model.parameters())


@needs_native
def test_what_training_stores_grows_no_faster_than_the_area():
    stored = {
        (path, side): stored_for_backward(path, side)
        for path in ('plain', 'native')
        for side in (224, 448)
    }
    assert stored['native', 448] < 4.05 * stored['native', 224]
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


@needs_native
def test_no_tensor_of_all_pairs_exists():
    """Not even of one group and head, in either pass; plain has them of all groups."""
    rules = AxisRule(12, 1), AxisRule(12, 1)
    inputs, largest = random_inputs((1, 24, 24), *rules, 4, 4), {}
    for path in ('native', 'plain'):
        with LargestTensor() as mode:
            values_and_gradients(*inputs, *rules, 4, 0.3, path=path)
        largest[path] = mode.numel
    assert largest['plain'] >= 4 * 4 * 144**2
    assert largest['native'] < 2 * 144**2


def test_eager_mode_and_the_operator_are_the_same_function():
    """Modes see the operator; without them its dispatch is left out."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    inputs = random_inputs((1, 5, 6), *RULE, 2, 16)
    eager = values_and_gradients(*inputs, *RULE, 2, 0.3, path='native')
    with torch.profiler.profile() as profile:
        map_attention(*inputs, *RULE, 2, 0.3, path='native')
    with Watch():
        watched = values_and_gradients(*inputs, *RULE, 2, 0.3, path='native')
    assert not [event for event in profile.events() if 'native_attention' in event.name]
    assert 'crossformer_mm.native_attention.default' in seen
    assert all(torch.equal(one, other) for one, other in zip(eager, watched))


@pytest.mark.parametrize('needs', [(True, False), (False, True)])
def test_gradient_of_one_input_alone(needs):
    inputs = random_inputs((1, 5, 6), *RULE, 2, 16)
    both = values_and_gradients(*inputs, *RULE, 2, 0.3)[1:]
    leaves = [x.clone().requires_grad_(need) for x, need in zip(inputs, needs)]
    out = map_attention(*leaves, *RULE, 2, 0.3)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    for leaf, expected, need in zip(leaves, both, needs):
        assert torch.equal(leaf.grad, expected) if need else leaf.grad is None


def test_tensors_without_data_take_the_operator():
    qkv, table = random_inputs((1, 5, 6), *RULE, 2, 16)
    with FakeTensorMode():
        fake = torch.empty(qkv.shape, requires_grad=True)
        out = map_attention(fake, torch.empty(table.shape), *RULE, 2, 0.3, path='native')
        assert out.shape == (1, 5, 6, 32) and out.requires_grad
    meta = native.attend(qkv.to('meta'), table.to('meta'), *RULE, 2, 0.3)
    assert meta.is_meta and meta.shape == (1, 5, 6, 32)


def test_a_block_may_be_recomputed_outside_the_mode_that_it_ran_in():
    inputs = [x.requires_grad_() for x in random_inputs((1, 5, 6), *RULE, 2, 16)]
    with FlopCounterMode(display=False):
        out = checkpoint(map_attention, *inputs, *RULE, 2, 0.3, use_reentrant=False)
    out.square().sum().backward()
    ours = [x.grad.clone() for x in inputs]
    for x in inputs:
        x.grad = None
    map_attention(*inputs, *RULE, 2, 0.3).square().sum().backward()
    assert all(torch.equal(one, x.grad) for one, x in zip(ours, inputs))
