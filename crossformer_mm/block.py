"""One CrossFormer block: attention, MLP and, in CrossFormer++, a cooling layer."""

import torch
from torch import Tensor, nn

from .attention import GroupAttention
from .exact import is_exact
from .grouping import AxisRule
from .layers import Mlp, convolve

SUMS_ON = 'cuda'  # type of the devices on which ScaledSum is faster


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
        return x * self.draw(x) if self.training and self.drop_prob else x

    def draw(self, x: Tensor) -> Tensor:
        """Draw the factors of a branch, (B, 1, 1, 1): 0, or 1 / (1 - drop_prob)."""
        keep = 1 - self.drop_prob
        kept = torch.rand(len(x), 1, 1, 1, dtype=x.dtype, device=x.device)
        return kept.add_(keep).floor_().div_(keep)


def add_branch(x: Tensor, branch: Tensor, drop_path: nn.Module) -> Tensor:
    """Return ``x + drop_path(branch)``; on a GPU in training with fewer passes over the map."""
    if x.device.type == SUMS_ON and drops_paths(drop_path, x.device):
        return ScaledSum.apply(x, branch, drop_path.draw(branch))
    return x + drop_path(branch)


def drops_paths(drop_path: nn.Module, device: torch.device) -> bool:
    """Check for an unmodified :class:`DropPath` that drops something."""
    return (
        drop_path.training and is_exact([drop_path], [DropPath], device) and drop_path.drop_prob > 0
    )


class ScaledSum(torch.autograd.Function):
    """Compute ``x + branch * factors``; no product is rounded to the type of ``branch``."""

    @staticmethod
    def forward(ctx, x: Tensor, branch: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(factors)
        ctx.dtype = branch.dtype
        return torch.addcmul(x, branch, factors)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (factors,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return grad, (grad * factors).to(ctx.dtype), None
        grad_branch = torch.empty_like(grad, dtype=ctx.dtype)
        return grad, torch.mul(grad, factors, out=grad_branch), None


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
        """Attention and MLP; the groups as the attention takes them. Stages for export call it."""
        x = add_branch(x, self.attn(self.norm1(x), *groups), self.drop_path)
        return add_branch(x, self.mlp(self.norm2(x)), self.drop_path)

    def cool(self, x: Tensor) -> Tensor:
        """The amplitude cooling layer."""
        return self.ex_ln(convolve([self.ex_conv], x.permute(0, 3, 1, 2))[0].permute(0, 2, 3, 1))
