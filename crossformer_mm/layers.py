"""Linear layers and the MLP of a block."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compat import autocast_dtype, is_autocast_enabled
from .exact import is_exact
from .kernels import capture_mode
from .kernels.mlp import SMALL, mlp
from .kernels.onednn import is_float32_on_cpu, onednn_linear, onednn_suits


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Return ``layer(x)``, computed faster where the result is the same.

    Args:
        layer (nn.Module): ``nn.Linear``, or the module by which a user replaced it.
        x (Tensor): (..., in).

    Returns:
        Tensor: (..., out).
    """
    if is_float32_on_cpu(x):
        if is_exact([layer], [nn.Linear], x.device) and onednn_suits(x, layer.weight):
            out = onednn_linear(x.flatten(0, -2), layer.weight, layer.bias)
            return out.view(*x.shape[:-1], -1)
        return layer(x)
    dtype = joint_cast_dtype(x)
    if dtype and is_exact([layer], [nn.Linear], x.device) and layer.bias is not None:
        # In one launch; autocast casts each by itself.
        cast = [torch.empty_like(one, dtype=dtype) for one in (layer.weight, layer.bias)]
        torch._foreach_copy_(cast, [layer.weight, layer.bias])
        return F.linear(x, *cast)
    return layer(x)


def joint_cast_dtype(x: Tensor) -> Optional[torch.dtype]:
    """Return the type to which a layer casts its weight and bias in one launch, or None.

    None in training, too: there autocast does it, without a Python autograd function.
    """
    if x.device.type != 'cuda' or torch.is_grad_enabled() or capture_mode():
        return None
    return cast_dtype(x)


def cast_dtype(x: Tensor) -> Optional[torch.dtype]:
    """Return the type to which autocast casts the operands of a product, or None."""
    device = x.device.type
    if x.dtype == torch.float64 or device not in ('cpu', 'cuda') or not is_autocast_enabled(device):
        return None
    return autocast_dtype(device)


class Mlp(nn.Module):
    """Linear, GELU, linear, with dropout after each linear layer.

    Args:
        channels (int): channels in and out.
        hidden (int): channels between.
        drop_rate (float): dropout while training.
    """

    def __init__(self, channels: int, hidden: int, drop_rate: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, channels)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to the same shape."""
        if self.takes_shortcut(x):
            layers = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
            return mlp(x.flatten(0, -2), *layers).view(*x.shape[:-1], -1)
        x = self.drop(self.act(linear(self.fc1, x)))
        return self.drop(linear(self.fc2, x))

    def takes_shortcut(self, x: Tensor) -> bool:
        """Check that the hidden layer is large and :func:`.kernels.mlp.mlp` equals the layers."""
        return (
            is_float32_on_cpu(x)
            and is_exact(
                (self.fc1, self.act, self.fc2, self.drop),
                (nn.Linear, nn.GELU, nn.Linear, nn.Dropout),
                x.device,
            )
            and self.act.approximate == 'none'
            and not (self.drop.training and self.drop.p)
            and x.numel() // x.shape[-1] * self.fc1.out_features > SMALL
        )
