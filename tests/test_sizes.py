"""Images, batches, groups, intervals of any size, against the papers' mask-and-pad formulation."""

import os

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from .oracle import assert_equals_plain, out_sides, parameters_of, plain_features

TINY = dict(embed_dims=16, depths=(2, 2, 1, 2), num_heads=(1, 2, 2, 4))
LARGEST = 600
# 1, primes, the published ones, and larger than any map: 600 pixels are 150 positions.
GROUP_SIZES = (1, 2, 3, 5, 7, 11, 13, 14, 151, 200)
INTERVALS = (1, 2, 3, 5, 7, 8, 13, 16, 151, 200)
MOST_PAIRS = 1_500_000  # of positions that the oracle, which pads, compares in one block

EXAMPLES = int(os.environ.get('CROSSFORMER_EXAMPLES', 30))  # `make soak` tries more

# The same examples in every run: a test that fails now and then teaches nothing.
same_examples = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


def pairs(height: int, width: int, group_size: int, interval: int, lda: str) -> int:
    """Count the pairs of positions that the oracle compares in long distance attention, or in short
    distance attention where that is more."""
    if min(height, width) <= group_size:
        group_size, interval = (min if lda == 'interval' else max)(height, width), 1
        lda = 'block'

    def padded(multiple: int) -> int:
        return (height + -height % multiple) * (width + -width % multiple)

    long = padded(group_size * interval) * group_size**2
    if lda == 'interval':
        long = padded(interval) ** 2 // interval**2
    return max(padded(group_size) * group_size**2, long)


@st.composite
def cases(draw, batches=st.integers(1, 3)):
    """Shape of a batch of images, and how to group: mostly small, where the edges are."""
    batch, lda = draw(batches), draw(st.sampled_from(['interval', 'block']))
    lengths = st.one_of(st.integers(1, 40), st.integers(1, 160), st.integers(1, LARGEST))
    height, width = draw(lengths), draw(lengths)
    stages = []
    for map_size in zip(out_sides(height), out_sides(width)):
        affordable = [
            (group_size, interval)
            for group_size in GROUP_SIZES
            for interval in INTERVALS
            if batch * pairs(*map_size, group_size, interval, lda) <= MOST_PAIRS
        ]
        assume(affordable)  # the oracle pads a long strip to a square under `block`
        stages.append(draw(st.sampled_from(affordable)))
    group_size, interval = zip(*stages)
    return (batch, 3, height, width), dict(lda=lda, group_size=group_size, interval=interval)


@settings(same_examples, max_examples=EXAMPLES)
@given(case=cases())
def test_features_and_gradients_are_the_papers(small, probe, case):
    shape, options = case
    backbone = small(TINY, **options).double()
    assert_equals_plain(backbone, probe, torch.randn(shape, dtype=torch.double), options)


@settings(same_examples, max_examples=EXAMPLES // 4)
@given(case=cases(st.integers(2, 3)))
def test_a_batch_is_its_images_one_by_one(small, probe, case):
    shape, options = case
    backbone, images = small(TINY, **options).double(), torch.randn(shape, dtype=torch.double)
    weights = list(backbone.parameters())
    features, singles = backbone(images), [backbone(image[None]) for image in images]
    joined = [torch.cat(stage) for stage in zip(*singles)]
    for feature, reference in zip(features, joined):
        torch.testing.assert_close(feature, reference, rtol=1e-9, atol=1e-11)
    gradients, references = (
        torch.autograd.grad(probe(given), weights) for given in (features, joined)
    )
    for gradient, reference in zip(gradients, references):
        atol = 1e-9 * max(1e-3, reference.abs().max().item())
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=atol)


@settings(same_examples, max_examples=EXAMPLES // 4)
@given(
    shapes=st.lists(st.tuples(*[st.integers(1, 200)] * 2), min_size=2, max_size=4),
    chosen=st.tuples(
        st.sampled_from(['interval', 'block']),
        st.sampled_from(GROUP_SIZES[:8]),
        st.sampled_from(INTERVALS[2:8]),
    ),
    order=st.randoms(),
)
@torch.no_grad()
def test_the_order_of_images_changes_nothing(small, shapes, chosen, order):
    lda, group_size, interval = chosen
    options = dict(lda=lda, group_size=(group_size,) * 4, interval=(interval,) * 4)
    images = [torch.randn(1, 3, *shape) for shape in shapes]
    fresh = [small(TINY, **options)(image) for image in images]
    backbone = small(TINY, **options)
    for index in order.choices(range(len(images)), k=2 * len(images)):
        assert all(map(torch.equal, backbone(images[index]), fresh[index]))


@torch.no_grad()
def test_the_largest_size_with_the_published_groups(small):
    for lda in ('interval', 'block'):
        backbone, image = small(TINY, lda=lda).double(), torch.randn(1, 3, 600, 593).double()
        references = plain_features(parameters_of(backbone), image, lda=lda)
        for feature, reference in zip(backbone(image), references):
            torch.testing.assert_close(feature, reference, rtol=1e-9, atol=1e-11)
