"""The compiled gradient of a convolution's weight equals PyTorch's, and gives way to it."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from crossformer_mm.kernels import convolution
from crossformer_mm.kernels.convolution_native import weight_gradient

from .paths import lacks

pytestmark = pytest.mark.skipif(bool(lacks('native')), reason=f'native: {lacks("native")}')

# Channels in and out, kernel, stride, padding, sides.
CASES = [
    (16, 5, (4, 4), (2, 2), (1, 1), (8, 12)),
    (48, 12, (8, 8), (1, 1), (2, 2), (9, 10)),
    (32, 100, (2, 2), (2, 2), (0, 0), (7, 6)),
    (16, 49, (3, 1), (1, 3), (4, 0), (2, 5)),
    (16, 7, (5, 6), (3, 2), (6, 7), (1, 1)),
]


def draw(channels, out, kernel, stride, padding, sides, images=2):
    x = torch.randn(images, channels, *sides)
    weight = torch.randn(out, channels, *kernel)
    grad = torch.randn_like(F.conv2d(x, weight, None, stride, padding))
    return x, weight, grad


@pytest.mark.parametrize('images', [0, 1, 3])
@pytest.mark.parametrize('case', CASES)
def test_every_instruction_set_equals_float64_for_any_number_of_threads(
    case, images, instructions, set_threads
):
    (x, weight, grad), geometry, results = draw(*case, images), case[2:5], []
    for threads, layout in ((1, torch.contiguous_format), (3, torch.channels_last)):
        set_threads(threads)
        maps = (one.contiguous(memory_format=layout) for one in (grad, x))
        results.append(weight_gradient(*maps, *geometry))
    assert torch.equal(*results)
    exact = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), *geometry[1:])
    error = (results[0] - exact).abs().max()
    assert error <= 1e-6 * exact.abs().max() + 1e-7 * exact.numel() ** 0.5


def test_what_is_not_a_number_stays_where_it_is():
    x, weight, grad = draw(*CASES[0])
    x[1, 3, 2, 2] = torch.nan
    ours = weight_gradient(grad, x, *CASES[0][2:5])
    exact = torch.nn.grad.conv2d_weight(x, weight.shape, grad, *CASES[0][3:5])
    assert torch.equal(ours.isnan(), exact.isnan()) and ours.isnan().any()


@pytest.fixture
def kernel(monkeypatch) -> mock.Mock:
    """Take the kernel for convolutions of any size, and record its runs."""
    kernel = mock.Mock(wraps=convolution.weight_gradient)
    monkeypatch.setattr(convolution, 'weight_gradient', kernel)
    monkeypatch.setattr(convolution, 'SMALL', 0)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX2')
    return kernel


def leaves(case=CASES[0], bias=True):
    x, weight, _ = draw(*case)
    tensors = x, weight, torch.randn(len(weight)) if bias else None
    return [one if one is None else one.requires_grad_() for one in tensors]


@pytest.mark.parametrize('frozen', [(), (0,), (2,), (0, 2), (1,)])
@pytest.mark.parametrize('case', CASES[:2])
def test_gradients_equal_pytorchs_whatever_is_frozen(case, frozen, kernel):
    tensors = leaves(case)
    for index in frozen:
        tensors[index].requires_grad_(False)
    needed = [one for one in tensors if one.requires_grad]
    results = []
    for function in (convolution.convolve, F.conv2d):
        out = function(*tensors, *case[3:5])
        results.append((out, *torch.autograd.grad(out.square().sum(), needed)))
    assert kernel.call_count == (1 not in frozen)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-2)


def test_without_a_bias_there_is_no_gradient_of_one(kernel):
    x, weight, _ = leaves(bias=False)
    convolution.convolve(x, weight, None, *CASES[0][3:5]).sum().backward()
    assert kernel.call_count == 1 and x.grad is not None and weight.grad is not None


def test_gradients_of_gradients_batches_of_them_and_observed_ones_are_pytorchs(kernel):
    results = []
    for function in (convolution.convolve, F.conv2d):
        tensors = leaves()
        torch.manual_seed(0)
        for one in tensors:
            one.data.normal_()
        out = function(*tensors, *CASES[0][3:5])
        with FlopCounterMode(display=False) as counter:
            out.sum().backward(retain_graph=True)
        grads = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        slope = sum(grad.square().sum() for grad in grads)
        second = torch.autograd.grad(slope, tensors[:2], retain_graph=True)
        batch = torch.eye(4).view(4, 1, 1, 1, 4).expand(4, *out.shape[:3], 4)
        batches = torch.autograd.grad(out[..., :4], tensors, batch, is_grads_batched=True)
        results.append((counter.get_total_flops(), *grads, *second, *batches))
    assert kernel.call_count == 1  # what second derivatives add through the output
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=1e-4, atol=1e-2)


def test_the_rule_takes_large_maps_of_whole_vectors_with_avx2_alone(monkeypatch):
    suits = convolution.weight_gradient_suits
    large, few, weight = torch.empty(1, 16, 200, 200), torch.empty(1, 16, 9, 9), nn.Conv2d(16, 3, 2)
    for capability in ('AVX2', 'AVX512', 'DEFAULT'):
        monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
        assert suits(large, weight.weight) == (capability == 'AVX2')
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX2')
    assert not suits(few, weight.weight)
    assert not suits(large, nn.Conv2d(24, 3, 2).weight)
    monkeypatch.setattr(convolution.native, 'MISSING', 'not compiled')
    assert not suits(large, weight.weight)
