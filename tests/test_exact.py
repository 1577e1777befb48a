"""A shortcut bypasses modules only if nothing but their types' own computation would be lost."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune
from torch.overrides import BaseTorchFunctionMode

from crossformer_mm.exact import is_exact, submodules

from .kernels.definition import Operations

CPU = torch.device('cpu')
TYPES = nn.Sequential, nn.Linear, nn.LayerNorm, nn.ReLU


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU())


def ask(net: nn.Module) -> bool:
    return is_exact(submodules(net), TYPES, CPU)


class Doubled(nn.Parameter):
    pass


def set_weight(weight):
    def change(net):
        del net[0].weight
        net[0].weight = weight

    return change


def set_buffer(net):
    del net[0].weight
    net[0].register_buffer('weight', torch.ones(4, 4))


def hide_weight(net):
    vars(net[0])['weight'] = nn.Parameter(torch.ones(4, 4))


SURGERY = {
    'another layer': lambda net: net.__setitem__(2, nn.GELU()),
    'one more layer': lambda net: net.append(nn.ReLU()),
    'one layer twice': lambda net: net.__setitem__(2, net[0]),
    'float64': lambda net: net[0].double(),
    'the meta device': lambda net: net[1].to('meta'),
    'a parametrization': lambda net: parametrize.register_parametrization(
        net[0], 'weight', nn.Identity()
    ),
    'a tensor for a parameter': set_weight(torch.ones(4, 4)),
    'a tensor for a parameter, as torch.func puts it': lambda net: net[0]._parameters.update(
        weight=torch.ones(4, 4)
    ),
    'a buffer for a parameter': set_buffer,
    'an attribute before a parameter': hide_weight,
    'a layer less': lambda net: net.register_module('1', None),
    "a parameter's subclass": set_weight(Doubled(torch.ones(4, 4))),
}


@pytest.mark.parametrize('change', SURGERY.values(), ids=SURGERY)
def test_changed_modules_are_not_exact(change):
    net = build()
    assert ask(net)
    change(net)
    assert not ask(net)


def test_pruned_layers_are_exact_once_the_pruning_is_permanent():
    net = build()
    prune.identity(net[0], 'weight')
    assert not ask(net)
    prune.remove(net[0], 'weight')
    assert ask(net)


def test_one_layer_in_two_places_is_not_exact():
    net, types = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (nn.Sequential, *[nn.Linear] * 2)
    assert submodules(net) == [*net.modules()] and is_exact(submodules(net), types, CPU)
    net[1] = net[0]
    assert not is_exact(submodules(net), types, CPU)
    net[1] = net
    assert not is_exact(submodules(net), types, CPU)


def test_a_property_before_a_parameter_is_not_exact(monkeypatch):
    net = build()
    monkeypatch.setattr(nn.Linear, 'weight', property(lambda layer: None), raising=False)
    assert not ask(net)


def test_a_layer_without_bias_is_exact():
    net = build()
    net[0].bias = None
    assert ask(net) and ask(copy.deepcopy(net))


@pytest.mark.parametrize(
    'cls, name', [(nn.ReLU, 'forward'), (nn.ReLU, '__call__'), (nn.Module, '__call__')]
)
def test_a_patched_class_is_not_exact(cls, name, monkeypatch):
    old = getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda self, x: old(self, x))
    assert not ask(build())


@pytest.mark.parametrize(
    'kind', ['forward_hook', 'forward_pre_hook', 'full_backward_hook', 'full_backward_pre_hook']
)
def test_nothing_is_exact_under_a_global_hook(kind):
    register = getattr(nn.modules.module, f'register_module_{kind}')
    with register(lambda *args: None):
        assert not ask(build())
    assert ask(build())


@pytest.mark.parametrize('context', [BaseTorchFunctionMode, Operations, forward_ad.dual_level])
def test_nothing_is_exact_where_calls_are_observed(context):
    with context():
        assert not ask(build())
    with torch.device('cpu'):  # is a mode that observes nothing
        assert ask(build())


def test_nothing_is_exact_under_transforms_and_tracers():
    seen, net = [], build()

    def function(x):
        seen.append(ask(net))
        return x.square().sum()

    torch.func.grad(function)(torch.ones(4))
    torch.vmap(function)(torch.ones(2, 4))
    torch.jit.trace(function, torch.ones(4), check_trace=False)
    assert len(seen) >= 3 and not any(seen)
