"""Linear layers and the MLP of a block."""

from mmengine.model import BaseModule
from torch import Tensor, nn

from .exact import is_exact
from .kernels.mlp import SMALL, mlp
from .kernels.onednn import is_float32_on_cpu, onednn_linear, onednn_suits


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Return ``layer(x)``, computed by oneDNN where that is faster.

    Args:
        layer (nn.Module): ``nn.Linear``, or what a user put in its place.
        x (Tensor): (..., in).

    Returns:
        Tensor: (..., out).
    """
    if (
        is_float32_on_cpu(x)
        and is_exact([layer], [nn.Linear], x.device)
        and onednn_suits(x, layer.weight)
    ):
        out = onednn_linear(x.flatten(0, -2), layer.weight, layer.bias)
        return out.view(*x.shape[:-1], -1)
    return layer(x)


class Mlp(BaseModule):
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
