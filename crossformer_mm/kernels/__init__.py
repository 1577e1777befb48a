"""Ways to compute attention inside groups, linear layers and MLPs, and the rules that choose one.

Attention:

======= ================== =====================================================
path    where              what
======= ================== =====================================================
plain   anywhere           the definition, :mod:`.plain`
tiled   CPU, no dropout    the same values in memory linear in the image's area,
                           several times faster in training, :mod:`.tiled`
avx512  likewise, bfloat16 the forward pass of tiled in one compiled kernel, for heads
                           of 32 channels, :mod:`.avx512`
fused   CUDA with Triton,  the same values in memory linear in the image's area, in
        no dropout         one kernel that leaves tokens where they are, :mod:`.fused`
======= ================== =====================================================

What torch.compile on the CPU gets is :mod:`.tiled_op`, tiled or avx512 as one operator.

Linear layers and MLPs: PyTorch's, but on the CPU in float32 those of :mod:`.onednn`.
"""
from typing import Optional, Sequence

import torch
from torch import Tensor

from ..compat import is_autocast_enabled, is_compiling, is_exporting
from ..grouping import AxisRule, Segment
from .avx512 import why_not_avx512
from .fused import agrees_with_plain, fused_attention, why_not_fused
from .onednn import onednn_linear, onednn_mlp
from .plain import plain_attention
from .tiled import tiled_attention
from .tiled_op import tiled_map_attention

__all__ = ['ATTENTION_PATHS', 'check_path', 'choose_path', 'fused_attention', 'group_attention',
           'is_traced', 'map_attention', 'onednn_linear', 'onednn_mlp', 'onednn_suits',
           'plain_attention', 'tiled_attention', 'works_on_maps']

ATTENTION_PATHS = ('plain', 'tiled', 'avx512', 'fused')


def check_path(path: Optional[str]) -> None:
    """Raise a ValueError unless it is None or a path's name."""
    if path is not None and path not in ATTENTION_PATHS:
        raise ValueError(f'CrossFormer: attention_path must be None (chosen by device and mode) or '
                         f"one of {', '.join(map(repr, ATTENTION_PATHS))}, got {path!r}.")


def choose_path(device: torch.device, dropout: float, dtype: torch.dtype = torch.float32,
                head_dim: int = 32) -> str:
    """The path for tensors on a device, in the present mode.

    A tracer or exporter gets the plain path, which every machine has.
    """
    if torch.jit.is_tracing() or torch.jit.is_scripting() or is_exporting():
        return 'plain'
    if device.type == 'cpu' and not dropout:
        return 'tiled' if why_not_avx512(dtype, head_dim) else 'avx512'
    fused = (device.type == 'cuda' and not why_not_fused(device, dtype, head_dim, dropout)
             and agrees_with_plain(device))
    return 'fused' if fused else 'plain'


def why_not(path: str, device: torch.device, dtype: torch.dtype, head_dim: int,
            dropout: float) -> str:
    """What is in the way of a path, or nothing."""
    if path == 'fused':
        return why_not_fused(device, dtype, head_dim, dropout)
    if path == 'plain':
        return ''
    if device.type != 'cpu':
        return f'it works on the CPU, but got tensors on {device}'
    if dropout:
        return f'it has no dropout of attention weights, but attn_drop_rate is {dropout}'
    return why_not_avx512(dtype, head_dim) if path == 'avx512' else ''


def settle_path(path: Optional[str], device: torch.device, dtype: torch.dtype, head_dim: int,
                dropout: float) -> str:
    """The path that is given, or else the one to choose.

    Raises:
        ValueError: the path does not exist, or cannot do what is asked.
    """
    if path is None:
        return choose_path(device, dropout, dtype, head_dim)
    check_path(path)
    reason = why_not(path, device, dtype, head_dim, dropout)
    if reason:
        raise ValueError(f"CrossFormer: attention_path={path!r} cannot work here: {reason}. Leave "
                         "attention_path out, or choose 'plain'.")
    return path


def works_on_maps(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float,
                  path: Optional[str] = None) -> bool:
    """Whether the path, given or chosen, takes whole maps: see :func:`map_attention`.

    The fused one always does; those of the CPU do so for a compiler.

    Raises:
        ValueError: 'fused' is given and cannot do what is asked.
    """
    if path == 'fused' or (path is None and device.type == 'cuda'):
        return settle_path(path, device, dtype, head_dim, dropout) == 'fused'
    return (path != 'plain' and device.type == 'cpu' and not dropout
            and is_compiling() and not is_exporting())


def is_traced() -> bool:
    """Whether a compiler or tracer follows what is computed."""
    return is_compiling() or torch.jit.is_tracing() or torch.jit.is_scripting()


def onednn_suits(x: Tensor, weight: Tensor) -> bool:
    """Whether :mod:`.onednn` is to be used: float32 on the CPU, no autocast, no tracer.

    Nor for few tokens in training: oneDNN lays the weight out in its own way first,
    for each of three products. ``torch.backends.mkldnn.flags(enabled=False)`` switches
    it off, as it does for convolutions.
    """
    tokens = x.numel() // x.shape[-1]
    few = 400 if weight.numel() > 2**20 else 128
    return (x.device.type == 'cpu' and x.dtype == torch.float32 and not is_traced()
            and not is_autocast_enabled('cpu') and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled
            and (tokens >= few or not torch.is_grad_enabled()))


def map_attention(qkv: Tensor, table: Tensor, rows: AxisRule, columns: AxisRule, num_heads: int,
                  scale: float, path: Optional[str] = None) -> Tensor:
    """Attention inside the groups of maps as they lie, see :func:`.fused.fused_attention`.

    Args:
        path (str, optional): 'fused', 'tiled' or 'avx512', for study. None: as
            :func:`choose_path` says.
    """
    head_dim = qkv.shape[3] // 3 // num_heads
    path = settle_path(path, qkv.device, qkv.dtype, head_dim, 0.)
    if path == 'fused':
        return fused_attention(qkv, table, rows, columns, num_heads, scale)
    return tiled_map_attention(qkv, table, rows, columns, num_heads, scale, path == 'avx512')


def group_attention(qkv: Tensor, table: Tensor, segments: Sequence[Segment], num_heads: int,
                    scale: float, dropout: float = 0., path: Optional[str] = None) -> Tensor:
    """Attention inside groups that are lined up, see :func:`.plain.plain_attention`.

    Args:
        path (str, optional): 'plain', 'tiled' or 'avx512', for study. None: as
            :func:`choose_path` says, but 'plain' in place of 'fused', and for a compiler.

    Raises:
        ValueError: the path does not exist, or cannot do what is asked.
    """
    if path == 'fused':
        raise ValueError("CrossFormer: attention_path='fused' works on maps, not on tokens that "
                         'are lined up: call fused_attention.')
    head_dim = qkv.shape[1] // 3 // num_heads
    path = settle_path(path, qkv.device, qkv.dtype, head_dim, dropout)
    if path in ('tiled', 'avx512') and not is_traced():
        return tiled_attention(qkv, table, segments, num_heads, scale, avx512=path == 'avx512')
    return plain_attention(qkv, table, segments, num_heads, scale, dropout)
