"""Attention in the groups of a map of any size."""

import torch
from einops import rearrange
from torch import Tensor

from ..padded_axis import PaddedAxis, padded_axis, padded_axis_to_onnx


def padded_attention(
    qkv: Tensor, table: Tensor, rows: PaddedAxis, columns: PaddedAxis, num_heads: int, scale: float
) -> Tensor:
    """Compute attention as the papers write it, with a mask; store the weights of all groups.

    Args:
        rows, columns (PaddedAxis): the groups.
        others: as of :func:`crossformer_mm.kernels.map_attention`.
    """
    height, width = rows.size, columns.size
    members = select(qkv, rows.positions.flatten(), columns.positions.flatten())
    q, k, v = rearrange(
        members,
        'b (gr r) (gc c) (three h d) -> three b (gr gc) h (r c) d',
        r=height,
        c=width,
        three=3,
        h=num_heads,
    )
    bias = rearrange(
        select(table, rows.offset, columns.offset),
        'h (rq rk) (cq ck) -> h (rq cq) (rk ck)',
        rq=height,
        cq=width,
    )
    real = rearrange(
        rows.real[:, None, :, None] & columns.real[:, None], 'gr gc r c -> (gr gc) 1 1 (r c)'
    )
    logits = q * scale @ k.transpose(-1, -2) + bias
    # Not -inf: a group of padding only is dropped later, and must not become NaN.
    logits = logits.masked_fill(~real, torch.finfo(logits.dtype).min)
    out = rearrange(
        logits.softmax(-1) @ v,
        'b (gr gc) h (r c) d -> b (gr r) (gc c) (h d)',
        gc=columns.positions.shape[0],
        r=height,
    )
    return select(out, rows.inverse, columns.inverse)


def select(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Take and order the rows and columns, dimensions 1 and 2, of a map."""
    return x.index_select(1, rows).index_select(2, columns)


@torch.library.custom_op('crossformer_mm::any_size_attention', mutates_args=())
def any_size_attention(
    qkv: Tensor, table: Tensor, rows: Tensor, columns: Tensor, num_heads: int, scale: float
) -> Tensor:
    """Compute :func:`padded_attention` from the rules of the axes.

    The ONNX side takes one row of groups after the other, so that only the weights of few
    groups are in memory at a time.

    Args:
        table (Tensor): (offsets, heads), the bias of each offset, in the order of :func:`offsets`.
        rows, columns (Tensor): as of :func:`offsets`.
        others: as of :func:`crossformer_mm.kernels.map_attention`.
    """
    rows, columns = (
        padded_axis(side, rule[0], rule[1], rule[2], qkv.device)
        for side, rule in zip(qkv.shape[1:3], (rows, columns))
    )
    table = table.t().unflatten(1, (2 * rows.size - 1, 2 * columns.size - 1))
    return padded_attention(qkv, table, rows, columns, num_heads, scale).contiguous()


@any_size_attention.register_fake
def _(qkv, table, rows, columns, num_heads, scale):
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


MASK_VALUE = -1e9  # of padding keys; the largest number of float32 would overflow


def to_onnx(op, qkv, table, row_rule, column_rule, num_heads, scale):
    # Shapes in comments: B images, H x W the map, R x S groups of r x c members, h heads of d
    # channels.
    import onnx_ir
    from onnxscript import GraphBuilder

    shape, channels = op.Shape(qkv), qkv.shape[3] // 3
    images, height, width = (op.Gather(shape, axis) for axis in range(3))
    r, rows = padded_axis_to_onnx(op, height, row_rule)
    c, columns = padded_axis_to_onnx(op, width, column_rule)
    members = r * c
    bias = op.Reshape(op.Transpose(table, perm=[1, 0]), [num_heads, -1, 2 * c - 1])
    bias = op.Gather(op.Gather(bias, rows.offset, axis=1), columns.offset, axis=2)  # h, r r, c c
    bias = op.Transpose(op.Reshape(bias, [num_heads, r, r, c, c]), perm=[0, 1, 3, 2, 4])
    bias = op.Reshape(bias, [num_heads, members, members])
    real = op.And(op.Unsqueeze(rows.real, [1, 3]), op.Unsqueeze(columns.real, [1]))  # R, S, r, c
    mask = op.Reshape(op.Where(real, 0.0, MASK_VALUE), [0, 0, 1, members, 1])

    # What the loop takes from outside: sizes that Identity joins to tensors, and constants.
    split = op.Identity([0, r, -1, c, num_heads, channels // num_heads])
    joined = op.Identity([0, 0, 0, members, -1])
    apart = op.Identity([0, 0, 0, r, c, -1])
    row_of_map = op.Identity([0, 0, -1, channels])
    mask_of_heads = op.Identity([images, 1, num_heads, 1, 1])
    positions = op.Reshape(columns.positions, [-1])
    factor, one = op.Constant(value_float=scale), op.Constant(value_float=1.0)

    def attend(op, index):
        """Attend in one row of groups."""
        at = op.Gather(rows.positions, index, axis=0)
        chosen = op.Gather(op.Gather(qkv, at, axis=1), positions, axis=2)  # B, r, S c, 3 h d
        q, k, v = (
            op.Reshape(op.Transpose(op.Reshape(part, split), perm=[0, 2, 4, 1, 3, 5]), joined)
            for part in op.Split(chosen, axis=3, num_outputs=3, _outputs=3)
        )  # B, S, h, r c, d
        # One more channel, 1 in every query, adds MASK_VALUE to the logits of padding keys: adding
        # it to all logits would take as long as their softmax.
        q = op.Pad(op.Mul(q, factor), [0] * 9 + [1], one)
        k = op.Concat(k, op.Expand(op.Gather(mask, index, axis=0), mask_of_heads), axis=-1)
        logits = op.Add(op.MatMul(q, op.Transpose(k, perm=[0, 1, 2, 4, 3])), bias)
        out = op.Reshape(op.MatMul(op.Softmax(logits, axis=-1), v), apart)  # B, S, h, r, c, d
        out = op.Reshape(op.Transpose(out, perm=[0, 3, 1, 4, 2, 5]), row_of_map)
        return op.Gather(out, columns.inverse, axis=2)

    # A Loop, as OpenVINO's Scan cannot read values from outside its body.
    index = onnx_ir.val('index', onnx_ir.DataType.INT64, [])
    going = onnx_ir.val('going', onnx_ir.DataType.BOOL, [])
    body = onnx_ir.Graph(
        [index, going], [], nodes=[], opset_imports={'': op.version}, name='row_of_groups'
    )
    builder = GraphBuilder(body)
    body.outputs.extend([builder.op.Identity(going), attend(builder.op, index)])
    count = op.Gather(op.Shape(rows.positions), 0)
    # op.Loop takes no v_initial by name, and the exporter needs it, though there are no values.
    out = op['Loop'](count, True, v_initial=(), body=body)  # R, B, r, W, h d
    out = op.Reshape(op.Transpose(out, perm=[1, 0, 2, 3, 4]), [0, -1, width, channels])
    return op.Gather(out, rows.inverse, axis=1)
