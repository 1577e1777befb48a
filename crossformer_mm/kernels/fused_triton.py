"""Fused attention by Triton kernels: :mod:`.triton_forward` and :mod:`.triton_backward`."""

from .triton_backward import backward
from .triton_forward import forward
from .triton_launch import INTERPRETED

__all__ = ['INTERPRETED', 'backward', 'forward']
