"""Linear layers and the MLP of a block."""

from typing import Optional

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from .compat import autocast_dtype, is_autocast_enabled
from .kernels import watcher
from .kernels.mlp import CHUNK, chunks, mlp
from .kernels.onednn import OneDNNLinear, is_float32_on_cpu, onednn_suits


class Linear(nn.Linear):
    """``nn.Linear``, computed in the way that is the fastest for its input."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        if onednn_suits(x, self.weight):
            out = OneDNNLinear.apply(x.flatten(0, -2), self.weight, self.bias)
            return out.view(*x.shape[:-1], -1)
        dtype = joint_cast_dtype(x)
        if dtype and type(self.weight) is type(self.bias) is nn.Parameter:
            # In one launch; autocast casts each by itself.
            cast = [torch.empty_like(one, dtype=dtype) for one in (self.weight, self.bias)]
            torch._foreach_copy_(cast, [self.weight, self.bias])
            return F.linear(x, *cast)
        return super().forward(x)


def joint_cast_dtype(x: Tensor) -> Optional[torch.dtype]:
    """The type to which a layer casts its weight and bias together, or None: in training, where
    that would need a Python autograd function, autocast does it."""
    if x.device.type != 'cuda' or torch.is_grad_enabled() or watcher():
        return None
    return cast_dtype(x)


def cast_dtype(x: Tensor) -> Optional[torch.dtype]:
    """The type to which autocast casts a tensor that is multiplied, or None."""
    device = x.device.type
    if x.dtype == torch.float64 or device not in ('cpu', 'cuda') or not is_autocast_enabled(device):
        return None
    return autocast_dtype(device)


class Mlp(BaseModule):
    """Linear, GELU, linear, with dropout after each linear layer.

    Args:
        channels (int): channels in and out.
        hidden (int): channels between.
        drop_rate (float): dropout while training.
    """

    def __init__(self, channels: int, hidden: int, drop_rate: float = 0.0):
        super().__init__()
        self.fc1 = Linear(channels, hidden)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, channels)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to the same shape."""
        if x.device.type == 'cpu' and self.is_plain():
            tokens = x.flatten(0, -2)
            if is_float32_on_cpu(x):
                return mlp(
                    tokens, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
                ).view(x.shape)
            if not watcher() and not torch.is_grad_enabled():
                # A part at a time stays in the cache.
                parts = [
                    self.fc2(self.act(self.fc1(tokens[rows])))
                    for rows in chunks(len(tokens), self.fc1.out_features, CHUNK)
                ]
                return torch.cat(parts).view(x.shape)
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))

    def is_plain(self) -> bool:
        """Whether nothing has to see the hidden layer: no dropout, no layer of somebody else's in
        the place of ours, no hook."""
        return not (self.training and self.drop.p) and all(
            type(layer) is Linear and not layer._forward_hooks and not layer._forward_pre_hooks
            for layer in (self.fc1, self.fc2)
        )
