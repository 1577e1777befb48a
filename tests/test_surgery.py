"""Changes to a layer have their effect on every path, as if no layer were ever bypassed."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as global_hooks

from crossformer_mm import CrossFormer, exact
from crossformer_mm.kernels import choose_path, mlp, onednn
from crossformer_mm.kernels.call import Call

from .helpers import ONE_STAGE

PATHS = pytest.mark.parametrize('path', [None, 'plain'])


def build(path=None, **options) -> CrossFormer:
    torch.manual_seed(0)
    arch = dict(embed_dims=64, depths=(2,), num_heads=(2,))
    model = CrossFormer(**{**ONE_STAGE, 'arch': arch}, attention_path=path, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


IMAGE = torch.linspace(-2, 2, 3 * 24 * 28).sin().view(1, 3, 24, 28)


@pytest.fixture(autouse=True)
def all_shortcuts(monkeypatch):
    """Take every permitted shortcut, whatever the processor and the size."""
    monkeypatch.setattr(mlp, 'SMALL', 0)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX512')
    monkeypatch.setattr(onednn, 'is_intel', lambda: False)


@pytest.fixture
def definition(monkeypatch):
    """Run a function without any shortcut."""

    def run(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(exact, 'is_observed', lambda: True)
            return function(*args)

    return run


def features_and_gradient(model: nn.Module) -> tuple:
    image = IMAGE.clone().requires_grad_()
    (features,) = model(image)
    (gradient,) = torch.autograd.grad(features.square().mean(), image)
    return features.detach(), gradient


def assert_same(results, expected) -> None:
    for mine, theirs in zip(results, expected):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * scale)


def flat(tensors) -> torch.Tensor:
    """Some gradients cancel out to nothing but rounding: compare with the largest of all."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def patch_forward(module: nn.Module) -> None:
    old = module.forward
    module.forward = lambda *args, **kwargs: 1.5 * old(*args, **kwargs)


def change_class(module: nn.Module) -> None:
    cls = type(module)
    module.__class__ = type(
        'Changed', (cls,), dict(forward=lambda self, *args: 1.5 * cls.forward(self, *args))
    )


def offload(module: nn.Module) -> None:
    """Keep parameters on the meta device, load them around each call."""
    kept, old = dict(module._parameters), module.forward
    empty = {
        name: parameter if parameter is None else nn.Parameter(parameter.to('meta'))
        for name, parameter in kept.items()
    }

    def run(*args, **kwargs):
        module._parameters.update(kept)
        try:
            return old(*args, **kwargs)
        finally:
            module._parameters.update(empty)

    module.forward = run
    module._parameters.update(empty)


def drop_bias(module: nn.Module) -> None:
    if getattr(module, 'bias', None) is not None:
        module.bias = None


SURGERY = {
    'forward hook': lambda m: m.register_forward_hook(lambda module, args, out: 1.5 * out),
    'forward pre-hook': lambda m: m.register_forward_pre_hook(
        lambda module, args: tuple(1.5 * x if torch.is_tensor(x) else x for x in args)
    ),
    'backward hook': lambda m: m.register_full_backward_hook(
        lambda module, grads, _: tuple(None if g is None else 1.5 * g for g in grads)
    ),
    'backward pre-hook': lambda m: m.register_full_backward_pre_hook(
        lambda module, grads: tuple(None if g is None else 1.5 * g for g in grads)
    ),
    'forward on the instance': patch_forward,
    'another class': change_class,
    'offloaded parameters': offload,
    'no bias': drop_bias,
}


def called_modules(model: nn.Module) -> list:
    """Names of the modules that return a tensor when the definition runs."""
    called = []

    def note(module, args, out):
        if torch.is_tensor(out):
            called.append(module)

    with global_hooks.register_module_forward_hook(note):
        model(IMAGE)
    return [name for name, module in model.named_modules() if module in called]


@pytest.mark.parametrize('change', SURGERY.values(), ids=SURGERY)
def test_surgery_on_any_submodule_has_its_effect(change, definition):
    models, changed = (build(), build('plain')), 0
    untouched = definition(features_and_gradient, build('plain'))
    names = definition(called_modules, build('plain'))
    assert {type(models[0].get_submodule(name)) for name in names} >= {nn.Linear, nn.GELU, nn.ReLU}
    for name in names:
        expected = copy.deepcopy(models[1])
        change(expected.get_submodule(name))
        expected = definition(features_and_gradient, expected)
        changed += not all(map(torch.equal, expected, untouched))
        for model in models:
            operated = copy.deepcopy(model)
            change(operated.get_submodule(name))
            assert_same(features_and_gradient(operated), expected)
    assert changed or change is offload


@PATHS
def test_global_hooks_see_every_module(path, definition):
    expected = definition(called_modules, build('plain'))
    assert set(expected) <= set(called_modules(build(path)))


@PATHS
def test_dynamic_quantisation_replaces_every_linear_layer(path):
    model = build(path)
    count = sum(type(module) is nn.Linear for module in model.modules())
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert count == 16 and not any(type(module) is nn.Linear for module in quantised.modules())
    with torch.no_grad():
        (before,), (after,) = model(IMAGE), quantised(IMAGE)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, rtol=0.1, atol=0.1 * before.abs().max().item())


@PATHS
@pytest.mark.parametrize('position_bias', ['dynamic', 'relative', 'none'])
def test_a_model_built_without_memory_works_once_its_weights_are_assigned(path, position_bias):
    model = build(path, position_bias=position_bias)
    with torch.device('meta'):
        empty = build(path, position_bias=position_bias)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(IMAGE)[0], model(IMAGE)[0])


@PATHS
def test_a_bias_without_memory_is_an_error(path):
    model = build(path, position_bias='relative')
    model.layers[0].blocks[0].attn.pos.to('meta')
    with pytest.raises(ValueError, match='the position bias is on meta, the map on cpu'):
        model(IMAGE)


@PATHS
def test_transforms_of_torch_func_equal_autograd(path):
    model, image = build(path), IMAGE.clone().requires_grad_()
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image,))[0].square().mean()

    model(image)[0].square().mean().backward()
    expected = [value.grad for value in model.parameters()]
    assert_same([flat(torch.func.grad(loss)(parameters, IMAGE).values())], [flat(expected)])
    # Of several models at once, and forward through the gradient of the image.
    stacked = {name: torch.stack([value, 2 * value]) for name, value in parameters.items()}
    losses = torch.vmap(loss, (0, None))(stacked, IMAGE)
    doubled = {name: 2 * value for name, value in parameters.items()}
    assert_same([losses], [torch.stack([loss(p, IMAGE) for p in (parameters, doubled)])])
    tangent = torch.func.jvp(lambda x: loss(parameters, x), (IMAGE,), (IMAGE,))[1]
    assert_same([tangent], [(image.grad * IMAGE).sum()])


@PATHS
def test_forward_mode_equals_autograd(path):
    model, image = build(path), IMAGE.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(image)[0].square().mean(), image)
    with forward_ad.dual_level():
        value = model(forward_ad.make_dual(IMAGE, IMAGE))[0].square().mean()
        tangent = forward_ad.unpack_dual(value).tangent
    assert_same([tangent], [(gradient * IMAGE).sum()])


@PATHS
def test_batched_gradients_equal_single_ones(path):
    image = IMAGE.clone().requires_grad_()
    out = build(path)(image)[0].mean((0, 2, 3))[:3]
    single = [torch.autograd.grad(value, image, retain_graph=True)[0] for value in out]
    (batched,) = torch.autograd.grad(out, image, torch.eye(3), is_grads_batched=True)
    assert_same([batched], [torch.stack(single)])


def penalty_gradients(model: nn.Module) -> tuple:
    """Gradients of the weights of a gradient penalty, asked for by name, not by backward()."""
    image = IMAGE.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(image)[0].square().mean(), image, create_graph=True)
    weights = [value for name, value in model.named_parameters() if name.endswith('weight')]
    return (flat(torch.autograd.grad(grad.square().sum(), weights)),)


def test_second_derivatives_equal_those_of_the_definition(definition):
    expected = definition(penalty_gradients, build('plain'))
    assert_same(penalty_gradients(build('plain')), expected)


needs_kernel = pytest.mark.skipif(
    choose_path(Call(torch.device('cpu'))) == 'plain', reason='the kernel is not compiled'
)


@needs_kernel
def test_second_derivatives_through_the_kernel_are_an_error():
    with pytest.raises(RuntimeError, match='no autograd formula'):
        penalty_gradients(build())


@needs_kernel
def test_a_kernel_that_is_asked_for_says_that_it_has_no_rule_for_a_transform():
    with pytest.raises(ValueError, match='it has no rule for torch.func'):
        torch.func.grad(lambda x: build('native')(x)[0].sum())(IMAGE)
