"""Properties of a call that decide which kernels support it."""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from ..exact import CAPTURES, TRANSFORMS, interception
from ..grouping import AxisRule, fit_rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of the C++ enum DType
SMALL = 64  # members of a group that is one block, for which the backward pass is one kernel


class Call(NamedTuple):
    """One attention over a map.

    Args:
        device, dtype: of queries, keys and values.
        head_dim (int): channels of a head.
        dropout (float): dropout of attention weights.
        has_lead (bool): the first group of an axis begins before the axis does.
        interception (str): result of :func:`crossformer_mm.exact.interception`.
        members (int, optional): of the largest group. None: of any, as in a graph for all sizes.
        trains (bool): there may be a backward pass.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    head_dim: int = 32
    dropout: float = 0.0
    has_lead: bool = False
    interception: str = ''
    members: Optional[int] = None
    trains: bool = True

    @classmethod
    def of(
        cls, qkv: Tensor, rows: AxisRule, columns: AxisRule, num_heads: int, dropout: float
    ) -> 'Call':
        follower = interception()
        return cls(
            qkv.device,
            qkv.dtype,
            qkv.shape[-1] // 3 // num_heads,
            dropout,
            bool(rows.lead or columns.lead),
            follower,
            None if follower in CAPTURES else largest_group(qkv, rows, columns),
            torch.is_grad_enabled(),
        )


def largest_group(qkv: Tensor, rows: AxisRule, columns: AxisRule) -> int:
    """Count the members of the largest group of a map (B, H, W, C)."""
    return fit_rule(qkv.shape[1], rows).size * fit_rule(qkv.shape[2], columns).size


def why_not_compiled(call: Call, head_dim: int) -> str:
    """Reason why a call is unsupported by compiled kernels for heads of ``head_dim``, or ''."""
    if call.interception == 'export':
        return 'an exporter cannot write it down'
    if call.interception in TRANSFORMS:
        return f'it has no rule for {call.interception}'
    if call.dtype not in DTYPES:
        return f'it takes {", ".join(map(str, DTYPES))}, but got {call.dtype}'
    if call.head_dim > head_dim:
        return f'it takes heads of at most {head_dim} channels, but they have {call.head_dim}'
    if call.dropout:
        return f'it has no dropout of attention weights, but attn_drop_rate is {call.dropout}'
    return ''
