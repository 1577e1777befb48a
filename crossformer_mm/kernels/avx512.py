"""Attention inside groups in bfloat16 on the CPU, by instructions for pairs of bfloat16.

PyTorch's fused attention on the CPU gains nothing from bfloat16, and its products of
matrices store the logits of many pairs, rounded to bfloat16, for each next step to read.
The kernel in ``avx512.cpp``, compiled when this package is installed, keeps them in
registers and the first level cache, in float32.

Forward only: the backward pass is that of :mod:`.tiled`.
"""
import torch
from torch import Tensor

from ..grouping import Segment

try:
    from . import _avx512
    MISSING = '' if _avx512.supported() else 'this processor has no AVX512_BF16'
except ImportError as error:  # there was no compiler, or it is not one for x86-64
    MISSING = f'it was not compiled when crossformer_mm was installed ({error})'

HEAD_DIM = 32  # that of every published model


def why_not_avx512(dtype: torch.dtype, head_dim: int) -> str:
    """What is in the way of :func:`attend_avx512` on the CPU, or nothing."""
    if dtype != torch.bfloat16:
        return f'it takes bfloat16, but got {dtype}'
    if head_dim != HEAD_DIM:
        return f'it takes heads of {HEAD_DIM} channels, but they have {head_dim}'
    return MISSING


def attend_avx512(qkv: Tensor, out: Tensor, table: Tensor, segment: Segment, num_heads: int,
                  scale: float) -> None:
    """Write the attention of one segment into ``out``.

    Logits, their exponentials and all sums are in float32; weights are rounded to
    bfloat16 to be multiplied with the values.

    Args:
        qkv (Tensor): (groups*N, 3*heads*32) in bfloat16.
        out (Tensor): (groups*N, heads*32) in bfloat16, contiguous.
        table (Tensor): (heads, 2*height-1, 2*width-1), flipped: of key - query.
        segment (Segment): how many groups, and the sides of each.
        num_heads (int): heads.
        scale (float): factor on ``q @ k``.
    """
    qkv, table = qkv.contiguous(), table.float().contiguous()
    _avx512.attend(qkv.data_ptr(), out.data_ptr(), table.data_ptr(), segment.groups, num_heads,
                   segment.height, segment.width, scale, torch.get_num_threads())
