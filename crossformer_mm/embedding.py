"""Cross-scale embedding layer (CEL): convolutions of several kernels, side by side."""

from typing import List, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compat import is_compiling
from .layers import convolve


def split_channels(channels: int, parts: int) -> List[int]:
    """Halve again and again: 1/2, 1/4, ..., the last part as large as the one before.

    ``split_channels(96, 4) == [48, 24, 12, 12]`` (arXiv 2108.00154, figure 2).
    """
    split = [channels // 2 ** (i + 1) for i in range(parts - 1)]
    return split + [channels - sum(split)]


class CrossScaleConvs(nn.ModuleList):
    """Convolutions of stride ``kernels[0]`` whose outputs are joined on channels.

    A side that is no multiple of the stride is padded with zeros at its end.
    """

    def __init__(self, in_channels: int, out_channels: int, kernels: Sequence[int]):
        self.stride = kernels[0]
        super().__init__(
            nn.Conv2d(in_channels, channels, kernel, self.stride, (kernel - self.stride) // 2)
            for kernel, channels in zip(kernels, split_channels(out_channels, len(kernels)))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, ceil(H/stride), ceil(W/stride), out_channels)."""
        height, width = x.shape[-2:]
        missing = (0, -width % self.stride, 0, -height % self.stride)
        if is_compiling():  # or exporting
            # As many zeros as are ever needed: more change nothing, and the sides are not asked.
            missing = (0, self.stride - 1) * 2
        if any(missing):
            x = F.pad(x, missing)
        return torch.cat(convolve([*self], x), dim=1).permute(0, 2, 3, 1)


class PatchEmbedding(nn.Module):
    """The first CEL: image to map, a LayerNorm after it.

    Args:
        in_channels (int): channels of the image.
        embed_dims (int): channels of the map.
        patch_sizes (Sequence[int]): kernels; the first is the stride.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_sizes: Sequence[int]):
        super().__init__()
        self.projs = CrossScaleConvs(in_channels, embed_dims, patch_sizes)
        self.norm = nn.LayerNorm(embed_dims)

    def forward(self, image: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, ceil(H/stride), ceil(W/stride), embed_dims)."""
        return self.norm(self.projs(image))


class PatchMerging(nn.Module):
    """A CEL between stages: LayerNorm, then half the sides and twice the channels.

    Args:
        channels (int): channels of the map that comes in.
        merge_sizes (Sequence[int]): kernels; the first is the stride.
    """

    def __init__(self, channels: int, merge_sizes: Sequence[int]):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.reductions = CrossScaleConvs(channels, 2 * channels, merge_sizes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ceil(H/stride), ceil(W/stride), 2*C)."""
        # The map keeps its type: in one of autocast's, each sum of a block would round it, and each
        # norm cast it again.
        return self.reductions(self.norm(x).permute(0, 3, 1, 2)).to(x.dtype)
