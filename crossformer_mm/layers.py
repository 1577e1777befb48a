"""Linear layers, convolutions and the MLP of a block, each in the fastest way that suits."""

from typing import List, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autocast import JointCast, cast_dtype, copies, joint_cast_dtype, widened, widens
from .exact import is_exact
from .kernels.convolution import convolve_on_cpu
from .kernels.mlp import mlp, mlp_suits
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
    if widens([layer], nn.Linear, x):
        return widened(layer, x)
    # In one launch; autocast casts each by itself. In training a Python autograd function for two
    # tensors would take longer than that.
    dtype = None if torch.is_grad_enabled() else joint_cast_dtype(x)
    if dtype and is_exact([layer], [nn.Linear], x.device) and layer.bias is not None:
        return F.linear(x, *copies((layer.weight, layer.bias), dtype))
    return layer(x)


def convolve(layers: Sequence[nn.Module], x: Tensor) -> List[Tensor]:
    """Apply convolutions to one map, computed faster where the results are the same.

    Under autocast on a GPU their parameters are cast in one launch, and so are the gradients.

    Args:
        layers (Sequence[nn.Module]): of ``nn.Conv2d``, or what users replaced them by.
        x (Tensor): (B, in_channels, H, W).
    """
    kinds = [nn.Conv2d] * len(layers)
    if is_float32_on_cpu(x):
        if is_exact(layers, kinds, x.device):
            return convolve_on_cpu(layers, x)
        return [layer(x) for layer in layers]
    if len(layers) > 1:  # once: autocast would do it for each
        x = x.to(cast_dtype(x) or x.dtype)
    if widens(layers, nn.Conv2d, x):
        return [widened(layer, x) for layer in layers]
    dtype = joint_cast_dtype(x) if len(layers) > 1 else None  # see linear()
    if dtype and is_exact(layers, kinds, x.device):
        cast = JointCast.apply(dtype, *[one for conv in layers for one in (conv.weight, conv.bias)])
        return [conv._conv_forward(x, *pair) for conv, *pair in zip(layers, cast[::2], cast[1::2])]
    return [layer(x) for layer in layers]


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
        """Check that :func:`.kernels.mlp.mlp` equals the layers, and is better."""
        return (
            is_float32_on_cpu(x)
            and is_exact(
                (self.fc1, self.act, self.fc2, self.drop),
                (nn.Linear, nn.GELU, nn.Linear, nn.Dropout),
                x.device,
            )
            and self.act.approximate == 'none'
            and not (self.drop.training and self.drop.p)
            and mlp_suits(x, self.fc1.out_features)
        )
