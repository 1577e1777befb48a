"""Autocast of unmodified layers: casts of several parameters at once, and bfloat16 in float32."""

from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .compat import autocast_dtype, is_autocast_enabled, multiplies_bfloat16
from .exact import is_exact


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
