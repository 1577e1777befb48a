"""Linear layers and MLPs: every way to compute them gives PyTorch's values and gradients."""

from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crossformer_mm import autocast, layers
from crossformer_mm.embedding import CrossScaleConvs
from crossformer_mm.kernels import convolution, onednn
from crossformer_mm.kernels import mlp as mlps
from crossformer_mm.kernels.onednn import onednn_suits
from crossformer_mm.layers import Mlp, linear

from .kernels.definition import Operations

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason='this PyTorch was built without oneDNN'
)


def check(ours, reference, *tensors):
    """Same value, and same gradient of every tensor, to float32 rounding."""
    results = []
    for function in (ours, reference):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        out = function(*leaves)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        results.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-4 * theirs.abs().max().item())


@needs_onednn
@pytest.mark.parametrize('tokens', [1, 2, 49, 1000])
@pytest.mark.parametrize('channels, out', [(16, 48), (1, 3), (3, 1), (96, 288)])
def test_linear_equals_pytorchs(tokens, channels, out):
    tensors = torch.randn(tokens, channels), torch.randn(out, channels), torch.randn(out)
    check(onednn.onednn_linear, F.linear, *tensors)
    check(lambda x, w: onednn.onednn_linear(x, w), F.linear, *tensors[:2])


LIBRARIES = pytest.mark.parametrize('library', ['MKL', pytest.param('oneDNN', marks=needs_onednn)])


def small_mlp(tokens: int) -> tuple:
    shapes = (tokens, 8), (32, 8), (32,), (8, 32), (8,)
    return tuple(torch.randn(shape) for shape in shapes)


def mlp_of_pytorch(x, weight1, bias1, weight2, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def compute_by(monkeypatch, library, kept, chunk):
    """Set how MLPs are computed: the library, the sizes that are kept and computed at once."""
    monkeypatch.setattr(mlps, 'KEPT', kept)
    monkeypatch.setattr(mlps, 'CHUNK', chunk)
    monkeypatch.setattr(mlps, 'NARROW_CHUNK', chunk)
    monkeypatch.setattr(mlps, 'onednn_suits', lambda x, weight: library == 'oneDNN')


@pytest.mark.parametrize('tokens', [1, 5, 1000])
@pytest.mark.parametrize('kept, chunk', [(2**23, 1), (0, 1), (0, 200), (0, 2**20)])
@LIBRARIES
def test_mlp_equals_pytorchs_kept_or_in_chunks_of_any_size(
    tokens, kept, chunk, library, monkeypatch
):
    compute_by(monkeypatch, library, kept, chunk)
    check(mlps.mlp, mlp_of_pytorch, *small_mlp(tokens))


@pytest.mark.parametrize('kept', [0, 2**23])
@LIBRARIES
def test_gradients_of_gradients_equal_pytorchs(library, kept, monkeypatch):
    """However they are asked for: of all leaves by backward(), or of single ones."""
    compute_by(monkeypatch, library, kept, 32 * 20)

    def penalty(function, tensors):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        total = function(*leaves).square().sum()
        (grad,) = torch.autograd.grad(total, leaves[:1], create_graph=True)
        return grad.square().sum(), leaves

    tensors = small_mlp(50)
    total, exact = penalty(mlp_of_pytorch, [t.double() for t in tensors])
    total.backward()
    for index, leaf in enumerate(exact):
        total, leaves = penalty(mlps.mlp, tensors)
        (grad,) = torch.autograd.grad(total, leaves[index])
        scale = leaf.grad.abs().max().item()
        torch.testing.assert_close(grad.double(), leaf.grad, rtol=1e-5, atol=1e-5 * scale)


@needs_onednn
def test_gradients_of_gradients_of_a_linear_layer_equal_pytorchs():
    shapes = (9, 8), (4, 8), (4,)
    tensors = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradgradcheck(onednn.onednn_linear, tensors)


def test_a_large_hidden_layer_is_kept_less_often_for_the_backward_pass(monkeypatch):
    x, module, hidden = torch.randn(300, 8), Mlp(8, 32), 300 * 32
    less, more = hidden - 1, hidden
    for small, kept, times in ((more, more, 2), (less, more, 1), (less, less, 0)):
        monkeypatch.setattr(mlps, 'SMALL', small)
        monkeypatch.setattr(mlps, 'KEPT', kept)
        keep = mock.Mock(side_effect=lambda tensor: tensor)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module(x)
        assert [call.args[0].numel() for call in keep.mock_calls].count(hidden) == times


def test_without_gradients_the_hidden_layer_is_activated_in_place_in_chunks(monkeypatch):
    monkeypatch.setattr(mlps, 'NARROW_CHUNK', 32 * 20)
    x, *layers = small_mlp(50)
    layers = [nn.Parameter(layer) for layer in layers]
    for narrow, kept, times in ((9, 2**23, 3), (8, 2**23, 1), (8, 32 * 25, 2)):
        monkeypatch.setattr(mlps, 'NARROW', narrow)
        monkeypatch.setattr(mlps, 'KEPT', kept)
        with torch.no_grad(), Operations() as operations:
            out = mlps.mlp(x, *layers)
        activations = [name for name in operations.names if 'gelu' in name]
        assert activations == ['aten.gelu_.default'] * times
        torch.testing.assert_close(out, mlp_of_pytorch(x, *layers), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('rows, width', [(0, 5), (1, 1), (7, 2**21), (1000, 384), (60800, 384)])
def test_chunks_cover_every_row_once(rows, width):
    parts = mlps.chunks(rows, width, 2**20)
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))


def be_processor(monkeypatch, capability='AVX512', intel=False):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    monkeypatch.setattr(onednn, 'is_intel', lambda: intel)


@needs_onednn
def test_the_rule_takes_onednn_for_float32_on_cpus_that_are_not_intels_alone(monkeypatch):
    x, weight = torch.randn(200, 8), torch.randn(16, 8)
    for capability, intel, suits in (
        ('AVX512', False, True),
        ('AVX512', True, False),
        ('AVX2', False, False),
        ('DEFAULT', False, False),
    ):
        be_processor(monkeypatch, capability, intel)
        assert onednn_suits(x, weight) == suits
    for intel, tokens, suits in ((False, 512, True), (False, 511, False), (True, 512, False)):
        be_processor(monkeypatch, 'AVX2', intel)
        with torch.no_grad():
            assert onednn_suits(torch.empty(tokens, 8), weight) == suits
    be_processor(monkeypatch)
    for other in (x.double(), x.bfloat16(), x.to('meta')):
        assert not onednn.is_float32_on_cpu(other)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert not onednn.is_float32_on_cpu(x)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn_suits(x, weight)


@needs_onednn
def test_the_rule_takes_it_for_few_tokens_only_without_gradient(monkeypatch):
    be_processor(monkeypatch)
    few, some, many = torch.randn(3, 5, 8), torch.randn(13, 10, 8), torch.randn(400, 8)
    small, large = torch.randn(16, 8), torch.empty(1025, 1024)
    assert not onednn_suits(few, small) and onednn_suits(some, small)
    assert not onednn_suits(some, large) and onednn_suits(many, large)
    with torch.no_grad():
        assert onednn_suits(few, small) and onednn_suits(some, large)


@pytest.mark.parametrize('shape', [(2, 5, 7, 8), (3, 8), (1, 8), (0, 8)])
@pytest.mark.parametrize('small', [0, 2**30])
def test_modules_take_any_leading_sides(shape, small, monkeypatch):
    be_processor(monkeypatch)
    monkeypatch.setattr(mlps, 'SMALL', small)
    x, mlp, layer = torch.randn(shape), Mlp(8, 32), nn.Linear(8, 24)
    for function, module in ((mlp, mlp), (partial(linear, layer), layer)):
        out = function(x)
        assert out.shape[:-1] == shape[:-1]
        torch.testing.assert_close(out, module.double()(x.double()).float())


def test_dropout_sees_the_hidden_layer(monkeypatch):
    monkeypatch.setattr(mlps, 'SMALL', 0)
    x, mlp = torch.randn(200, 8), Mlp(8, 32, drop_rate=0.5)
    assert (mlp.train()(x) == 0).float().mean() > 0.4
    assert not (mlp.eval()(x) == 0).any()


@pytest.fixture
def cast_together(monkeypatch):
    """Cast layers together on this processor, too."""
    monkeypatch.setattr(autocast, 'multiplies_bfloat16', lambda: True)
    monkeypatch.setattr(layers, 'joint_cast_dtype', layers.cast_dtype)


@pytest.mark.parametrize('bias', [True, False])
def test_weight_and_bias_cast_together_are_those_of_autocast(bias, cast_together):
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(2, 5, 24)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(layers.linear(layer, x), layer(x))


def convolved(convs, x):
    """Sum of the outputs under autocast, in float32."""
    with torch.autocast('cpu', torch.bfloat16):
        return torch.cat(layers.convolve(convs, x), 1).float().square().sum()


@pytest.mark.parametrize('bias', [True, False])
def test_convolutions_cast_together_are_those_of_autocast(bias, monkeypatch, cast_together):
    convs = [nn.Conv2d(3, 4, kernel, 2, kernel // 2 - 1, bias=bias) for kernel in (2, 4)]
    convs[0].weight.requires_grad_(False)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    needed = [x, *(p for conv in convs for p in conv.parameters() if p.requires_grad)]
    convolved(convs, x).backward()
    assert convs[0].weight.grad is None and convs[1].weight.grad.dtype == torch.float32
    results = []
    for dtype in (layers.cast_dtype, lambda x: None):
        monkeypatch.setattr(layers, 'joint_cast_dtype', dtype)
        out = convolved(convs, x)
        first = torch.autograd.grad(out, needed, create_graph=True)
        slope = sum(grad.square().sum() for grad in first)
        results.append((out, *first, *torch.autograd.grad(slope, needed)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_convolution_with_a_hook_casts_by_itself(cast_together):
    convs, seen = [nn.Conv2d(3, 4, 2, 2), nn.Conv2d(3, 4, 2, 2)], []
    convs[1].register_forward_hook(lambda *args: seen.append(args))
    convolved(convs, torch.randn(1, 3, 4, 4))
    assert len(seen) == 1


@pytest.mark.parametrize(
    'layer, shape',
    [
        (nn.Linear(24, 40), (2, 5, 24)),
        (nn.Conv2d(6, 8, 4, 2, bias=False), (2, 6, 8, 8)),
        (nn.Conv2d(6, 6, 3, groups=6), (2, 6, 8, 8)),
    ],
    ids=['linear', 'convolution', 'depthwise'],
)
def test_layers_are_computed_in_float32_where_bfloat16_is_slow(layer, shape, monkeypatch):
    monkeypatch.setattr(autocast, 'multiplies_bfloat16', lambda: False)
    x = torch.randn(shape, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        is_linear = isinstance(layer, nn.Linear)
        ours = linear(layer, x) if is_linear else layers.convolve([layer], x)[0]
    results, needed = [], [x, *layer.parameters()]
    for out in (ours, layer(x).bfloat16()):  # the type that autocast gives
        results.append((out, *torch.autograd.grad(out.sum(), needed)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize('kind', [nn.Linear, nn.Conv2d])
def test_a_layer_with_a_hook_stays_under_autocast_where_bfloat16_is_slow(kind, monkeypatch):
    monkeypatch.setattr(autocast, 'multiplies_bfloat16', lambda: False)
    layer, seen = nn.Linear(3, 3) if kind is nn.Linear else nn.Conv2d(3, 3, 1), []
    layer.register_forward_hook(lambda *_: seen.append(torch.is_autocast_cpu_enabled()))
    with torch.autocast('cpu', torch.bfloat16):
        linear(layer, torch.ones(1, 3, 3, 3))
        layers.convolve([layer], torch.ones(1, 3, 3, 3))
    assert seen == [True, True]


@pytest.mark.parametrize('kernel, stride', [(16, 4), (32, 4), (18, 2), (27, 3)])
def test_a_convolution_of_blocks_equals_that_of_pixels(kernel, stride):
    x, weight = torch.randn(2, 3, 6 * stride, 8 * stride), torch.randn(5, 3, kernel, kernel)
    padding = (kernel - stride) // 2
    options = dict(stride=(stride,) * 2, padding=(padding,) * 2)

    def ours(x, weight, bias):
        conv = SimpleNamespace(weight=weight, bias=bias, **options)
        return convolution.convolve_blocks(x, [conv])[0]

    check(ours, partial(F.conv2d, **options), x, weight, torch.randn(5))


@needs_onednn
def test_with_avx2_no_large_kernel_is_applied_to_pixels(monkeypatch):
    """oneDNN takes a hundred times as long for them, with one thread."""
    be_processor(monkeypatch, 'AVX2')
    convs, image = CrossScaleConvs(3, 16, (4, 8, 16, 32)), torch.randn(1, 3, 30, 40)
    expected = deepcopy(convs).double()(image.double()).float()
    conv2d = mock.Mock(wraps=F.conv2d)
    monkeypatch.setattr(F, 'conv2d', conv2d)
    torch.testing.assert_close(convs(image), expected)
    kernels = [call.args[1].shape[-1] for call in conv2d.mock_calls]
    assert sorted(kernels) == sorted([4, 8, 16 // 4, 32 // 4])


@needs_onednn
@pytest.mark.parametrize(
    'changed',
    [
        dict(kernel_size=8, padding=2),
        dict(kernel_size=18, padding=7),
        dict(padding=4),
        dict(stride=(4, 2)),
        dict(dilation=2),
        dict(padding_mode='reflect'),
        dict(in_channels=8),
        dict(in_channels=2, groups=2),
    ],
)
def test_other_convolutions_are_not_computed_in_blocks(changed, monkeypatch):
    usual = dict(in_channels=3, out_channels=2, kernel_size=16, stride=4, padding=6)
    be_processor(monkeypatch, 'AVX2')
    image = torch.randn(1, 3, 32, 32)
    assert convolution.blocks_suit(image, nn.Conv2d(**usual))
    assert not convolution.blocks_suit(image, nn.Conv2d(**{**usual, **changed}))
    assert not convolution.blocks_suit(image[..., 1:], nn.Conv2d(**usual))
    be_processor(monkeypatch, 'AVX512')
    assert not convolution.blocks_suit(image, nn.Conv2d(**usual))


@pytest.mark.parametrize('images', [0, 1, 2])
@pytest.mark.parametrize(
    'options',
    [dict(padding=1, stride=2), dict(bias=False), dict(stride=(1, 3), padding=(2, 0), dilation=2)],
    ids=['merging', 'no bias', 'other'],
)
def test_a_convolution_as_a_product_of_windows_equals_pytorchs(images, options):
    conv, x = nn.Conv2d(6, 5, 4, **options), torch.randn(images, 6, 9, 14)
    results, leaves = [], [x.requires_grad_(), *conv.parameters()]
    for function in (partial(convolution.convolve_windows, conv=conv), conv):
        out = function(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)
    if images:
        exact = partial(convolution.convolve_windows, conv=conv.double())
        assert torch.autograd.gradgradcheck(exact, x.detach().double().requires_grad_())


@needs_onednn
@pytest.mark.parametrize(
    'side, options, suits',
    [
        (22, {}, True),
        (24, {}, False),
        (22, dict(out_channels=100), False),
        (22, dict(groups=2), False),
        (22, dict(padding_mode='reflect'), False),
        (8, dict(stride=1, padding='same'), False),
    ],
)
def test_few_pixels_by_a_large_weight_are_multiplied_as_windows(side, options, suits, monkeypatch):
    usual = dict(in_channels=300, out_channels=300, kernel_size=4, stride=2, padding=1)
    conv, image = nn.Conv2d(**{**usual, **options}), torch.randn(1, 300, side, side)
    windows = mock.Mock(side_effect=lambda x, conv: conv(x))
    monkeypatch.setattr(convolution, 'convolve_windows', windows)
    layers.convolve([conv], image)
    assert windows.called == suits
    conv.register_forward_hook(lambda *_: None)
    layers.convolve([conv], image)
    assert windows.call_count == suits


@needs_onednn
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('train', [True, False])
def test_images_are_convolved_in_the_layout_that_is_fast(layout, train, monkeypatch):
    """In training with AVX-512, images channels last took twenty times as long."""
    convs, image = CrossScaleConvs(3, 16, (4, 8)), torch.randn(2, 3, 16, 24)
    expected, conv2d = convs(image), mock.Mock(wraps=F.conv2d)
    monkeypatch.setattr(F, 'conv2d', conv2d)
    with torch.set_grad_enabled(train):
        out = convs(image.contiguous(memory_format=layout))
    torch.testing.assert_close(out, expected)
    assert [call.args[0].is_contiguous() for call in conv2d.mock_calls] == [train, train]
