"""Ways to compute attention inside groups, linear layers and MLPs, and the rules that choose one.

Attention:

======= ================== =====================================================
path    where              what
======= ================== =====================================================
plain   anywhere           the definition, :mod:`.plain`
tiled   CPU, no dropout    the same values in memory linear in the image's area,
                           several times faster in training, :mod:`.tiled`
fused   CUDA with Triton,  the same values in memory linear in the image's area, in
        no dropout         one kernel that leaves tokens where they are, :mod:`.fused`
======= ================== =====================================================

Linear layers and MLPs: PyTorch's, but on the CPU in float32 those of :mod:`.onednn`.
"""
from typing import Optional, Sequence

import torch
from torch import Tensor

from ..grouping import Segment
from .fused import agrees_with_plain, fused_attention, why_not_fused
from .onednn import onednn_linear, onednn_mlp
from .plain import plain_attention
from .tiled import tiled_attention

__all__ = ['ATTENTION_PATHS', 'check_path', 'choose_path', 'fused_attention', 'group_attention',
           'is_fused', 'is_traced', 'onednn_linear', 'onednn_mlp', 'onednn_suits',
           'plain_attention', 'tiled_attention']

ATTENTION_PATHS = ('plain', 'tiled', 'fused')


def check_path(path: Optional[str]) -> None:
    """Raise a ValueError unless it is None or a path's name."""
    if path is not None and path not in ATTENTION_PATHS:
        raise ValueError(f'CrossFormer: attention_path must be None (chosen by device and mode) or '
                         f"one of {', '.join(map(repr, ATTENTION_PATHS))}, got {path!r}.")


def choose_path(device: torch.device, dropout: float, dtype: torch.dtype = torch.float32,
                head_dim: int = 32) -> str:
    """The path for tensors on a device, in the present mode.

    A tracer or exporter gets the plain path, which every machine has. So does a
    compiler on the CPU: it cannot look into the tiled path, and has its own ways
    to make the plain one fast.
    """
    if device.type == 'cpu' and not dropout and not is_traced():
        return 'tiled'
    exported = torch.jit.is_tracing() or torch.jit.is_scripting() or is_exporting()
    fused = (device.type == 'cuda' and not exported
             and not why_not_fused(device, dtype, head_dim, dropout) and agrees_with_plain(device))
    return 'fused' if fused else 'plain'


def is_exporting() -> bool:
    exporting = getattr(torch.compiler, 'is_exporting', None)  # since PyTorch 2.7
    return exporting is not None and exporting()


def is_fused(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float,
             path: Optional[str] = None) -> bool:
    """Whether the path, given or chosen, is the fused one, which takes whole maps.

    Raises:
        ValueError: it is given and cannot do what is asked.
    """
    if path is None:
        return choose_path(device, dropout, dtype, head_dim) == 'fused'
    reason = why_not_fused(device, dtype, head_dim, dropout) if path == 'fused' else ''
    if reason:
        raise ValueError(f"CrossFormer: attention_path='fused' cannot work here: {reason}. Leave "
                         "attention_path out, or choose 'plain'.")
    return path == 'fused'


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
    """Attention inside groups that are lined up, see :func:`.plain.plain_attention`.

    Args:
        path (str, optional): 'plain' or 'tiled', for study. None: 'tiled' where
            :func:`choose_path` says so, else 'plain'.

    Raises:
        ValueError: the path does not exist, or cannot do what is asked.
    """
    check_path(path)
    if path == 'fused':
        raise ValueError("CrossFormer: attention_path='fused' works on maps, not on tokens that "
                         'are lined up: call fused_attention.')
    if path == 'tiled' and (dropout or qkv.device.type != 'cpu'):
        raise ValueError("CrossFormer: attention_path='tiled' works on the CPU and without dropout "
                         f'of attention weights, but got tensors on {qkv.device} and '
                         f'attn_drop_rate={dropout}. Leave attention_path out, or choose '
                         "'plain'.")
    if (path or choose_path(qkv.device, dropout)) == 'tiled':
        return tiled_attention(qkv, table, segments, num_heads, scale)
    return plain_attention(qkv, table, segments, num_heads, scale, dropout)
