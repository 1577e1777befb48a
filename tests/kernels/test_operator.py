"""Eager mode and the operator are one function, in memory that grows no faster than the area."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from crossformer_mm import CrossFormer
from crossformer_mm.grouping import AxisRule
from crossformer_mm.kernels import map_attention, native

from ..helpers import ONE_STAGE
from .definition import Operations, random_inputs, values_and_gradients
from .paths import RULE, device_of, every_kernel, of


def stored_for_backward(path, side):
    """Bytes that a training step keeps between its two passes, each storage once."""
    options = dict(ONE_STAGE, group_size=(7,), interval=(8,), attention_path=path)
    options['arch'] = dict(embed_dims=16, depths=(2,), num_heads=(4,))
    model = CrossFormer(**options)
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        features = model(torch.rand(1, 3, side, side))
    assert all(f.requires_grad for f in features)
    return sum(storages.values()) - sum(p.numel() * 4 for p in model.parameters())


@of('native')
def test_what_training_stores_grows_no_faster_than_the_area(path):
    assert stored_for_backward(path, 448) < 4.05 * stored_for_backward(path, 224)
    # So the test can tell:
    assert stored_for_backward('plain', 448) > 6 * stored_for_backward('plain', 224)


@of('native')
def test_no_tensor_of_all_pairs_exists(path):
    """Not even of one group and head, in either pass; plain has them of all groups."""
    rules = AxisRule(12, 1), AxisRule(12, 1)
    inputs, largest = random_inputs((1, 24, 24), *rules, 4, 4), {}
    for name in (path, 'plain'):
        with Operations() as operations:
            values_and_gradients(name, *inputs, *rules, 4, 0.3)
        largest[name] = operations.largest
    assert largest['plain'] >= 4 * 4 * 144**2
    assert largest[path] < 2 * 144**2


@every_kernel
def test_eager_mode_and_the_operator_are_the_same_function(path):
    """Modes see the operator; without them its dispatch is left out."""
    inputs = random_inputs((1, 5, 6), *RULE, 2, 16, device=device_of(path))
    eager = values_and_gradients(path, *inputs, *RULE, 2, 0.3)
    with torch.profiler.profile() as profile:
        map_attention(*inputs, *RULE, 2, 0.3, path=path)
    with Operations() as operations:
        watched = values_and_gradients(path, *inputs, *RULE, 2, 0.3)
    assert not [event for event in profile.events() if f'{path}_attention' in event.name]
    assert f'crossformer_mm.{path}_attention.default' in operations.names
    assert all(torch.equal(one, other) for one, other in zip(eager, watched))


@of('native')
def test_tensors_without_data_take_the_operator(path):
    qkv, table = random_inputs((1, 5, 6), *RULE, 2, 16)
    with FakeTensorMode():
        fake = torch.empty(qkv.shape, requires_grad=True)
        out = map_attention(fake, torch.empty(table.shape), *RULE, 2, 0.3, path=path)
        assert out.shape == (1, 5, 6, 32) and out.requires_grad
    meta = native.attend(qkv.to('meta'), table.to('meta'), *RULE, 2, 0.3)
    assert meta.is_meta and meta.shape == (1, 5, 6, 32)


def test_a_block_may_be_recomputed_outside_the_mode_that_it_ran_in():
    inputs = [x.requires_grad_() for x in random_inputs((1, 5, 6), *RULE, 2, 16)]
    arguments = *inputs, *RULE, 2, 0.3
    with FlopCounterMode(display=False):
        out = checkpoint(map_attention, *arguments, use_reentrant=False)
    ours = torch.autograd.grad(out.square().sum(), inputs)
    expected = torch.autograd.grad(map_attention(*arguments).square().sum(), inputs)
    assert all(map(torch.equal, ours, expected))
