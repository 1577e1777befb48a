"""Eager mode and the operator are one function, in memory that grows no faster than the area."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from crossformer_mm import CrossFormer
from crossformer_mm.grouping import AxisRule
from crossformer_mm.kernels import map_attention, native

from ..helpers import ONE_STAGE
from .definition import random_inputs, values_and_gradients
from .paths import RULE, device_of, every_kernel, of


def stored_for_backward(path, side):
    """Bytes that a training step keeps between its two passes, each storage once."""
    arch = dict(embed_dims=16, depths=(2,), num_heads=(4,))
    groups = dict(group_size=(7,), interval=(8,))
    model = CrossFormer(**{**ONE_STAGE, 'arch': arch, **groups}, attention_path=path)
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
    stored = {
        (name, side): stored_for_backward(name, side)
        for name in ('plain', path)
        for side in (224, 448)
    }
    assert stored[path, 448] < 4.05 * stored[path, 224]
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


@of('native')
def test_no_tensor_of_all_pairs_exists(path):
    """Not even of one group and head, in either pass; plain has them of all groups."""
    rules = AxisRule(12, 1), AxisRule(12, 1)
    inputs, largest = random_inputs((1, 24, 24), *rules, 4, 4), {}
    for name in (path, 'plain'):
        with LargestTensor() as mode:
            values_and_gradients(name, *inputs, *rules, 4, 0.3)
        largest[name] = mode.numel
    assert largest['plain'] >= 4 * 4 * 144**2
    assert largest[path] < 2 * 144**2


@every_kernel
def test_eager_mode_and_the_operator_are_the_same_function(path):
    """Modes see the operator; without them its dispatch is left out."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    inputs = random_inputs((1, 5, 6), *RULE, 2, 16, device=device_of(path))
    eager = values_and_gradients(path, *inputs, *RULE, 2, 0.3)
    with torch.profiler.profile() as profile:
        map_attention(*inputs, *RULE, 2, 0.3, path=path)
    with Watch():
        watched = values_and_gradients(path, *inputs, *RULE, 2, 0.3)
    assert not [event for event in profile.events() if f'{path}_attention' in event.name]
    assert f'crossformer_mm.{path}_attention.default' in seen
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
    with FlopCounterMode(display=False):
        out = checkpoint(map_attention, *inputs, *RULE, 2, 0.3, use_reentrant=False)
    out.square().sum().backward()
    ours = [x.grad.clone() for x in inputs]
    for x in inputs:
        x.grad = None
    map_attention(*inputs, *RULE, 2, 0.3).square().sum().backward()
    assert all(torch.equal(one, x.grad) for one, x in zip(ours, inputs))
