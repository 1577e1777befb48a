"""Cross-scale embedding: convolutions of several kernels on one grid."""

import pytest
import torch

from crossformer_mm.embedding import CrossScaleConvs, split_channels

from .oracle import embed


@pytest.mark.parametrize(
    'channels, parts, expected',
    [(64, 4, [32, 16, 8, 8]), (128, 2, [64, 64]), (48, 3, [24, 12, 12]), (10, 1, [10])],
)
def test_channels_halve_from_kernel_to_kernel(channels, parts, expected):
    assert split_channels(channels, parts) == expected


@pytest.mark.parametrize(
    'kernels', [(4,), (4, 8), (4, 8, 16, 32), (2,), (2, 4), (3, 5, 9), (1, 3)], ids=str
)
@pytest.mark.parametrize('height, width', [(1, 1), (1, 33), (32, 32), (31, 45)])
def test_any_kernels_lie_where_the_papers_have_them_at_any_size(kernels, height, width):
    convs, image = CrossScaleConvs(3, 16, kernels), torch.randn(2, 3, height, width)
    weights = {f'convs.{name}': value for name, value in convs.named_parameters()}
    torch.testing.assert_close(convs(image), embed(weights, 'convs', image))
