"""Ways to compute attention inside groups, linear layers and MLPs, and the rules that choose one.

Attention:

======= ================== =====================================================
path    where              what
======= ================== =====================================================
plain   anywhere           the definition, :mod:`.plain`
tiled   CPU, no dropout    the same values in memory linear in the image's area,
                           several times faster in training, :mod:`.tiled`
======= ================== =====================================================

Linear layers and MLPs: PyTorch's, but on the CPU in float32 those of :mod:`.onednn`.
"""
from typing import Optional, Sequence

import torch
from torch import Tensor

from ..grouping import Segment
from .onednn import onednn_linear, onednn_mlp
from .plain import plain_attention
from .tiled import tiled_attention

__all__ = ['ATTENTION_PATHS', 'check_path', 'choose_path', 'group_attention', 'is_traced',
           'onednn_linear', 'onednn_mlp', 'onednn_suits', 'plain_attention', 'tiled_attention']

ATTENTION_PATHS = ('plain', 'tiled')


def check_path(path: Optional[str]) -> None:
    """Raise a ValueError unless it is None or a path's name."""
    if path is not None and path not in ATTENTION_PATHS:
        raise ValueError(f'CrossFormer: attention_path must be None (chosen by device and mode) or '
                         f"one of {', '.join(map(repr, ATTENTION_PATHS))}, got {path!r}.")


def choose_path(device: torch.device, dropout: float) -> str:
    """The path for tensors on a device, in the present mode.

    A compiler or tracer gets the plain path: it cannot look into the other,
    and has its own ways to make the plain one fast.
    """
    return 'tiled' if device.type == 'cpu' and not dropout and not is_traced() else 'plain'


def is_traced() -> bool:
    """Whether a compiler or tracer follows what is computed."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.jit.is_scripting()


def onednn_suits(x: Tensor, weight: Tensor) -> bool:
    """Whether :mod:`.onednn` is to be used: float32 on the CPU, no autocast, no tracer.

    Nor for few tokens in training: oneDNN lays the weight out in its own way first,
    for each of three products. ``torch.backends.mkldnn.flags(enabled=False)`` switches
    it off, as it does for convolutions.
    """
    tokens = x.numel() // x.shape[-1]
    few = 400 if weight.numel() > 2**20 else 128
    return (x.device.type == 'cpu' and x.dtype == torch.float32 and not is_traced()
            and not torch.is_autocast_enabled('cpu') and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled
            and (tokens >= few or not torch.is_grad_enabled()))


def group_attention(qkv: Tensor, table: Tensor, segments: Sequence[Segment], num_heads: int,
                    scale: float, dropout: float = 0., path: Optional[str] = None) -> Tensor:
    """Attention inside the groups of a map, see :func:`.plain.plain_attention`.

    Args:
        path (str, optional): one of ``ATTENTION_PATHS``, for study. None: as
            :func:`choose_path` says.

    Raises:
        ValueError: the path does not exist, or cannot do what is asked.
    """
    check_path(path)
    if path == 'tiled' and (dropout or qkv.device.type != 'cpu'):
        raise ValueError("CrossFormer: attention_path='tiled' works on the CPU and without dropout "
                         f'of attention weights, but got tensors on {qkv.device} and '
                         f'attn_drop_rate={dropout}. Leave attention_path out, or choose '
                         "'plain'.")
    if (path or choose_path(qkv.device, dropout)) == 'tiled':
        return tiled_attention(qkv, table, segments, num_heads, scale)
    return plain_attention(qkv, table, segments, num_heads, scale, dropout)
