"""Cross-scale embedding: convolutions of several kernels on one grid."""

import pytest
import torch
import torch.nn.functional as F

from crossformer_mm.embedding import CrossScaleConvs, PatchEmbedding, PatchMerging, split_channels

KERNELS = [(4,), (4, 8), (4, 8, 16, 32), (2,), (2, 4), (3, 5, 9), (1, 3)]


@pytest.mark.parametrize(
    'channels, parts, expected',
    [
        (64, 4, [32, 16, 8, 8]),
        (96, 4, [48, 24, 12, 12]),
        (128, 2, [64, 64]),
        (48, 3, [24, 12, 12]),
        (10, 1, [10]),
    ],
)
def test_channels_halve_from_kernel_to_kernel(channels, parts, expected):
    assert split_channels(channels, parts) == expected


@pytest.mark.parametrize('kernels', KERNELS)
@pytest.mark.parametrize('height, width', [(1, 1), (1, 33), (32, 32), (31, 45)])
def test_every_started_stride_gives_a_position(kernels, height, width):
    out = CrossScaleConvs(3, 16, kernels)(torch.randn(2, 3, height, width))
    stride = kernels[0]
    assert out.shape == (2, -(-height // stride), -(-width // stride), 16)


@pytest.mark.parametrize('kernels', KERNELS)
def test_missing_pixels_are_zeros_at_the_bottom_and_right(kernels):
    convs, image = CrossScaleConvs(3, 16, kernels), torch.randn(1, 3, 13, 22)
    stride = kernels[0]
    whole = torch.zeros(1, 3, -(-13 // stride) * stride, -(-22 // stride) * stride)
    whole[..., :13, :22] = image
    assert torch.equal(convs(image), convs(whole))


@pytest.mark.parametrize('kernels', KERNELS)
def test_kernels_stay_centred_on_their_cell_and_in_order(kernels):
    convs, image = CrossScaleConvs(1, 16, kernels), torch.randn(1, 1, 36, 36)
    stride, row, column = kernels[0], 4, 5
    expected = []
    for conv, kernel in zip(convs, kernels):
        reach = (kernel - stride) // 2
        padded = F.pad(image, (reach,) * 4)
        window = padded[0, 0, row * stride :, column * stride :][:kernel, :kernel]
        expected.append((conv.weight[:, 0] * window).sum((1, 2)) + conv.bias)
    torch.testing.assert_close(convs(image)[0, row, column], torch.cat(expected))


def test_first_embedding_ends_with_its_norm():
    embedding, image = PatchEmbedding(3, 32, (4, 8)), 50 * torch.randn(1, 3, 20, 24)
    with torch.no_grad():
        embedding.norm.weight.uniform_(1, 2)
        embedding.norm.bias.uniform_(1, 2)
    expected = F.layer_norm(
        embedding.projs(image), (32,), embedding.norm.weight, embedding.norm.bias
    )
    torch.testing.assert_close(embedding(image), expected)


def test_merging_starts_with_its_norm_and_pads_after_it():
    merging, x = PatchMerging(16, (2, 4)), torch.randn(1, 5, 7, 16)
    with torch.no_grad():
        merging.norm.bias.uniform_(1, 2)  # a norm of padding would not be zero any more
    normed = F.layer_norm(x, (16,), merging.norm.weight, merging.norm.bias)
    padded = F.pad(normed, (0, 0, 0, 1, 0, 1)).permute(0, 3, 1, 2)
    expected = torch.cat([conv(padded) for conv in merging.reductions], 1).permute(0, 2, 3, 1)
    assert expected.shape == (1, 3, 4, 32)
    torch.testing.assert_close(merging(x), expected)
