"""Build a differentiable function from a kernel: for eager mode, and as an operator of PyTorch.

torch.compile, modes and transforms see the operator as one node. Its dispatch takes longer than
many a kernel, so eager mode calls the kernel's two passes from a ``torch.autograd.Function``. Both
run the same two passes.
"""

from typing import Callable, List, Tuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..compat import define_operator
from ..exact import interception
from ..grouping import AxisRule


def map_operator(name: str, forward: Callable, backward: Callable) -> Callable:
    """Build attention with a gradient from a kernel's two passes.

    A compiler does not trace into it and keeps the sides of a map symbolic. Differentiable once.

    Args:
        name (str): of the operator, ``crossformer_mm::NAME``.
        forward (Callable): ``(qkv, table, rows, columns, num_heads, scale)`` of
            :func:`crossformer_mm.kernels.map_attention` to the output and the norms
            (B, H, W, heads) of the softmax, in float32.
        backward (Callable): ``(grad_out, qkv, table, out, norms, rows, columns, num_heads,
            scale)`` to the gradients of qkv and table.

    Returns:
        Callable: :func:`crossformer_mm.kernels.map_attention` without ``path``.
    """

    # They take tokens, not maps: inductor cannot keep maps of symbolic sides for the backward pass.
    def run(
        qkv: Tensor,
        table: Tensor,
        sides: List[int],
        rows: List[int],
        columns: List[int],
        num_heads: int,
        scale: float,
    ) -> Tuple[Tensor, Tensor]:
        rules = AxisRule(*rows), AxisRule(*columns)
        out, norms = forward(qkv.reshape(*sides, qkv.shape[1]), table, *rules, num_heads, scale)
        return out.flatten(0, 2), norms.flatten(0, 2)

    def fake_run(qkv, table, *numbers):
        *_, num_heads, _ = numbers
        return (
            qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3),
            table.new_empty(qkv.shape[0], num_heads, dtype=torch.float32),
        )

    def run_backward(
        grad_out: Tensor,
        qkv: Tensor,
        table: Tensor,
        out: Tensor,
        norms: Tensor,
        sides: List[int],
        rows: List[int],
        columns: List[int],
        num_heads: int,
        scale: float,
    ) -> Tuple[Tensor, Tensor]:
        rules = AxisRule(*rows), AxisRule(*columns)
        grad_out, qkv, out, norms = (
            x.reshape(*sides, x.shape[1]) for x in (grad_out, qkv, out, norms)
        )
        grads = backward(grad_out, qkv, table, out, norms, *rules, num_heads, scale)
        return grads[0].flatten(0, 2), grads[1].to(table.dtype)

    def fake_backward(grad_out, qkv, table, *_):
        return qkv.new_empty(qkv.shape), table.new_empty(table.shape)

    def keep(ctx, inputs, output) -> None:
        qkv, table, *ctx.numbers = inputs
        ctx.save_for_backward(table, qkv, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def differentiate(ctx, grad_out, grad_norms):
        if grad_out is None:
            return (None,) * 7
        table, qkv, *outputs = ctx.saved_tensors
        grads = operator_backward(grad_out, qkv, table, *outputs, *ctx.numbers)
        return (*grads, *(None,) * 5)

    operator_backward = define_operator(f'{name}_backward', run_backward, fake_backward)
    operator = define_operator(name, run, fake_run, setup_context=keep, backward=differentiate)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, qkv, table, *arguments):
            out, norms = forward(qkv, table, *arguments)
            # Saved as the operator saves them: of a block that is recomputed in the backward pass,
            # one of the two runs may be within a mode.
            tokens = (x.flatten(0, 2) for x in (qkv, out, norms))
            ctx.save_for_backward(table, *tokens)
            ctx.sides, ctx.arguments = qkv.shape[:3], arguments
            ctx.set_materialize_grads(False)
            return out

        @staticmethod
        def backward(ctx, grad_out):
            if grad_out is None:
                return (None,) * 6
            table, *tokens = ctx.saved_tensors
            if torch.is_grad_enabled() or is_intercepted(grad_out):
                # With create_graph=True and for a batch of gradients the operator has an error or a
                # rule; the kernel alone would leave second derivatives out without a word.
                rows, columns, *numbers = ctx.arguments
                qkv, out, norms = tokens
                flat = grad_out.reshape(-1, grad_out.shape[-1])  # flatten has no batching rule
                tensors = flat, qkv, table, out, norms
                grad_qkv, grad_table = operator_backward(
                    *tensors, ctx.sides, [*rows], [*columns], *numbers
                )
                return grad_qkv.view(*ctx.sides, -1), grad_table, None, None, None, None
            qkv, out, norms = (x.view(*ctx.sides, x.shape[1]) for x in tokens)
            grads = backward(grad_out, qkv, table, out, norms, *ctx.arguments)
            return grads[0], grads[1].to(table.dtype), None, None, None, None

    def attend(qkv, table, rows, columns, num_heads, scale, dropout=0.0) -> Tensor:
        if not is_intercepted(qkv, table):
            arguments = qkv, table, rows, columns, num_heads, scale
            if torch.is_grad_enabled() and (qkv.requires_grad or table.requires_grad):
                return Attention.apply(*arguments)
            return forward(*arguments)[0]
        sides = qkv.shape[:3]
        out, _ = operator(qkv.flatten(0, 2), table, sides, [*rows], [*columns], num_heads, scale)
        return out.view(*sides, out.shape[1])

    return attend


def is_intercepted(*tensors: Tensor) -> bool:
    """Check for graph capture, modes, transforms, subclasses of tensors and tensors without data.

    They take the operator: what they do with it is registered.
    """
    return bool(
        interception()
        or any(
            type(tensor) not in (Tensor, Parameter)
            or tensor.is_meta
            or not torch._C._has_storage(tensor)  # a batch of gradients; nothing public tells
            for tensor in tensors
        )
    )
