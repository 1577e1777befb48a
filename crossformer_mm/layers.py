"""Linear layers and the MLP of a block."""

from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compat import autocast_dtype, is_autocast_enabled, multiplies_bfloat16
from .exact import is_exact
from .kernels.convolution import blocks_suit, convolve_blocks, convolve_windows, windows_suit
from .kernels.mlp import SMALL, mlp
from .kernels.onednn import is_float32_on_cpu, is_onednn_on, onednn_linear, onednn_suits


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
    """Apply convolutions to one map; their parameters are cast in one launch, their gradients too.

    Args:
        layers (Sequence[nn.Module]): of ``nn.Conv2d``, or what users replaced them by.
        x (Tensor): (B, in_channels, H, W).
    """
    if widens(layers, nn.Conv2d, x):
        return [widened(layer, x) for layer in layers]
    dtype = joint_cast_dtype(x) if len(layers) > 1 else None  # see linear()
    if not dtype or not is_exact(layers, [nn.Conv2d] * len(layers), x.device):
        on_cpu = is_float32_on_cpu(x) and is_exact(layers, [nn.Conv2d] * len(layers), x.device)
        return convolve_on_cpu(layers, x) if on_cpu else [layer(x) for layer in layers]
    cast = JointCast.apply(dtype, *[one for conv in layers for one in (conv.weight, conv.bias)])
    return [conv._conv_forward(x, *pair) for conv, *pair in zip(layers, cast[::2], cast[1::2])]


def widens(layers: Sequence[nn.Module], kind: type, x: Tensor) -> bool:
    """Check that autocast casts layers to bfloat16, and this CPU has no instructions for it."""
    return (
        x.device.type == 'cpu'
        and cast_dtype(x) == torch.bfloat16
        and is_exact(layers, [kind] * len(layers), x.device)
        and not multiplies_bfloat16()
    )


def widened(layer: nn.Module, x: Tensor) -> Tensor:
    """Return ``layer(x)`` in bfloat16, as autocast does, computed in float32."""
    with torch.autocast('cpu', enabled=False):
        return layer(x.float()).bfloat16()


def convolve_on_cpu(convs: Sequence[nn.Conv2d], x: Tensor) -> List[Tensor]:
    """Apply unmodified convolutions to one map in float32 on the CPU."""
    if is_onednn_on():
        # Channels last, the outputs are joined as the blocks take them, without a copy. In training
        # oneDNN has no fast code for that layout of an image and a large kernel.
        if not torch.is_grad_enabled():
            x = x.contiguous(memory_format=torch.channels_last)
        elif x.shape[1] <= 4:
            x = x.contiguous()
    in_blocks = [conv for conv in convs if blocks_suit(x, conv)]
    outs = dict(zip(in_blocks, convolve_blocks(x, in_blocks)))
    for conv in convs:
        if conv not in outs:
            outs[conv] = convolve_windows(x, conv) if windows_suit(x, conv) else conv(x)
    return [outs[conv] for conv in convs]


class JointCast(torch.autograd.Function):
    """Cast tensors to a type, and their gradients to float32; None stays None."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Optional[Tensor]):
        cast = copies(tensors, dtype)
        ctx.set_materialize_grads(False)
        frozen = [one for one, needed in zip(cast, ctx.needs_input_grad[1:]) if not needed]
        ctx.mark_non_differentiable(*[one for one in frozen if one is not None])
        return cast

    @staticmethod
    def backward(ctx, *grads: Optional[Tensor]):
        if torch.is_grad_enabled():  # create_graph=True
            return None, *(None if grad is None else grad.float() for grad in grads)
        return None, *copies(grads, torch.float32)


def copies(tensors: Sequence[Optional[Tensor]], dtype: torch.dtype) -> Tuple[Optional[Tensor], ...]:
    """Copy tensors to a type in one launch; None stays None."""
    out = tuple([None if one is None else torch.empty_like(one, dtype=dtype) for one in tensors])
    pairs = [(one, source) for one, source in zip(out, tensors) if source is not None]
    if pairs:
        torch._foreach_copy_(*map(list, zip(*pairs)))
    return out


def joint_cast_dtype(x: Tensor) -> Optional[torch.dtype]:
    """Return the type to which layers cast their parameters in one launch, or None."""
    return cast_dtype(x) if x.device.type == 'cuda' else None


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
