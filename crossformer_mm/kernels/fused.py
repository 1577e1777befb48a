"""Group attention on a GPU, forward and backward, without moving tokens.

The members of a group are located by arithmetic, from the rules of rows and columns: no mask and no
matrix of all pairs is stored. Input, output and one number per position and head are saved for the
backward pass.

Logits, weights and all sums are in float32; weights and their gradients are
rounded to the type of ``qkv`` to be multiplied, and float32 is multiplied as
PyTorch multiplies matrices: in full, unless TF32 is allowed (and a head has at
most 32 channels). The order of all sums is fixed: on one device the same inputs give the same bits,
in both passes, with and without ``torch.use_deterministic_algorithms``.

The kernels are in :mod:`.fused_triton`, which is imported at the first use: Triton is optional.
With Triton's interpreter (TRITON_INTERPRET=1 in the environment) they also run on the CPU, for
tests.
"""

import functools
import importlib.util
from typing import Any, Callable, Tuple

import torch
from torch import Tensor

from ..compat import TRITON, missing_torch
from ..grouping import AxisRule
from .call import Call, why_not_compiled
from .operator import map_operator

HEAD_DIM = 64  # at most: a block of larger heads does not fit in a multiprocessor's registers


def why_not(call: Call) -> str:
    """Reason why a call is unsupported, or ''."""
    lead = "it does not know the shifted groups of lda='shifted'" if call.has_lead else ''
    return (
        missing_torch(TRITON)
        or lead
        or why_not_compiled(call, HEAD_DIM)
        or why_no_triton(call.device)
    )


@functools.cache
def has_triton() -> bool:
    """Check for the package triton; cached, because each block of each forward asks."""
    return importlib.util.find_spec('triton') is not None


def why_no_triton(device: torch.device) -> str:
    """Reason why Triton kernels cannot run on a device, or ''."""
    if not has_triton():
        return 'it needs the package triton, which is not installed'
    if device.type == 'cuda' and torch.cuda.is_available():
        if torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0):
            return ''
        return (
            'it needs an NVIDIA GPU of compute capability 8.0 or more, but '
            f'{device} is {torch.cuda.get_device_name(device)}'
        )
    if device.type == 'cpu':
        from . import fused_triton

        if fused_triton.INTERPRETED:
            return ''
    return (
        'it works on CUDA devices (on the CPU only in Triton\'s interpreter, for which '
        f'TRITON_INTERPRET=1 is set before Python starts), but got tensors on {device}'
    )


# Makes torch.compile call it instead of tracing it. `torch.compiler.assume_constant_result` sets
# the same attribute, but importing the compiler takes a second.
vars(why_no_triton)['_dynamo_marked_constant'] = True


def triton_kernels() -> Any:
    """:mod:`.fused_triton`, which is imported, and Triton with it, at the first call."""
    return importlib.import_module('.fused_triton', __package__)


def forward(
    qkv: Tensor, table: Tensor, rows: AxisRule, columns: AxisRule, num_heads: int, scale: float
) -> Tuple[Tensor, Tensor]:
    """Call :func:`.fused_triton.forward`."""
    return triton_kernels().forward(qkv, table, rows, columns, num_heads, scale)


def backward(
    grad_out: Tensor, qkv: Tensor, table: Tensor, out: Tensor, norms: Tensor, *arguments
) -> Tuple[Tensor, Tensor]:
    """Call :func:`.fused_triton.backward`, except for a batch of no images."""
    if not qkv.numel():  # a batch of no images
        return torch.empty_like(qkv), torch.zeros_like(table)
    return triton_kernels().backward(grad_out, qkv, table, out, norms, *arguments)


attend: Callable[..., Tensor] = map_operator(
    'fused_attention', lambda *args: forward(*args), lambda *args: backward(*args)
)
