"""The tiled attention as one operator on a map, for torch.compile on the CPU.

A compiler cannot look into the tiles, and how groups are lined up depends on the sides of
a map in many small ways, so that it would compile anew for each size. As an operator of
PyTorch's own kind both are left to the moment of running, and the sides stay symbols.
"""
from typing import Tuple

from torch import Tensor

from ..compat import define_operator
from ..grouping import AxisRule, group_map
from .tiled import attend_segments, attend_segments_backward


def tiled_map_attention(qkv: Tensor, table: Tensor, rows: AxisRule, columns: AxisRule,
                        num_heads: int, scale: float, avx512: bool) -> Tensor:
    """As :func:`.fused.fused_attention`, on the CPU and of any type.

    Args:
        avx512 (bool): see :func:`.tiled.tiled_attention`.
    """
    maps = qkv.shape[:3]
    out = _attend(qkv.flatten(0, 2), table, *maps, *rows[:2], *columns[:2], num_heads, scale,
                  avx512)
    return out.view(*maps, -1)


# It takes tokens, not maps: inductor cannot keep maps of symbolic sides for the backward pass.
def _forward(qkv: Tensor, table: Tensor, batch: int, height: int, width: int, row_size: int,
             row_interval: int, column_size: int, column_interval: int, num_heads: int,
             scale: float, avx512: bool) -> Tensor:
    grouping = group_map(batch, height, width, AxisRule(row_size, row_interval),
                         AxisRule(column_size, column_interval))
    out = attend_segments(qkv.index_select(0, grouping.order), table, grouping.segments, num_heads,
                          scale, avx512)
    return out.index_select(0, grouping.inverse)


def _fake_forward(qkv, table, batch, height, width, row_size, row_interval, column_size,
                  column_interval, num_heads, scale, avx512):
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)


def _backward(grad_out: Tensor, qkv: Tensor, table: Tensor, out: Tensor, batch: int,
              height: int, width: int, row_size: int, row_interval: int, column_size: int,
              column_interval: int, num_heads: int, scale: float) -> Tuple[Tensor, Tensor]:
    """Gradients of qkv and table."""
    grouping = group_map(batch, height, width, AxisRule(row_size, row_interval),
                         AxisRule(column_size, column_interval))
    grad_out, qkv, out = (x.index_select(0, grouping.order) for x in (grad_out, qkv, out))
    grad_qkv, grad_table = attend_segments_backward(grad_out, qkv, table, out, grouping.segments,
                                                    num_heads, scale)
    return grad_qkv.index_select(0, grouping.inverse), grad_table.contiguous()


def _fake_backward(grad_out, qkv, table, out, batch, height, width, row_size,
                   row_interval, column_size, column_interval, num_heads, scale):
    return qkv.new_empty(qkv.shape), table.new_empty(table.shape)


def _keep(ctx, inputs, output) -> None:
    qkv, table, *ctx.numbers, _ = inputs
    ctx.save_for_backward(qkv, table, output)


def _differentiate(ctx, grad_out):
    qkv, table, out = ctx.saved_tensors
    return (*_attend_backward(grad_out, qkv, table, out, *ctx.numbers), *(None,) * 10)


_attend_backward = define_operator('tiled_attention_backward', _backward, _fake_backward)
_attend = define_operator('tiled_attention', _forward, _fake_forward,
                          setup_context=_keep, backward=_differentiate)
