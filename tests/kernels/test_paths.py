"""Every way to compute attention equals the definition and keeps the same promises; one table
chooses among them.

Triton's kernels run on a GPU or, where there is none, in Triton's interpreter, in Python, one program
after another: so maps are tiny here, and blocks are made small enough for groups to take several.
What one kernel alone promises is in test_native.py and test_fused.py.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crossformer_mm import CrossFormer
from crossformer_mm.attention import GroupAttention
from crossformer_mm.grouping import LDA_DEFINITIONS, AxisRule, stage_rules
from crossformer_mm.kernels import Call, choose_path, fused, map_attention, native

from ..helpers import add_noise, needs_torch
from .definition import assert_equals_definition, random_inputs, values_and_gradients
from .paths import CPU, RULE, SEVERAL, device_of, every_kernel, every_path, marked, of

CASES = {  # shape, rules of rows and columns, heads
    'one member': ((1, 1, 1), (7, 1), (7, 1), 2),
    'short distance, ragged': ((2, 9, 11), (7, 1), (7, 1), 2),
    'long distance over the map, ragged': ((1, 7, 10), (3, 3), (4, 3), 2),
    'long distance in tiles, ragged': ((1, 8, 7), (3, 2), (3, 2), 2),
    'interval beyond the map': ((1, 2, 5), (1, 10**9), (5, 1), 2),
    'group beyond the map': ((1, 3, 5), (10**9, 1), (10**9, 1), 2),
    'large groups, ragged': ((1, 10, 9), (9, 1), (8, 1), 1),
    'large groups over the map, ragged': ((1, 13, 10), (13, 1), (5, 2), 1),
    'wider than high, ragged': ((1, 7, 23), (6, 1), (12, 2), 1),
    'one row': ((1, 1, 70), (1, 1), (70, 1), 1),
    'one column': ((1, 70, 1), (70, 1), (1, 1), 1),
}


@every_path
@pytest.mark.parametrize('case', CASES)
def test_equals_the_definition_in_float64(path, case):
    shape, rows, columns, heads = CASES[case]
    rules = AxisRule(*rows), AxisRule(*columns)
    inputs = random_inputs(shape, *rules, heads, 16, spare=1, device=device_of(path))
    assert_equals_definition(path, inputs, *rules, heads, 0.3, tolerance=5e-6)


MAPS = {  # sides and rules, by the members of the largest groups
    16: ((6, 5), AxisRule(4, 1), AxisRule(4, 1)),
    25: ((6, 9), AxisRule(5, 1), AxisRule(5, 1)),
    72: ((9, 8), AxisRule(9, 1), AxisRule(8, 1)),
}


@every_path
@pytest.mark.parametrize('members', [25, 72])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_stays_near_float64(path, dtype, tolerance, members):
    if path == 'plain':
        if dtype == torch.float16:
            pytest.skip('on the CPU PyTorch sums in float16')
        tolerance = 3e-2  # PyTorch 2.1 rounds in more places
    sides, *rules = MAPS[members]
    inputs = random_inputs((1, *sides), *rules, 1, 16, dtype, 1, device_of(path))
    assert_equals_definition(path, inputs, *rules, 1, 0.3, tolerance=tolerance)


@every_path
@pytest.mark.parametrize('dim', [1, 3, 8, 24, 48, 64])
def test_any_head_dim_works(path, dim):
    inputs = random_inputs((1, 4, 5), *RULE, 2, dim, spare=1, device=device_of(path))
    assert_equals_definition(path, inputs, *RULE, 2, 0.3, tolerance=5e-6)


@of('plain', 'native')
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # `path`, which is a name
)
@given(data=st.data())
def test_equals_the_definition_whatever_the_sizes(path, dtype, tolerance, data):
    number = st.integers
    height, width = data.draw(number(1, 23)), data.draw(number(1, 23))
    size, interval = data.draw(number(1, 8)), data.draw(number(1, 5))
    lda = data.draw(st.sampled_from(LDA_DEFINITIONS))
    rules = stage_rules(height, width, size, interval, lda)[data.draw(number(0, 1))]
    heads, dim = data.draw(number(1, 3)), data.draw(st.sampled_from((1, 5, 16, 32, 40)))
    shape = data.draw(number(1, 2)), height, width
    inputs = random_inputs(shape, *rules, heads, dim, dtype, spare=data.draw(number(0, 2)))
    if path == 'plain' and dtype == torch.bfloat16:
        tolerance = 3e-2  # PyTorch 2.1 rounds in more places
    assert_equals_definition(path, inputs, *rules, heads, 0.3, tolerance=tolerance)


@every_path
@pytest.mark.parametrize('members', [16, 72])
def test_logits_far_from_zero_overflow_nothing(path, members):
    """Not even next to the logits of what a block holds beyond the group, which are near 0."""
    sides, *rules = MAPS[members]
    qkv, table = random_inputs((1, *sides), *rules, 1, 16, spare=1, device=device_of(path))
    qkv[..., :16] = 5 + 0.1 * qkv[..., :16]
    qkv[..., 16:32] = -5 + 0.1 * qkv[..., 16:32]
    assert_equals_definition(path, (qkv, table), *rules, 1, 1.0, tolerance=1e-3)


# What every kernel promises


@pytest.mark.parametrize(
    'path, sides',
    [
        pytest.param(path, sides, marks=marked(path)[0].marks)
        for path, sides in (('native', (5, 4)), ('fused', (5, 4)), (SEVERAL, (9, 8)))
    ],
    indirect=['path'],
)
def test_same_inputs_give_the_same_bits_wherever_they_lie(path, sides):
    rules = tuple(AxisRule(side, 1) for side in sides)
    qkv, table = random_inputs((1, *sides), *rules, 1, 16, device=device_of(path))
    grad = torch.randn(1, *sides, 16, generator=torch.Generator().manual_seed(1)).to(qkv)
    expected = values_and_gradients(path, qkv, table, *rules, 1, 0.3, grad=grad)

    def strided(x):
        return torch.stack([-x, x], -1)[..., 1]

    def unaligned(x):
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    for change in (torch.clone, strided, unaligned):
        inputs = change(qkv), change(table)
        ours = values_and_gradients(path, *inputs, *rules, 1, 0.3, grad=change(grad))
        assert all(map(torch.equal, ours, expected)), change


@every_kernel
def test_inputs_stay_as_they_are(path):
    inputs = random_inputs((2, 4, 5), *RULE, 2, 16, device=device_of(path))
    copies = [x.clone() for x in inputs]
    values_and_gradients(path, *inputs, *RULE, 2, 0.3)
    assert all(map(torch.equal, inputs, copies))


@every_kernel
def test_an_empty_batch_is_one(path):
    qkv, table = random_inputs((0, 4, 5), *RULE, 2, 16, device=device_of(path))
    out, grad_qkv, grad_table = values_and_gradients(path, qkv, table, *RULE, 2, 0.3)
    assert out.shape == (0, 4, 5, 32) and grad_qkv.shape == qkv.shape and not grad_table.any()


@every_kernel
def test_a_table_too_small_for_the_groups_is_refused(path):
    qkv, table = torch.zeros(1, 4, 4, 48), torch.zeros(1, 5, 7)
    rules = AxisRule(4, 1), AxisRule(4, 1)
    with pytest.raises(ValueError, match='5 x 7 offsets is too small for groups of (16|4 x 4) mem'):
        map_attention(qkv.to(device_of(path)), table.to(device_of(path)), *rules, 1, 1.0, path=path)


@every_kernel
@needs_torch('2.4', 'torch.library.opcheck')
def test_the_operator_keeps_the_rules_of_operators(path):
    """Its schema, shapes without data, and gradients, as torch.compile relies on them."""
    qkv, table = random_inputs((1, 3, 3), *RULE, 1, 8, device=device_of(path))
    inputs = qkv.flatten(0, 2).requires_grad_(), table.requires_grad_()
    operator = getattr(torch.ops.crossformer_mm, f'{path}_attention').default
    torch.library.opcheck(operator, (*inputs, [1, 3, 3], [3, 1, 0], [3, 1, 0], 1, 0.5))


@every_kernel
def test_second_derivative_is_refused(path):
    qkv, table = random_inputs((1, 2, 2), *RULE, 1, 8, device=device_of(path))
    out = map_attention(qkv.requires_grad_(), table, *RULE, 1, 1.0, path=path)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match='no autograd formula|once_differentiable'):
        grad.sum().backward()


@every_kernel
def test_gradient_of_one_input_alone(path):
    inputs = random_inputs((1, 5, 6), *RULE, 2, 16, device=device_of(path))
    _, *both = values_and_gradients(path, *inputs, *RULE, 2, 0.3)
    for index in (0, 1):
        leaves = [x.clone().requires_grad_(i == index) for i, x in enumerate(inputs)]
        out = map_attention(*leaves, *RULE, 2, 0.3, path=path)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
        assert torch.equal(leaves[index].grad, both[index]) and leaves[1 - index].grad is None


def gradients(attention, out):
    return torch.autograd.grad(out.float().square().sum(), list(attention.parameters()))


@every_kernel
@needs_torch('2.4', 'torch.compiler.is_compiling inside of a graph')
def test_compiler_takes_it_into_one_graph(path):
    """The choice of the path included."""
    attention = GroupAttention(16, 1, attention_path=path).to(device_of(path))
    compiled = torch.compile(attention, backend='aot_eager', fullgraph=True)
    inputs = torch.randn(1, 5, 6, 16).to(device_of(path)), AxisRule(3, 2), AxisRule(3, 2)
    expected = gradients(attention, attention(*inputs))
    torch.testing.assert_close(gradients(attention, compiled(*inputs)), expected)


@every_kernel
@pytest.mark.parametrize('position_bias', ['relative', 'none'])
def test_other_position_biases_are_the_same_as_on_plain(path, position_bias):
    """A table that is resized, and one that is a single 0 seen everywhere."""
    x, found = torch.randn(1, 7, 10, 32).to(device_of(path)), []
    for name in (path, 'plain'):
        torch.manual_seed(0)
        options = dict(attention_path=name, position_bias=position_bias, group_size=3)
        attention = GroupAttention(32, 2, **options).to(device_of(path))
        out = attention(x, AxisRule(4, 2), AxisRule(5, 2))
        found.append([out, *gradients(attention, out)])
    for ours, reference in zip(*found, strict=True):
        assert (ours - reference).abs().max() <= 1e-5 * reference.abs().max()


@every_kernel
def test_autocast_trains_in_bfloat16_near_float32(path):
    device = device_of(path)
    attention = GroupAttention(32, 2, attention_path=path).to(device)
    inputs = torch.randn(1, 6, 5, 32).to(device), AxisRule(3, 2), AxisRule(3, 2)
    exact = gradients(attention, attention(*inputs))
    with torch.autocast(device.type, torch.bfloat16):
        out = attention(*inputs)
        assert out.dtype == torch.bfloat16
        ours = gradients(attention, out)
    scale = max(grad.abs().max() for grad in exact)
    for half, reference in zip(ours, exact):
        assert half.dtype == torch.float32
        assert (half - reference).abs().max() < 3e-2 * scale


def features_and_gradients(path, lda, image, with_cp=False):
    torch.manual_seed(0)
    model = CrossFormer(
        dict(embed_dims=16, depths=(2, 2), num_heads=(1, 2)),
        merge_sizes=((2, 4),),
        group_size=(3, 3),
        interval=(2, 3),
        lda=lda,
        out_indices=(0, 1),
        with_cp=with_cp,
        attention_path=path,
    )
    add_noise(model).to(image.device)
    features = model(image)
    generator = torch.Generator().manual_seed(1)
    sum((f * torch.randn(f.shape, generator=generator).to(f)).sum() for f in features).backward()
    return [f.detach() for f in features], {n: p.grad for n, p in model.named_parameters()}


SIZES = [(2, 3, 48, 64), (1, 3, 73, 118), (1, 3, 16, 150), (1, 3, 5, 7)]
SHORT = (('fused', 'interval', (1, 3, 27, 42), False), ('fused', 'block', (1, 3, 31, 38), True))


@pytest.mark.parametrize(
    'path, lda, size, with_cp',
    [
        pytest.param(*case, marks=marked(case[0])[0].marks)
        for case in (
            *(('native', lda, size, size[0] == 2) for lda in LDA_DEFINITIONS for size in SIZES),
            *SHORT,
        )
    ],
    indirect=['path'],
)
def test_backbone_is_the_same_as_on_plain(path, lda, size, with_cp):
    """With recomputed blocks, too."""
    image = torch.rand(size, generator=torch.Generator().manual_seed(2)).to(device_of(path))
    ours, ours_grads = features_and_gradients(path, lda, image, with_cp)
    reference, reference_grads = features_and_gradients('plain', lda, image)
    for one, other in zip(ours, reference, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    assert all(grad is not None for grad in ours_grads.values())
    largest = max(grad.abs().max() for grad in reference_grads.values())
    for name, grad in reference_grads.items():
        assert (ours_grads[name] - grad).abs().max() <= 1e-5 * largest, name


# The choice


@pytest.fixture
def compiled(monkeypatch):
    """Act as if the kernel were compiled and Triton, whose interpreter tests turn on, were missing."""
    monkeypatch.setattr(fused, 'has_triton', lambda: False)
    monkeypatch.setattr(native, 'MISSING', '')


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(has_lead=True),
        dict(interception='compile'),
        dict(dtype=torch.bfloat16, head_dim=40),
    ],
    ids=str,
)
def test_the_kernel_is_chosen_on_the_cpu_where_it_was_compiled(compiled, monkeypatch, options):
    assert choose_path(Call(CPU, **options)) == 'native'
    monkeypatch.setattr(native, 'MISSING', 'it was not compiled')
    assert choose_path(Call(CPU, **options)) == 'plain'


@pytest.mark.parametrize(
    'option, reason',
    [
        (dict(dropout=0.1), 'attn_drop_rate is 0.1'),
        (dict(dtype=torch.float64), 'got torch.float64'),
        (dict(head_dim=129), 'at most 128 channels, but they have 129'),
        (dict(interception='export'), 'an exporter'),
        (dict(device=torch.device('meta')), 'got .* meta'),
    ],
    ids=str,
)
def test_a_kernel_that_does_not_support_a_call_is_not_chosen_and_refused(compiled, option, reason):
    call = Call(**{'device': CPU, **option})
    assert choose_path(call) == 'plain'
    with pytest.raises(ValueError, match=f"attention_path='native'.*{reason}.*'plain'"):
        choose_path(call, 'native')


def test_wrong_path_is_refused_by_name():
    with pytest.raises(ValueError, match="attention_path.*'native', 'fused', 'plain'.*'flash'"):
        CrossFormer('s', attention_path='flash')
