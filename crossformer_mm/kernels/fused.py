"""Group attention on a GPU, forward and backward, on the map as it lies.

Groups are found by arithmetic, from the rules of rows and columns: no token is
moved, no mask or matrix of all pairs is stored. What is kept for the backward
pass is input, output and one number per position and head.

Logits, weights and all sums are in float32; weights and their gradients are
rounded to the type of ``qkv`` to be multiplied, and float32 is multiplied as
PyTorch multiplies matrices: in full, unless TF32 is allowed (and a head has at
most 32 channels). Nothing is summed in an order left to chance: on one device
the same inputs give the same bits, in both passes, whatever
``torch.use_deterministic_algorithms`` says.

The kernels are in :mod:`.fused_triton`, which is imported when first used:
this package neither needs Triton nor waits for it. Where Triton's interpreter is
on (TRITON_INTERPRET=1 in the environment), they run on the CPU, too, for tests.
"""

import functools
import importlib.util
import warnings
from typing import Callable

import torch
from torch import Tensor

from ..compat import missing_torch
from ..grouping import AxisRule
from . import plain
from .call import Call, why_not_compiled
from .operator import map_operator

HEAD_DIM = 64  # at most; of larger heads a block does not fit in a multiprocessor's registers


def why_not(call: Call) -> str:
    """What is in the way of this path, or nothing."""
    # 2.4: whose Triton is the first to have all that the kernels use
    lead = "it does not know the shifted groups of lda='shifted'" if call.has_lead else ''
    return (
        missing_torch('2.4')
        or lead
        or why_not_compiled(call, HEAD_DIM)
        or why_no_triton(call.device)
    )


@functools.cache
def has_triton() -> bool:
    """Asked by each block of each forward, and answered by a search of the disk: once."""
    return importlib.util.find_spec('triton') is not None


def why_no_triton(device: torch.device) -> str:
    """What is in the way of running Triton kernels on a device, or nothing."""
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


def agrees_with_plain(device: torch.device) -> bool:
    """Whether a small case on a device has the values and gradients of the plain path.

    Kernels are compiled on the user's machine, by the versions it has, for its GPU: this
    stands between a fault of theirs and a training that learns from wrong numbers. Once
    for each device; a warning says what is wrong.
    """
    return _agrees_with_plain(str(device))


@functools.cache
def _agrees_with_plain(device: str) -> bool:
    rules = AxisRule(9, 2), AxisRule(8, 2)  # ragged, and of more than 64 members
    heads, channels, sides = 2, 64, (17, 15)

    def leaf(*shape: int) -> Tensor:  # no random numbers, which a user's seed may be for
        count = torch.Size(shape).numel()
        return torch.arange(count, device=device).mul(2.4).sin().view(shape).requires_grad_()

    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(torch.device(device).type, enabled=False),
        ):
            qkv, table = leaf(1, *sides, 3 * channels), leaf(heads, 17, 15)
            plain_out = plain.attend(qkv, table, *rules, heads, 0.2)
            fused_out = attend(qkv, table, *rules, heads, 0.2)
            weights = leaf(1, *sides, channels).detach()
            results = [
                (out, *torch.autograd.grad((out * weights).sum(), (qkv, table)))
                for out in (fused_out, plain_out)
            ]
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results))
        fault = '' if worst < 1e-2 else f'it is wrong by {worst:.2g} of the largest value'
    except Exception as error:  # of a compiler, a driver, a launch
        fault = f'{type(error).__name__}: {error}'
    if fault:
        warnings.warn(
            f'CrossFormer: the fused attention does not work on {device}, the plain one '
            f'is used ({fault}).'
        )
    return not fault


# torch.compile is to call these, not to look into them. `torch.compiler.assume_constant_result`
# says so by the same attribute, but takes a second to import the compiler.
for constant in (why_no_triton, agrees_with_plain):
    vars(constant)['_dynamo_marked_constant'] = True


def from_triton(name: str) -> Callable:
    """A function of :mod:`.fused_triton`, which is imported, and Triton with it, at the call."""
    return lambda *args: getattr(importlib.import_module('.fused_triton', __package__), name)(*args)


attend: Callable[..., Tensor] = map_operator(
    'fused_attention', from_triton('forward'), from_triton('backward')
)
