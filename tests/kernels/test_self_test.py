"""The guard around the fused attention: it disturbs no training and lets no wrong kernel through.

No GPU: the native kernel's two passes stand in for Triton's, and the native path is forbidden.
"""

import copy
import math
import sys
import types

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from crossformer_mm import CrossFormer, kernels
from crossformer_mm.attention import GroupAttention
from crossformer_mm.compat import TRITON
from crossformer_mm.grouping import AxisRule, stage_rules
from crossformer_mm.kernels import Call, choose_path, describe_path, fused, native, plain, self_test
from crossformer_mm.kernels.call import why_not_compiled

from ..helpers import ONE_STAGE, needs_torch
from .definition import default_of_float64

pytestmark = [
    pytest.mark.skipif(
        bool(native.why_not(Call(torch.device('cpu')))), reason='the native kernel is the stand-in'
    ),
    needs_torch(TRITON, 'the fused attention'),
    pytest.mark.filterwarnings('error:CrossFormer'),
]
CPU = torch.device('cpu')
SMALL_RULES, LARGE_RULES = (AxisRule(3, 1), AxisRule(3, 1)), (AxisRule(9, 1), AxisRule(9, 1))
TWO_STAGES = dict(
    arch=dict(embed_dims=16, depths=(2, 2), num_heads=(1, 2)),
    merge_sizes=((2, 4),),
    group_size=(3, 3),
    interval=(2, 1),
    out_indices=(0, 1),
)


class StandIn(types.ModuleType):
    """In place of fused_triton: the native kernel, which counts calls and fails on demand."""

    def __init__(self):
        super().__init__('fused_triton')
        self.INTERPRETED = False
        self.calls, self.spoil = [], lambda name, *outputs: outputs

    def forward(self, qkv, *arguments):
        self.calls.append('forward')
        return self.spoil('forward', *native.forward(qkv, *arguments))

    def backward(self, grad_out, qkv, *arguments):
        self.calls.append('backward')
        return self.spoil('backward', *native.backward(grad_out, qkv, *arguments))


@pytest.fixture
def triton(monkeypatch, untested):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, 'crossformer_mm.kernels.fused_triton', stand_in)
    for name, why_not in (
        ('native', lambda call: 'forbidden'),
        ('fused', lambda call: why_not_compiled(call, fused.HEAD_DIM)),
    ):
        monkeypatch.setitem(kernels.PATHS, name, kernels.PATHS[name]._replace(why_not=why_not))
    return stand_in


def build(**options) -> CrossFormer:
    torch.manual_seed(0)
    return CrossFormer(**{**TWO_STAGES, **options})


def train(model, run=None, steps=2):
    """Losses and the last gradients of some steps of SGD."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 1e-3), []
    image = torch.rand(1, 3, 68, 76, generator=torch.Generator().manual_seed(1)).float()
    run = model if run is None else run
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sum(feature.float().square().mean() for feature in run(image))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.grad for p in model.parameters()]


def reentrant(model):
    """Each block under the older kind of checkpoint, which runs it without gradients first."""
    for stage in model.layers:
        for block in stage.blocks:
            forward = block.forward
            block.forward = lambda x, *rules, forward=forward: checkpoint(
                forward, x.requires_grad_() if x.is_leaf else x, *rules, use_reentrant=True
            )
    return model


def wrapped(model):
    """Each block in FSDP's wrapper, as ``activation_checkpointing`` of a config does it."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )

    from crossformer_mm.sharding import is_crossformer_block

    apply_activation_checkpointing(model, check_fn=is_crossformer_block)
    return model


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend='aot_eager')


def saved_elsewhere():
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy(), torch.from_numpy)


def evaluated_first(model):
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        model(torch.rand(1, 3, 68, 76))
    return model


CASES = {
    'eager': ({}, lambda model: model),
    'with_cp': (dict(with_cp=True), lambda model: model),
    'reentrant checkpoints': ({}, reentrant),
    "FSDP's checkpoint_wrapper": ({}, wrapped),
    'torch.compile': (ONE_STAGE, compiled),
    'with_cp, compiled': (dict(ONE_STAGE, with_cp=True), compiled),
    'evaluated first': ({}, evaluated_first),
}
CONTEXTS = {
    'autocast': lambda: torch.autocast('cpu', torch.bfloat16),
    'saved-tensor hooks': saved_elsewhere,
    'save_on_cpu': torch.autograd.graph.save_on_cpu,
    'set_default_dtype(float64)': default_of_float64,
    'anomaly detection': torch.autograd.detect_anomaly,
}


def assert_same_training(ours, plain, limit=1e-5):
    """Losses, and gradients relative to the largest."""
    (losses, grads), (plain_losses, plain_grads) = ours, plain
    assert losses == pytest.approx(plain_losses, rel=limit)
    largest = max(grad.abs().max() for grad in plain_grads)
    for one, other in zip(grads, plain_grads, strict=True):
        assert (one - other).abs().max() <= limit * largest


@pytest.mark.parametrize('case', CASES)
def test_two_steps_from_the_first_call_on_equal_plain(triton, case):
    options, wrap = CASES[case]
    reference = train(build(**{**options, 'attention_path': 'plain', 'with_cp': False}))
    model = build(**options)
    assert_same_training(train(model, wrap(model)), reference)
    assert not self_test.BROKEN and {kind.small for kind, _ in self_test.PASSED} == {True, False}
    assert triton.calls.count('backward') > 4


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('context', CONTEXTS)
def test_two_steps_inside_equal_plain(triton, context, with_cp):
    plain_model, model = build(attention_path='plain'), build(with_cp=with_cp)
    with CONTEXTS[context]():
        reference, ours = train(plain_model), train(model)
    assert_same_training(ours, reference, 3e-2 if context == 'autocast' else 1e-5)
    assert self_test.PASSED and not self_test.BROKEN


@pytest.mark.parametrize(
    'mode', [torch.no_grad, torch.inference_mode, lambda: torch.device('meta')]
)
def test_self_test_passes_inside(triton, mode):
    attention, x = GroupAttention(32, 2), torch.rand(1, 12, 12, 32)
    with mode():
        attention(x, *SMALL_RULES)
    assert self_test.PASSED and not self_test.BROKEN


def test_self_test_passes_in_fake_mode_and_under_transforms(triton):
    from torch._subclasses.fake_tensor import FakeTensorMode

    call = Call(CPU, members=81)
    with FakeTensorMode():
        assert choose_path(call) == 'fused'
    self_test.PASSED.clear()
    seen = []
    torch.func.grad(lambda x: seen.append(choose_path(call)) or x.sum())(torch.ones(2))
    torch.vmap(lambda x: seen.append(choose_path(call)) or x)(torch.ones(2))
    assert seen == ['fused', 'fused']


def test_transforms_first_then_two_steps_equal_plain(triton):
    """Under a transform the plain path computes; it leaves the kernels as they are."""
    model, reference = build(), build(attention_path='plain')
    image = torch.rand(1, 3, 68, 76)

    def gradients(model):
        def loss(parameters):
            features = torch.func.functional_call(model, parameters, (image,))
            return sum(feature.square().mean() for feature in features)

        return torch.func.grad(loss)(dict(model.named_parameters()))

    torch.testing.assert_close(gradients(model), gradients(reference))
    assert not triton.calls
    assert_same_training(train(model), train(reference))
    assert triton.calls and not self_test.BROKEN


def test_self_test_runs_in_a_backward_pass_without_autograd(triton, monkeypatch):
    """On a GPU that pass and another one of a thread of ours would wait for each other."""
    monkeypatch.setattr(torch.autograd, 'grad', None)
    monkeypatch.setattr(torch.Tensor, 'backward', None)
    assert choose_path(Call(CPU, members=81)) == 'fused'


@pytest.mark.parametrize('value', [math.nan, math.inf, 2.0])
@pytest.mark.parametrize('output', [('forward', 0), ('backward', 0), ('backward', 1)], ids=str)
def test_a_kernel_that_is_wrong_anywhere_is_not_used(triton, output, value):
    wrong, index = output

    def spoil(name, *outputs):
        if name == wrong:
            outputs[index].view(-1)[-1] = value
        return outputs

    triton.spoil = spoil
    said = 'at most 64 .* not work on cpu in torch.float32.*wrong by'
    with pytest.warns(UserWarning, match=said):
        assert choose_path(Call(CPU, members=9)) == 'plain'
    assert 'not native: forbidden' in describe_path(Call(CPU, members=9))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('members', [9, 81])
def test_each_kind_is_tested_with_its_own_kernels_when_first_needed(triton, dtype, members):
    seen = []
    triton.spoil = lambda name, *outputs: seen.append((name, outputs[0].dtype)) or outputs
    choose_path(Call(CPU, dtype, members=members, trains=False))
    assert seen == [('forward', dtype)]  # no kernel is compiled in vain
    for _ in range(2):
        choose_path(Call(CPU, dtype, members=members))
    assert seen[1:] == [('forward', dtype), ('backward', dtype)]
    assert {kind for kind, _ in self_test.PASSED} == {(CPU, dtype, 32, members == 9)}


def double(name, *outputs):
    return outputs[0] * 2, outputs[1]


def test_one_wrong_kind_leaves_the_others(triton):
    def spoil(name, *outputs):
        return double(name, *outputs) if outputs[0].dtype == torch.bfloat16 else outputs

    triton.spoil = spoil
    with pytest.warns(UserWarning, match='bfloat16'):
        assert choose_path(Call(CPU, torch.bfloat16, members=9)) == 'plain'
    assert choose_path(Call(CPU, torch.float32, members=9)) == 'fused'


def out_of_resources(*args):
    raise RuntimeError('Triton Error [CUDA]: out of resources')


@pytest.mark.parametrize('when', ['forward', 'backward'])
@pytest.mark.parametrize('case', ['eager', 'with_cp', 'reentrant checkpoints', 'torch.compile'])
def test_a_launch_that_fails_later_warns_once_and_the_step_goes_on(triton, when, case):
    options, wrap = CASES[case]
    plain_model = build(**{**options, 'attention_path': 'plain', 'with_cp': False})
    reference = train(plain_model, steps=3)
    model = build(**options)
    run, weights = wrap(model), copy.deepcopy(model.state_dict())
    train(model, run, steps=1)
    model.load_state_dict(weights)
    calls = []

    def spoil(name, *outputs):
        if name == when and outputs[0].shape[1] > 9:  # of one map, not of the other
            calls.append(name)
            out_of_resources()
        return outputs

    triton.spoil = spoil
    with pytest.warns(UserWarning, match='out of resources') as caught:
        ours = train(model, run, steps=3)
    kinds = len(self_test.BROKEN)
    assert len(calls) == len([w for w in caught if 'CrossFormer' in str(w.message)]) == kinds > 0
    assert_same_training(ours, reference)


def out_of_memory(name, *outputs):
    raise torch.cuda.OutOfMemoryError('CUDA out of memory')


def test_what_fails_for_want_of_memory_is_tested_again_a_few_times(triton):
    call = Call(CPU, members=9)
    triton.spoil = out_of_memory
    with pytest.warns(UserWarning, match='could not be tested on cpu.*out of memory'):
        assert choose_path(call) == 'plain'
    triton.spoil = lambda name, *outputs: outputs
    assert choose_path(call) == 'fused'

    call = call._replace(head_dim=16)
    triton.spoil = out_of_memory
    with pytest.warns(UserWarning, match='does not work on cpu.*out of memory'):
        for _ in range(10):
            assert choose_path(call) == 'plain'
    assert triton.calls.count('forward') == 2 + self_test.TRIES


@pytest.mark.parametrize(
    'error, lasts',
    [
        (RuntimeError('Failed to find C compiler. Please specify via CC'), True),
        (FileNotFoundError(2, 'No such file or directory', 'gcc'), False),
        (torch.cuda.OutOfMemoryError('CUDA out of memory'), False),
    ],
)
def test_line_for_the_log_says_why_triton_compiled_nothing(triton, monkeypatch, error, lasts):
    def find_fault(kind, trains):
        raise error

    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    monkeypatch.setattr(self_test.Kind, 'find_fault', find_fault)
    with pytest.warns(UserWarning, match='CrossFormer'):
        line = describe_path(Call(torch.device('cuda', 0), torch.float16))
    assert line == f'plain on cuda:0 (float16), not fused: {type(error).__name__}: {error}'
    assert bool(self_test.BROKEN) == lasts


def test_a_block_may_get_the_kernels_between_its_two_passes(triton):
    """It was computed without them for want of memory, and is recomputed with them."""
    reference = train(build(attention_path='plain'))
    remaining = [2]

    def spoil(name, *outputs):
        remaining[0] -= 1
        return outputs if remaining[0] < 0 else out_of_memory(name)

    triton.spoil = spoil
    with pytest.warns(UserWarning, match='out of memory'):
        ours = train(build(with_cp=True))
    assert_same_training(ours, reference)
    assert not self_test.BROKEN


def test_errors_of_the_size_of_the_input_are_not_hidden(triton):
    attention, x = GroupAttention(32, 2), torch.rand(1, 12, 12, 32)
    attention(x, *LARGE_RULES)
    triton.spoil = out_of_memory
    with pytest.raises(torch.cuda.OutOfMemoryError):
        attention(x, *LARGE_RULES)


def test_nothing_is_tested_while_a_graph_is_captured(triton, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    call = Call(torch.device('cuda', 0), members=9)
    with pytest.warns(UserWarning, match='while a CUDA graph is captured'):
        assert choose_path(call) == choose_path(call) == 'plain'
    assert not triton.calls and not self_test.BROKEN and not self_test.FAILURES


def test_verdict_is_in_the_log(triton, caplog):
    from mmengine.logging import MMLogger

    logger = MMLogger.get_instance('verdict')
    logger.addHandler(caplog.handler)
    triton.spoil = double
    with pytest.warns(UserWarning):
        choose_path(Call(CPU, members=9))
    assert 'does not work on cpu in torch.float32' in caplog.text


def test_a_path_that_is_named_is_neither_tested_nor_replaced(triton):
    triton.spoil = out_of_resources
    attention = GroupAttention(32, 2, attention_path='fused')
    with pytest.raises(RuntimeError, match='out of resources'):
        attention(torch.rand(1, 6, 6, 32), *SMALL_RULES)
    assert not self_test.BROKEN


def test_a_batch_of_no_images_launches_nothing_backward(triton):
    attention = GroupAttention(32, 2)
    attention(torch.rand(1, 6, 6, 32), *SMALL_RULES)
    triton.calls.clear()
    attention(torch.rand(0, 6, 6, 32), *SMALL_RULES).sum().backward()
    assert 'backward' not in triton.calls
    assert all(not p.grad.any() for p in attention.parameters())


@pytest.mark.parametrize('lda', ['interval', 'block', 'shifted'])
@pytest.mark.parametrize('batch', [1, 3])
def test_gradients_of_plain_without_autograd_are_those_of_autograd(monkeypatch, lda, batch):
    monkeypatch.setattr(plain, 'MOST_PAIRS', 2000)
    rules = stage_rules(11, 17, 4, 3, lda)[1]
    shapes = (batch, 11, 17, 30), (2, 15, 15), (batch, 11, 17, 10)
    qkv, table, grad = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    inputs = qkv.requires_grad_(), table.requires_grad_()
    exact = torch.autograd.grad(plain.attend(*inputs, *rules, 2, 0.3), inputs, grad)
    ours = plain.gradients(grad, qkv.detach(), table.detach(), *rules, 2, 0.3)
    torch.testing.assert_close(ours, exact)
