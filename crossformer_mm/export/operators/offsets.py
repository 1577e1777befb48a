"""Offsets between queries and keys that occur in the groups of a map."""

import torch
from torch import Tensor

from ..padded_axis import fit_rule, fit_rule_to_onnx


@torch.library.custom_op('crossformer_mm::offsets', mutates_args=())
def offsets(qkv: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute the offsets that occur in the groups of a map.

    Args:
        qkv (Tensor): (B, H, W, 3C).
        rows, columns (Tensor): (3,) int64, the size, interval and lead of each axis' rule.

    Returns:
        Tensor: (offsets, 2), row-major.
    """
    sizes = [fit_rule(side, *rule[:2])[0] for side, rule in zip(qkv.shape[1:3], (rows, columns))]
    return torch.cartesian_prod(
        *(torch.arange(1 - int(size), int(size), dtype=qkv.dtype) for size in sizes)
    )


@offsets.register_fake
def _(qkv, rows, columns):
    return qkv.new_empty(torch.library.get_ctx().new_dynamic_size(min=1), 2)


def to_onnx(op, qkv, rows, columns):
    shape = op.Shape(qkv)
    sizes = [
        fit_rule_to_onnx(op, op.Gather(shape, axis), rule)[0]
        for axis, rule in ((1, rows), (2, columns))
    ]
    sides = [op.CastLike(op.Range(1 - size, size, 1), qkv) for size in sizes]
    counts = op.Concat(*map(op.Shape, sides), axis=0)
    pairs = (op.Expand(op.Unsqueeze(side, [axis]), counts) for side, axis in zip(sides, (1, 0)))
    return op.Concat(*(op.Reshape(numbers, [-1, 1]) for numbers in pairs), axis=1)
