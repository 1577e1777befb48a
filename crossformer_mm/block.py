"""One CrossFormer block: attention, MLP and, in CrossFormer++, a cooling layer."""

import torch
from torch import Tensor, nn

from .attention import GroupAttention
from .grouping import AxisRule
from .layers import Mlp


class DropPath(nn.Module):
    """Stochastic depth: drop a branch for a sample, and scale it where it stays.

    It draws the random numbers of mmcv's layer of this name.

    Args:
        drop_prob (float): probability to drop it while training.
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        if not (self.training and self.drop_prob):
            return x
        keep = 1 - self.drop_prob
        kept = torch.rand(len(x), 1, 1, 1, dtype=x.dtype, device=x.device).add_(keep).floor_()
        return x * kept.div_(keep)


class CrossFormerBlock(nn.Module):
    """Pre-norm transformer block on a map (B, H, W, C).

    Args:
        channels (int): channels of the map.
        mlp_ratio (float): hidden channels of the MLP over ``channels``.
        drop_rate (float): dropout after each linear layer but qkv.
        drop_path_rate (float): probability to drop a branch for a sample.
        cooling (bool): end with the amplitude cooling layer of CrossFormer++ (arXiv 2303.06908,
            section 3.4): depthwise 3x3 convolution and LayerNorm with no residual around them.
        attention: the other arguments of :class:`~crossformer_mm.attention.GroupAttention`.
    """

    def __init__(
        self,
        channels: int,
        mlp_ratio: float = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        cooling: bool = False,
        **attention,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = GroupAttention(channels, proj_drop_rate=drop_rate, **attention)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, int(channels * mlp_ratio), drop_rate)
        self.cooling = cooling
        if cooling:
            self.ex_conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
            self.ex_ln = nn.LayerNorm(channels)

    def forward(self, x: Tensor, rows: AxisRule, columns: AxisRule) -> Tensor:
        """(B, H, W, C) to the same shape; rows and columns as of :class:`GroupAttention`."""
        x = self.mix(x, rows, columns)
        return self.cool(x) if self.cooling else x

    def mix(self, x: Tensor, *groups) -> Tensor:
        """Attention and MLP; the groups as the attention takes them."""
        x = x + self.drop_path(self.attn(self.norm1(x), *groups))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def cool(self, x: Tensor) -> Tensor:
        """The amplitude cooling layer."""
        return self.ex_ln(self.ex_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
