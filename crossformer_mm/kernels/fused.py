"""Group attention on a GPU, forward and backward, on the map as it lies.

Groups are found by arithmetic, from the rules of rows and columns: no token is
moved, no mask or matrix of all pairs is stored. What is kept for the backward
pass is input, output and one number per position and head.

The kernels are in :mod:`.fused_triton`, which is imported when first used:
this package neither needs Triton nor waits for it.
"""
import functools
import importlib.util
import warnings
from typing import Tuple

import torch
from torch import Tensor

from ..compat import define_operator, missing_torch
from ..grouping import AxisRule, group_map
from .plain import plain_attention

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIM = 64  # at most; of larger heads a block does not fit in a multiprocessor's registers


def fused_attention(qkv: Tensor, table: Tensor, rows: AxisRule, columns: AxisRule, num_heads: int,
                    scale: float) -> Tensor:
    """Attention inside the groups of a batch of maps, each position staying where it is.

    Equals, for ``grouping = group_map(B, H, W, rows, columns)``,

        tokens = qkv.flatten(0, 2)[grouping.order]
        out = plain_attention(tokens, table, grouping.segments, num_heads, scale)
        out = out[grouping.inverse].view(B, H, W, -1)

    in value and in the gradients of ``qkv`` and ``table``. Logits, weights and
    all sums are in float32; weights and their gradients are rounded to the type
    of ``qkv`` to be multiplied, and float32 is multiplied as PyTorch multiplies
    matrices: in full, unless TF32 is allowed (and d is at most 32).
    Differentiable once.

    Nothing is summed in an order left to chance: on one device the same inputs
    give the same bits, in both passes, whatever
    ``torch.use_deterministic_algorithms`` says.

    Args:
        qkv (Tensor): (B, H, W, 3*heads*d) in float32, float16 or bfloat16, with
            d at most 64, on a CUDA device (or, for tests, on the CPU when
            TRITON_INTERPRET=1 is in the environment).
        table (Tensor): (heads, 2*h-1, 2*w-1), the bias of every offset, for
            groups of at least the members that the rules give.
        rows, columns (AxisRule): which positions form a group; of no lead.
        num_heads (int): heads.
        scale (float): factor on ``q @ k``.

    Returns:
        Tensor: (B, H, W, heads*d) in the type of ``qkv``.
    """
    maps = qkv.shape[:3]
    out, _ = _attend(qkv.flatten(0, 2), table, *maps, *rows[:2], *columns[:2], num_heads, scale)
    return out.view(*maps, -1)


def why_not_fused(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float) -> str:
    """What is in the way of :func:`fused_attention`, or nothing."""
    if dropout:
        return f'it has no dropout of attention weights, but attn_drop_rate is {dropout}'
    if head_dim > HEAD_DIM:
        return f'it takes heads of at most {HEAD_DIM} channels, but they have {head_dim}'
    if dtype not in DTYPES:
        return f'it takes float32, float16 and bfloat16, but got {dtype}'
    return why_no_triton(device)


@functools.lru_cache(maxsize=None)
def has_triton() -> bool:
    """Asked by each block of each forward, and answered by a search of the disk: once."""
    return importlib.util.find_spec('triton') is not None


def why_no_triton(device: torch.device) -> str:
    """What is in the way of running Triton kernels on a device, or nothing."""
    if not has_triton():
        return 'it needs the package triton, which is not installed'
    if missing_torch('2.4'):  # whose Triton is the first to have all that the kernels use
        return missing_torch('2.4')
    if device.type == 'cuda' and torch.cuda.is_available():
        if torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0):
            return ''
        return ('it needs an NVIDIA GPU of compute capability 8.0 or more, but '
                f'{device} is {torch.cuda.get_device_name(device)}')
    if device.type == 'cpu':
        from . import fused_triton
        if fused_triton.INTERPRETED:
            return ''
    return ('it works on CUDA devices (on the CPU only in Triton\'s interpreter, for which '
            f'TRITON_INTERPRET=1 is set before Python starts), but got tensors on {device}')


def agrees_with_plain(device: torch.device) -> bool:
    """Whether a small case on a device has the values and gradients of the plain path.

    Kernels are compiled on the user's machine, by the versions it has, for its GPU: this
    stands between a fault of theirs and a training that learns from wrong numbers. Once
    for each device; a warning says what is wrong.
    """
    return _agrees_with_plain(str(device))


@functools.lru_cache(maxsize=None)
def _agrees_with_plain(device: str) -> bool:
    rules = AxisRule(9, 2), AxisRule(8, 2)  # ragged, and of more than 64 members
    heads, channels, sides = 2, 64, (17, 15)

    def leaf(*shape: int) -> Tensor:  # no random numbers, which a user's seed may be for
        count = torch.Size(shape).numel()
        return torch.arange(count, device=device).mul(2.4).sin().view(shape).requires_grad_()

    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(
                torch.device(device).type, enabled=False):
            qkv, table = leaf(1, *sides, 3 * channels), leaf(heads, 17, 15)
            grouping = group_map(1, *sides, *rules, device)
            tokens = qkv.flatten(0, 2)[grouping.order]
            plain = plain_attention(tokens, table, grouping.segments, heads, 0.2)
            plain = plain[grouping.inverse].view(1, *sides, channels)
            fused = fused_attention(qkv, table, grouping.rows, grouping.columns, heads, 0.2)
            weights = leaf(1, *sides, channels).detach()
            results = [(out, *torch.autograd.grad((out * weights).sum(), (qkv, table)))
                       for out in (fused, plain)]
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results))
        fault = '' if worst < 1e-2 else f'it is wrong by {worst:.2g} of the largest value'
    except Exception as error:  # of a compiler, a driver, a launch
        fault = f'{type(error).__name__}: {error}'
    if fault:
        warnings.warn(f'CrossFormer: the fused attention does not work on {device}, the plain one '
                      f'is used ({fault}).')
    return not fault


# torch.compile is to call these, not to look into them. `torch.compiler.assume_constant_result`
# says so by the same attribute, but takes a second to import the compiler.
why_no_triton._dynamo_marked_constant = True
agrees_with_plain._dynamo_marked_constant = True


# Operators of PyTorch's own kind, so that torch.compile takes them into its graph without looking
# inside. (It could look inside a `triton_op`, but there is nothing to fuse with, and Triton's
# interpreter could not run one.) They take tokens, not maps: inductor cannot keep maps of symbolic
# sides for the backward pass.
def _forward(qkv: Tensor, table: Tensor, batch: int, height: int, width: int, row_size: int,
             row_interval: int, column_size: int, column_interval: int, num_heads: int,
             scale: float) -> Tuple[Tensor, Tensor]:
    """Output, and the norms of the softmax, (B*H*W, heads)."""
    from .fused_triton import forward
    out, norms = forward(qkv.view(batch, height, width, -1), table,
                         AxisRule(row_size, row_interval), AxisRule(column_size, column_interval),
                         num_heads, scale)
    return out.flatten(0, 2), norms.flatten(0, 2)


def _fake_forward(qkv, table, batch, height, width, row_size, row_interval, column_size,
                  column_interval, num_heads, scale):
    return (qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3),
            qkv.new_empty(qkv.shape[0], num_heads, dtype=torch.float32))


def _backward(grad_out: Tensor, qkv: Tensor, table: Tensor, out: Tensor, norms: Tensor,
              batch: int, height: int, width: int, row_size: int, row_interval: int,
              column_size: int, column_interval: int, num_heads: int,
              scale: float) -> Tuple[Tensor, Tensor]:
    """Gradients of qkv and table."""
    from .fused_triton import backward
    grad_out, qkv, out, norms = (x.reshape(batch, height, width, -1)
                                 for x in (grad_out, qkv, out, norms))
    grad_qkv, grad_table = backward(grad_out, qkv, table, out, norms,
                                    AxisRule(row_size, row_interval),
                                    AxisRule(column_size, column_interval), num_heads, scale)
    return grad_qkv.flatten(0, 2), grad_table


def _fake_backward(grad_out, qkv, table, out, norms, batch, height, width, row_size,
                   row_interval, column_size, column_interval, num_heads, scale):
    return qkv.new_empty(qkv.shape), table.new_empty(table.shape)


def _keep(ctx, inputs, output) -> None:
    qkv, table, *ctx.numbers = inputs
    ctx.save_for_backward(qkv, table, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, grad_norms):
    if grad_out is None:
        return (None,) * 11
    qkv, table, out, norms = ctx.saved_tensors
    return (*_attend_backward(grad_out, qkv, table, out, norms, *ctx.numbers), *(None,) * 9)


_attend_backward = define_operator('fused_attention_backward', _backward, _fake_backward)
_attend = define_operator('fused_attention', _forward, _fake_forward,
                          setup_context=_keep, backward=_differentiate)
