"""The backbone in PyTorch's compilers and exporters."""

import logging
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from crossformer_mm import CrossFormer
from crossformer_mm.compat import EXPORT, missing_torch
from crossformer_mm.kernels import native

from .helpers import ONE_STAGE, add_noise, needs_torch

needs_native = pytest.mark.skipif(bool(native.MISSING), reason=native.MISSING or 'compiled')
COMPILED = needs_torch('2.4', 'torch.library.register_fake, of which a graph takes sizes,')
TINY = dict(embed_dims=16, depths=(2,), num_heads=(2,))


# Short and long distance, before and after a merging.
TWO_STAGES = dict(
    arch=dict(embed_dims=32, depths=(1, 2), num_heads=(1, 2)),
    merge_sizes=((2, 4),),
    group_size=(3, 3),
    interval=(4, 3),
    out_indices=(0, 1),
)


def tiny(arch=TINY, **options) -> CrossFormer:
    """One short and one long distance block on ragged groups: each path once."""
    return add_noise(CrossFormer(**{**ONE_STAGE, 'arch': arch}, **options).eval())


@pytest.fixture(autouse=True)
def no_compiled_code_is_left(monkeypatch):
    # Of each step of a compilation PyTorch writes a long record, if anything listens: pytest does.
    monkeypatch.setattr(logging.getLogger('torch.__trace'), 'handlers', [])
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def assert_equals_eager(probe):
    """Values, and gradients of the parameters, of a compiled backbone are those of the backbone."""

    def check(backbone, compiled, image, rounding=0.0):
        results = []
        for model in (compiled, backbone):
            features = model(image)
            gradients = torch.autograd.grad(probe(features), list(backbone.parameters()))
            results.append([*features, *gradients])
        assert_near(*results, rounding)

    return check


def assert_near(results, references, rounding=0.0):
    """To 1e-4 of the largest entry. In float32 gradients that are 0 are mere rounding of others:
    those are judged by ``rounding`` of the largest entry of all."""
    smallest = max(1e-3, rounding * max(x.abs().max().item() for x in references))
    for result, reference in zip(results, references):
        scale = max(reference.abs().max().item(), smallest)
        assert (result - reference).abs().max() <= 1e-4 * scale


@COMPILED
@needs_native
@pytest.mark.parametrize('lda', ['interval', 'block', 'shifted'])
def test_one_graph_serves_images_of_many_sizes(small, lda, assert_equals_eager):
    """Ragged in both stages; only maps of few positions, in one of them, are another case."""
    backbone, graphs = small(lda=lda, **TWO_STAGES), CompileCounter()
    compiled = torch.compile(backbone, fullgraph=True, dynamic=True, backend=graphs)
    for batch, height, width in ((1, 61, 67), (2, 88, 70), (3, 101, 93)):
        image = torch.randn(batch, 3, height, width)
        assert_equals_eager(backbone, compiled, image, rounding=1e-2)
    # One for single images, and one for batches, of which PyTorch 2.6 and 2.8 make two.
    most = 3 if missing_torch('2.13') else 2
    assert graphs.frame_count == most
    compiled(torch.randn(2, 3, 101, 24))
    assert graphs.frame_count == most + 1


@COMPILED
@pytest.mark.parametrize(
    'depth, sizes',
    [(1, [(1, 50, 70), (2, 30, 41), (3, 30, 41)]), (2, [(2, 50, 70)])],  # with long distance
    ids=['short', 'long'],
)
def test_the_plain_path_is_one_graph_a_size_with_the_sides_as_numbers(
    depth, sizes, assert_equals_eager
):
    """The graph has to line up the groups."""
    backbone = tiny(dict(TINY, depths=(depth,)), attention_path='plain').double()
    image_shapes = []

    def backend(graph, inputs):  # runs the graph as it is
        image_shapes.extend(
            tuple(tensor.shape)
            for tensor in inputs
            if isinstance(tensor, torch.Tensor)
            and tensor.dim() == 4
            and not isinstance(tensor, nn.Parameter)
        )
        return graph.forward

    compiled = torch.compile(backbone, fullgraph=True, backend=backend)
    for size in sizes:
        image = torch.randn(size[0], 3, *size[1:], dtype=torch.float64)
        assert_equals_eager(backbone, compiled, image)
    # Symbolic sides take minutes to compile and stop the default backend; the batch may be one.
    sides = [side for shape in image_shapes for side in shape[2:]]
    assert sides == [50, 70, 30, 41][: 2 * len({size[1:] for size in sizes})]
    assert {type(side) for side in sides} == {int}


@COMPILED
def test_compiled_code_gives_the_same_features():
    backbone = tiny(patch_sizes=(4,))
    compiled = torch.compile(backbone, fullgraph=True)
    image = torch.randn(1, 3, 24, 33)
    with torch.no_grad():
        assert_near(compiled(image), backbone(image))


@COMPILED
@needs_torch('2.13', 'an inductor that compiles these gradients (not yet 2.6 and 2.8)')
def test_compiled_code_gives_the_same_gradients(assert_equals_eager):
    """Tensors that are kept for the backward pass have symbolic sides, too."""
    backbone = tiny(dict(TINY, depths=(1,)), patch_sizes=(4,))
    compiled = torch.compile(backbone, fullgraph=True, dynamic=True)
    assert_equals_eager(backbone, compiled, torch.randn(1, 3, 24, 33), rounding=1e-2)


@needs_torch(EXPORT, 'the torch.export that the backbone is exported by')
@pytest.mark.parametrize('lda', ['interval', 'block', 'shifted'])
def test_exported_program_gives_the_same_features(small, lda):
    backbone, image = small(lda=lda, **TWO_STAGES), torch.randn(1, 3, 101, 83)
    program = torch.export.export(backbone, (image,)).module()
    for given in (image, torch.randn_like(image)):
        assert_near(program(given), backbone(given))


@pytest.mark.parametrize('lda', ['interval', 'block', 'shifted'])
def test_module_traced_with_one_image_gives_the_same_features_of_any_batch(small, lda, tmp_path):
    backbone, image = small(lda=lda, **TWO_STAGES), torch.randn(1, 3, 101, 83)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that sizes become constants, which is meant
        traced = torch.jit.trace(backbone, image)
        torch.jit.save(traced, tmp_path / 'traced.pt')
        traced = torch.jit.load(tmp_path / 'traced.pt')
    for given in (image, torch.randn(3, 3, 101, 83)):
        assert_near(traced(given), backbone(given))
