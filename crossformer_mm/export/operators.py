"""What PyTorch's exporter cannot say in ONNX by itself, as operators of our own.

Each is a PyTorch operator, which is what it computes here, and a function in the text form of ONNX,
made of standard operators, which takes its place in the file: :func:`with_standard_operators`.
"""

import hashlib
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

DOMAIN = 'crossformer_mm'
FILLING = -1e9  # added to the logits of keys that are none; the largest of float32 would overflow


@torch.library.custom_op(f'{DOMAIN}::offsets', mutates_args=())
def offsets(qkv: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The offsets that occur in the groups of a map.

    Args:
        qkv (Tensor): (B, H, W, 3C).
        rows, columns (Tensor): (3,) int64, the size, interval and lead of each axis' rule.

    Returns:
        Tensor: (offsets, 2), row-major.
    """
    from .any_size import fit_rule

    sizes = [fit_rule(side, *rule)[0] for side, rule in zip(qkv.shape[1:3], (rows, columns))]
    return torch.cartesian_prod(
        *(torch.arange(1 - int(size), int(size), dtype=qkv.dtype) for size in sizes)
    )


@offsets.register_fake
def _(qkv, rows, columns):
    return qkv.new_empty(torch.library.get_ctx().new_dynamic_size(min=1), 2)


@torch.library.custom_op(f'{DOMAIN}::map_attention', mutates_args=())
def map_attention(
    qkv: Tensor, table: Tensor, rows: Tensor, columns: Tensor, num_heads: int, scale: float
) -> Tensor:
    """:func:`.any_size.padded_attention`; the file takes one row of groups after the other, so that
    the weights of few groups are in memory at a time.

    Args:
        table (Tensor): (offsets, heads), the bias of each offset, in the order of :func:`offsets`.
        rows, columns (Tensor): as of :func:`offsets`.
        others: as of :func:`crossformer_mm.kernels.map_attention`.
    """
    from .any_size import padded_attention, padded_axis

    rows, columns = (
        padded_axis(side, rule[0], rule[1], rule[2], qkv.device)
        for side, rule in zip(qkv.shape[1:3], (rows, columns))
    )
    table = table.t().unflatten(1, (2 * rows.size - 1, 2 * columns.size - 1))
    return padded_attention(qkv, table, rows, columns, num_heads, scale).contiguous()


@map_attention.register_fake
def _(qkv, table, rows, columns, num_heads, scale):
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


@torch.library.custom_op(f'{DOMAIN}::fixed_attention', mutates_args=())
def fixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    segments: Sequence[int],
    num_heads: int,
    scale: float,
) -> Tensor:
    """Attention of tokens that stand group by group.

    Args:
        q, k, v (Tensor): (tokens, C).
        table (Tensor): (heads, 2*R-1, 2*S-1), the bias of each offset in groups of R x S.
        segments: of each size of group, one after the other, how many groups there are, and of how
            many rows and columns.
        num_heads, scale: as of :func:`crossformer_mm.kernels.map_attention`.

    Returns:
        Tensor: (tokens, C).
    """
    from ..position_bias import bias_of_pairs

    start, outs = 0, []
    for groups, rows, columns in triples(segments):
        stop = start + groups * rows * columns
        queries, keys, values = (
            one[start:stop].view(groups, rows * columns, num_heads, -1).transpose(1, 2)
            for one in (q, k, v)
        )
        start = stop
        logits = queries * scale @ keys.transpose(-1, -2) + bias_of_pairs(table, rows, columns)
        outs.append((logits.softmax(-1) @ values).transpose(1, 2).flatten(0, 1).flatten(1))
    return torch.cat(outs)


@fixed_attention.register_fake
def _(q, k, v, table, segments, num_heads, scale):
    return torch.empty_like(q)


def triples(numbers: Sequence[int]) -> List[Sequence[int]]:
    return [numbers[at : at + 3] for at in range(0, len(numbers), 3)]


@torch.library.custom_op(f'{DOMAIN}::nms', mutates_args=())
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, keep: int) -> Tensor:
    """Non-maximum suppression of the boxes with a score above 0.

    Args:
        boxes (Tensor): (n, 4) as left, top, right, bottom.
        scores (Tensor): (n,).
        iou_threshold: boxes that overlap a better one by more are dropped.
        keep: the most that are kept.

    Returns:
        Tensor: (keep,) indices, best first; -1 where there are no more.
    """
    from mmcv.ops import nms as suppress

    there = (scores > 0).nonzero()[:, 0]
    kept = suppress(boxes[there].contiguous(), scores[there].contiguous(), iou_threshold)[1][:keep]
    return F.pad(there[kept], (0, keep - len(kept)), value=-1)


@nms.register_fake
def _(boxes, scores, iou_threshold, keep):
    return boxes.new_empty(keep, dtype=torch.int64)


@torch.library.custom_op(f'{DOMAIN}::roi_features', mutates_args=())
def roi_features(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    height: int,
    width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Average features of regions of one image, each region on a level of its own.

    Args:
        features (Sequence[Tensor]): (1, C, h, w) of each level.
        rois (Tensor): (n, 4) as left, top, right, bottom.
        levels (Tensor): (n,) whole numbers.
        scales: of each level, how many of its positions are one of ``rois``' units.
        height, width: of what is returned.
        sampling_ratio, aligned: as of ``mmcv.ops.roi_align``.

    Returns:
        Tensor: (n, C, height, width).
    """
    from mmcv.ops import roi_align

    out = rois.new_zeros(len(rois), features[0].shape[1], height, width)
    for level, (feature, scale) in enumerate(zip(features, scales)):
        here = (levels == level).nonzero()[:, 0]
        if len(here):
            out[here] = roi_align(
                feature,
                F.pad(rois[here], (1, 0)),
                (height, width),
                scale,
                sampling_ratio,
                'avg',
                aligned,
            )
    return out


@roi_features.register_fake
def _(features, rois, levels, scales, height, width, sampling_ratio, aligned):
    return rois.new_empty(rois.shape[0], features[0].shape[1], height, width)


@torch.library.custom_op(f'{DOMAIN}::resize', mutates_args=())
def resize(x: Tensor, size: Tensor, align_corners: bool) -> Tensor:
    """Bilinear resizing to a size that is given as a tensor.

    Args:
        x (Tensor): (B, C, H, W).
        size (Tensor): (2,) int64, height and width of the result.
        align_corners: as of ``torch.nn.functional.interpolate``.
    """
    return F.interpolate(x, size.tolist(), mode='bilinear', align_corners=align_corners)


@resize.register_fake
def _(x, size, align_corners):
    sides = [torch.library.get_ctx().new_dynamic_size(min=1) for _ in range(2)]
    return x.new_empty(*x.shape[:2], *sides)


@torch.library.custom_op(f'{DOMAIN}::resize_image', mutates_args=())
def resize_image(image: Tensor, height: int, width: int, keep_ratio: bool) -> Tensor:
    """What a test pipeline's Resize makes of an image, to the bit: OpenCV's bilinear resizing of
    bytes, which weighs pixels by whole numbers of 1/2048 and drops bits in between.

    Args:
        image (Tensor): (B, C, H, W), whole numbers from 0 to 255 of any type.
        height, width: of the result; with ``keep_ratio`` its longer side is at most the larger of
            the two, and its shorter one at most the smaller.

    Returns:
        Tensor: float32, whole numbers from 0 to 255.
    """
    sides = list(image.shape[2:])
    if keep_ratio:
        limits = sorted((height, width))
        factor = min(limits[1] / max(sides), limits[0] / min(sides))
        height, width = (max(1, int(side * factor + 0.5)) for side in sides)
    rows, columns = (samples(side, out, image.device) for side, out in zip(sides, (height, width)))
    image = image.int()
    lines = [
        sum(image[:, :, row][:, :, :, column] * weight for column, weight in zip(*columns))
        for row in rows[0]
    ]
    mixed = sum(line // 16 * weight[:, None] // 2**16 for line, weight in zip(lines, rows[1]))
    return ((mixed + 2) // 4).float()


def samples(length: int, out: int, device) -> Tuple[List[Tensor], List[Tensor]]:
    """Of each of ``out`` positions along an axis the two that it is mixed of, and 2048 times how
    much of each."""
    at = (torch.arange(out, dtype=torch.float64, device=device) + 0.5) * (1 / (out / length)) - 0.5
    at = at.float()
    first = at.floor()
    after = at - first
    places = [(first.long() + step).clamp(0, length - 1) for step in (0, 1)]
    return places, [(share * 2048).round().int() for share in (1 - after, after)]


@resize_image.register_fake
def _(image, height, width, keep_ratio):
    sides = [torch.library.get_ctx().new_dynamic_size(min=1) for _ in range(2)]
    return image.new_empty(*image.shape[:2], *sides, dtype=torch.float32)


# What each is in ONNX


def onnx_offsets(call, qkv, rows, columns):
    return call('Offsets', [qkv, rows, columns])


def onnx_map_attention(call, qkv, table, rows, columns, num_heads, scale):
    return call('MapAttention', [qkv, table, rows, columns], heads=num_heads, scale=scale)


def onnx_fixed_attention(call, q, k, v, table, segments, num_heads, scale):
    text = fixed_attention_text(q.shape[1], list(table.shape), segments, num_heads, scale)
    return call(text, [q, k, v, table])


def onnx_nms(call, boxes, scores, iou_threshold, keep):
    return call('Nms', [boxes, scores], iou=iou_threshold, keep=keep)


def onnx_roi_features(call, features, rois, levels, scales, height, width, sampling_ratio, aligned):
    found = [
        call(
            'RoisOfLevel',
            [feature, rois, levels],
            level=level,
            scale=scale,
            height=height,
            width=width,
            sampling_ratio=sampling_ratio,
            mode='half_pixel' if aligned else 'output_half_pixel',
        )
        for level, (feature, scale) in enumerate(zip(features, scales))
    ]
    return call('OrderOfRois', [levels, *found], levels=len(found))


def onnx_resize(call, x, size, align_corners):
    return call('Resize', [x, size], mode='align_corners' if align_corners else 'half_pixel')


def onnx_resize_image(call, image, height, width, keep_ratio):
    if keep_ratio:
        limits = dict(longer=float(max(height, width)), shorter=float(min(height, width)))
        size = call('SizeInside', [image], **limits)
    else:
        size = call('SizeGiven', [image], height=height, width=width)
    return call('ResizeImage', [image, size])


TRANSLATIONS: Dict[Any, Callable] = {
    torch.ops.crossformer_mm.offsets.default: onnx_offsets,
    torch.ops.crossformer_mm.map_attention.default: onnx_map_attention,
    torch.ops.crossformer_mm.fixed_attention.default: onnx_fixed_attention,
    torch.ops.crossformer_mm.nms.default: onnx_nms,
    torch.ops.crossformer_mm.roi_features.default: onnx_roi_features,
    torch.ops.crossformer_mm.resize.default: onnx_resize,
    torch.ops.crossformer_mm.resize_image.default: onnx_resize_image,
}

FIT_RULE = """
FitRule (length, rule) => (size, interval, lead) {
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  two = Constant <value_int = 2> ()
  most = Gather (rule, zero)
  widest = Gather (rule, one)
  lead = Gather (rule, two)
  interval = Min (widest, length)
  before_last = Sub (interval, one)
  to_divide = Add (length, before_last)
  there = Div (to_divide, interval)
  size = Min (most, there)
}"""

PADDED_AXIS = """
PaddedAxis (length, rule) => (positions, real, inverse, offset) {
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  second_axis = Constant <value_ints = [1]> ()
  flat = Constant <value_ints = [-1]> ()
  size, interval, lead = crossformer_mm.FitRule (length, rule)
  tile = Mul (size, interval)
  with_lead = Add (length, lead)
  tile_less_one = Sub (tile, one)
  to_cut = Add (with_lead, tile_less_one)
  tiles = Div (to_cut, tile)
  groups = Mul (tiles, interval)
  group = Range (zero, groups, one)
  tile_of_group = Div (group, interval)
  begin_of_tile = Mul (tile_of_group, tile)
  in_tile = Mod (group, interval)
  first = Add (begin_of_tile, in_tile)
  first_column = Unsqueeze (first, second_axis)
  member = Range (zero, size, one)
  steps = Mul (member, interval)
  shifted = Add (first_column, steps)
  table = Sub (shifted, lead)
  last = Sub (length, one)
  not_below = Max (table, zero)
  positions = Min (not_below, last)
  after_begin = GreaterOrEqual (table, zero)
  before_end = Less (table, length)
  real = And (after_begin, before_end)
  index = Range (zero, length, one)
  position = Add (index, lead)
  place = Mod (position, tile)
  tile_number = Div (position, tile)
  groups_before = Mul (tile_number, interval)
  group_in_tile = Mod (place, interval)
  group_number = Add (groups_before, group_in_tile)
  members_before = Mul (group_number, size)
  member_number = Div (place, interval)
  inverse = Add (members_before, member_number)
  query = Unsqueeze (member, second_axis)
  difference = Sub (query, member)
  last_member = Sub (size, one)
  from_smallest = Add (difference, last_member)
  offset = Reshape (from_smallest, flat)
}"""

OFFSETS = """
Offsets (qkv, rows, columns) => (pairs) {
  one = Constant <value_int = 1> ()
  two = Constant <value_int = 2> ()
  column_axis = Constant <value_ints = [1]> ()
  row_axis = Constant <value_ints = [0]> ()
  shape = Shape (qkv)
  height = Gather (shape, one)
  width = Gather (shape, two)
  r, interval_r, lead_r = crossformer_mm.FitRule (height, rows)
  c, interval_c, lead_c = crossformer_mm.FitRule (width, columns)
  begin_r = Sub (one, r)
  begin_c = Sub (one, c)
  whole_r = Range (begin_r, r, one)
  whole_c = Range (begin_c, c, one)
  range_r = Cast <to = 1> (whole_r)
  range_c = Cast <to = 1> (whole_c)
  standing = Unsqueeze (range_r, column_axis)
  lying = Unsqueeze (range_c, row_axis)
  shape_r = Shape (standing)
  shape_c = Shape (lying)
  both = Max (shape_r, shape_c)
  all_r = Expand (standing, both)
  all_c = Expand (lying, both)
  one_column = Constant <value_ints = [-1, 1]> ()
  flat_r = Reshape (all_r, one_column)
  flat_c = Reshape (all_c, one_column)
  pairs = Concat <axis = 1> (flat_r, flat_c)
}"""

# Keys that are none get a large negative number by one more channel, which is 1 in every query:
# to add it to the weights of all pairs would take as long as to compute their softmax.
# One row of groups at a time (Loop; OpenVINO's Scan sees nothing of what is around it). Letters of
# comments: B images, H x W the map, R x S groups of r x c members, h heads of d channels.
MAP_ATTENTION = """
MapAttention <heads: int, scale: float>
    (qkv, table, row_rule, column_rule) => (out) {
  row_number = Constant <value_int = 1> ()
  column_number = Constant <value_int = 2> ()
  shape_of_map = Shape (qkv)
  length = Gather (shape_of_map, row_number)
  length2 = Gather (shape_of_map, column_number)
  positions, real, inverse, offset = crossformer_mm.PaddedAxis (length, row_rule)
  positions2, real2, inverse2, offset2 = crossformer_mm.PaddedAxis (length2, column_rule)
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  three = Constant <value_ints = [3]> ()
  flat = Constant <value_ints = [-1]> ()
  outer_axes = Constant <value_ints = [0, 2]> ()
  one_more = Constant <value_ints = [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]> ()
  number_one = Constant <value_float = 1.0> ()
  heads_number = Constant <value_int: int = @heads> ()
  heads_size = Reshape (heads_number, one)
  factor = Constant <value_float: float = @scale> ()
  filling = Constant <value_float = FILLING> ()
  r = Shape <start = 1> (positions)
  groups = Shape (positions2)  # S, c
  c = Shape <start = 1> (positions2)
  width = Shape (inverse2)
  columns = Reshape (positions2, flat)

  doubled_r = Add (r, r)
  doubled_c = Add (c, c)
  offsets_r = Sub (doubled_r, one)
  offsets_c = Sub (doubled_c, one)
  of_heads = Transpose <perm = [1, 0]> (table)
  shape_of_table = Concat <axis = 0> (heads_size, offsets_r, offsets_c)
  in_table = Reshape (of_heads, shape_of_table)
  rows_of_table = Gather <axis = 1> (in_table, offset)
  pairs = Gather <axis = 2> (rows_of_table, offset2)  # h, r r, c c
  shape_of_pairs = Concat <axis = 0> (heads_size, r, r, c, c)
  in_pairs = Reshape (pairs, shape_of_pairs)
  queries_first = Transpose <perm = [0, 1, 3, 2, 4]> (in_pairs)
  members = Mul (r, c)
  shape_of_bias = Concat <axis = 0> (heads_size, members, members)
  bias = Reshape (queries_first, shape_of_bias)

  channels = Shape <start = 3> (qkv)
  channels_out = Div (channels, three)
  split_shape = Concat <axis = 0> (zero, r, groups, heads_size, flat)
  group_shape = Concat <axis = 0> (zero, zero, zero, members, flat)
  apart_shape = Concat <axis = 0> (zero, zero, zero, r, c, flat)
  row_shape = Concat <axis = 0> (zero, zero, flat, channels_out)
  mask_shape = Concat <axis = 0> (flat, one, members, one)
  real_columns = Unsqueeze (real2, one)  # S, 1, c

  row_groups = Shape <end = 1> (positions)
  count = Squeeze (row_groups, zero)
  always = Constant <value = bool {1}> ()
  scanned = Loop (count, always) <body = row_of_groups (int64 i, bool go)
      => (bool going, float[b, nr, w, ch] attended) {
    going = Identity (go)
    at = Gather <axis = 0> (positions, i)
    is_real = Gather <axis = 0> (real, i)
    here = Gather <axis = 1> (qkv, at)
    chosen = Gather <axis = 2> (here, columns)  # B, r, S c, 3 h d
    q, k, v = Split <axis = 3, num_outputs = 3> (chosen)
    q_split = Reshape (q, split_shape)
    k_split = Reshape (k, split_shape)
    v_split = Reshape (v, split_shape)  # B, r, S, c, h, d
    q_groups = Transpose <perm = [0, 2, 4, 1, 3, 5]> (q_split)
    k_groups = Transpose <perm = [0, 2, 4, 1, 3, 5]> (k_split)
    v_groups = Transpose <perm = [0, 2, 4, 1, 3, 5]> (v_split)
    q_members = Reshape (q_groups, group_shape)
    k_members = Reshape (k_groups, group_shape)
    v_members = Reshape (v_groups, group_shape)  # B, S, h, r c, d
    q_scaled = Mul (q_members, factor)
    real_rows = Unsqueeze (is_real, outer_axes)
    both = And (real_rows, real_columns)  # S, r, c
    not_there = Not (both)
    as_numbers = Cast <to = 1> (not_there)
    penalties = Mul (as_numbers, filling)
    mask = Reshape (penalties, mask_shape)  # S, 1, r c, 1
    outer = Shape <end = 3> (k_members)
    column_shape = Concat <axis = 0> (outer, members, one)
    column = Expand (mask, column_shape)  # B, S, h, r c, 1
    k_more = Concat <axis = -1> (k_members, column)
    q_more = Pad <mode = "constant"> (q_scaled, one_more, number_one)
    k_turned = Transpose <perm = [0, 1, 2, 4, 3]> (k_more)
    products = MatMul (q_more, k_turned)
    logits = Add (products, bias)
    weights = Softmax <axis = -1> (logits)
    mixed = MatMul (weights, v_members)
    apart = Reshape (mixed, apart_shape)  # B, S, h, r, c, d
    in_rows = Transpose <perm = [0, 3, 1, 4, 2, 5]> (apart)
    padded = Reshape (in_rows, row_shape)
    attended = Gather <axis = 2> (padded, inverse2)
  }>  # R, B, r, W, h d
  images_first = Transpose <perm = [1, 0, 2, 3, 4]> (scanned)
  map_shape = Concat <axis = 0> (zero, flat, width, channels_out)
  padded_map = Reshape (images_first, map_shape)
  out = Gather <axis = 1> (padded_map, inverse)
}"""

CHUNK = 96e6  # bytes of the weights of the groups that are computed at a time


def fixed_attention_text(
    channels: int, table: Sequence[int], segments: Sequence[int], heads: int, scale: float
) -> str:
    """:func:`fixed_attention` with every number written down."""
    constants: dict = {}
    lines: List[str] = []

    def ints(*values: int, kind: str = 'int64') -> str:
        """The name of a constant."""
        text = f'{kind}[{len(values)}] {{{", ".join(map(str, values))}}}'
        return constants.setdefault(text, f'constant{len(constants)}')

    def add(name: str, operator: str, *inputs: str, **attributes) -> str:
        given = ', '.join(f'{key} = {value}' for key, value in attributes.items())
        given = f'<{given}>' if given else ''
        lines.append(f'{name} = {operator} {given} ({", ".join(inputs)})')
        return name

    def offsets(size: int, most: int) -> str:
        """Rows or columns of the table, of each pair."""
        pairs = (most - 1 + query - key for query in range(size) for key in range(size))
        return ints(*pairs, kind='int32')

    factor = constants.setdefault(f'float[1] {{{scale!r}}}', 'factor')
    start, outs = 0, []
    for number, (groups, rows, columns) in enumerate(triples(segments)):
        members = rows * columns
        most_rows, most_columns = ((int(side) + 1) // 2 for side in table[1:])
        x = f'x{number}'
        add(f'{x}r', 'Gather', 'table', offsets(rows, most_rows), axis=1)
        add(f'{x}c', 'Gather', f'{x}r', offsets(columns, most_columns), axis=2)
        add(f'{x}p', 'Reshape', f'{x}c', ints(heads, rows, rows, columns, columns))
        add(f'{x}q', 'Transpose', f'{x}p', perm=[0, 1, 3, 2, 4])
        bias = add(f'{x}bias', 'Reshape', f'{x}q', ints(heads, members, members))
        chunks = max(1, round(groups * heads * members**2 * 4 / CHUNK))
        bounds = [groups * chunk // chunks for chunk in range(chunks + 1)]
        for begin, end in zip(bounds, bounds[1:]):
            count = end - begin
            if not count:
                continue
            y = f'{x}g{begin}'
            stop = start + count * members
            apart = ints(count, members, heads, channels // heads)
            for one in 'qkv':
                add(f'{y}{one}0', 'Slice', one, ints(start), ints(stop), ints(0))
                add(f'{y}{one}1', 'Reshape', f'{y}{one}0', apart)
            start = stop
            add(f'{y}q2', 'Transpose', f'{y}q1', perm=[0, 2, 1, 3])
            add(f'{y}k2', 'Transpose', f'{y}k1', perm=[0, 2, 3, 1])
            add(f'{y}v2', 'Transpose', f'{y}v1', perm=[0, 2, 1, 3])
            add(f'{y}q3', 'Mul', f'{y}q2', factor)
            add(f'{y}products', 'MatMul', f'{y}q3', f'{y}k2')
            add(f'{y}logits', 'Add', f'{y}products', bias)
            add(f'{y}weights', 'Softmax', f'{y}logits', axis=-1)
            add(f'{y}mixed', 'MatMul', f'{y}weights', f'{y}v2')
            add(f'{y}turned', 'Transpose', f'{y}mixed', perm=[0, 2, 1, 3])
            outs.append(add(f'{y}out', 'Reshape', f'{y}turned', ints(-1, channels)))
    add('out', 'Concat', *outs, axis=0)
    known = [f'{name} = Constant <value = {text}> ()' for text, name in constants.items()]
    body = '\n'.join(known + lines)
    name = f'FixedAttention_{hashlib.sha256(body.encode()).hexdigest()[:12]}'
    return f'{name} (q, k, v, table) => (out) {{\n{body}\n}}'


NMS = """
Nms <iou: float, keep: int> (boxes, scores) => (kept) {
  zero = Constant <value_float = 0.0> ()
  first_axis = Constant <value_ints = [0]> ()
  first_axes = Constant <value_ints = [0, 1]> ()
  one = Constant <value_ints = [1]> ()
  column = Constant <value_int = 2> ()
  threshold = Constant <value_float: float = @iou> ()
  most = Constant <value_int: int = @keep> ()
  count = Reshape (most, one)
  one_image = Unsqueeze (boxes, first_axis)
  one_class = Unsqueeze (scores, first_axes)
  chosen = NonMaxSuppression (one_image, one_class, count, threshold, zero)  # image, class, box
  found = Gather <axis = 1> (chosen, column)
  none = ConstantOfShape <value = int64[1] {-1}> (count)
  filled = Concat <axis = 0> (found, none)
  kept = Slice (filled, first_axis, count, first_axis)
}"""

# One region more than there are, so that no level is empty, which not all runtimes take.
ROIS_OF_LEVEL = """
RoisOfLevel <level: int, scale: float, height: int, width: int, sampling_ratio: int, mode: string>
    (feature, rois, levels) => (found) {
  first = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  many = Constant <value_ints = [9223372036854775807]> ()
  number = Constant <value_int: int = @level> ()
  is_here = Equal (levels, number)
  places = NonZero (is_here)
  at = Squeeze (places, first)
  ours = Gather <axis = 0> (rois, at)
  any_region = Constant <value = float[1, 4] {0.0, 0.0, 1.0, 1.0}> ()
  regions = Concat <axis = 0> (any_region, ours)
  count = Shape <end = 1> (regions)
  images = ConstantOfShape <value = int64[1] {0}> (count)
  aligned = RoiAlign <mode = "avg", coordinate_transformation_mode: string = @mode,
      output_height: int = @height, output_width: int = @width,
      sampling_ratio: int = @sampling_ratio, spatial_scale: float = @scale>
      (feature, regions, images)
  found = Slice (aligned, one, many, first)
}"""


def order_of_rois(levels: int) -> str:
    """Regions of one level after the other, in the order in which they were given."""
    found = [f'found{level}' for level in range(levels)]
    places = [f'at{level}' for level in range(levels)]
    search = '\n'.join(
        f"""
  number{level} = Constant <value_int = {level}> ()
  is_here{level} = Equal (levels, number{level})
  places{level} = NonZero (is_here{level})
  at{level} = Squeeze (places{level}, first)"""
        for level in range(levels)
    )
    return f"""
OrderOfRois{levels} (levels, {', '.join(found)}) => (out) {{
  first = Constant <value_ints = [0]> ()
  begin = Constant <value_int = 0> ()
  step = Constant <value_int = 1> ()
  count = Size (levels)
  {search}
  all_found = Concat <axis = 0> ({', '.join(found)})
  order = Concat <axis = 0> ({', '.join(places)})
  numbers = Range (begin, count, step)
  inverse = ScatterElements <axis = 0> (order, order, numbers)
  out = Gather <axis = 0> (all_found, inverse)
}}"""


RESIZE = """
Resize <mode: string> (x, size) => (out) {
  kept = Shape <end = 2> (x)
  sizes = Concat <axis = 0> (kept, size)
  none = Constant <value = float[0] {}> ()
  out = Resize <mode = "linear", coordinate_transformation_mode: string = @mode>
      (x, , , sizes)
}"""

SIZE_GIVEN = """
SizeGiven <height: int, width: int> (image) => (size) {
  one = Constant <value_ints = [1]> ()
  height_number = Constant <value_int: int = @height> ()
  width_number = Constant <value_int: int = @width> ()
  height_size = Reshape (height_number, one)
  width_size = Reshape (width_number, one)
  size = Concat <axis = 0> (height_size, width_size)
}"""

# In float64, as Python computes it: a side that is halfway between two would become the other one.
SIZE_INSIDE = """
SizeInside <longer: float, shorter: float> (image) => (size) {
  least = Constant <value = int64 {1}> ()
  half = Constant <value = double {0.5}> ()
  longer_limit = Constant <value_float: float = @longer> ()
  shorter_limit = Constant <value_float: float = @shorter> ()
  most_long = Cast <to = 11> (longer_limit)
  most_short = Cast <to = 11> (shorter_limit)
  sides = Shape <start = 2> (image)
  long = ReduceMax <keepdims = 0> (sides)
  short = ReduceMin <keepdims = 0> (sides)
  long_exact = Cast <to = 11> (long)
  short_exact = Cast <to = 11> (short)
  exact = Cast <to = 11> (sides)
  factor_of_long = Div (most_long, long_exact)
  factor_of_short = Div (most_short, short_exact)
  factor = Min (factor_of_long, factor_of_short)
  scaled = Mul (exact, factor)
  to_cut = Add (scaled, half)
  rounded = Cast <to = 7> (to_cut)
  size = Max (rounded, least)
}"""

SAMPLES = """
Samples (length, out_length) => (first_place, second_place, of_first, of_second) {
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  half = Constant <value = double {0.5}> ()
  whole = Constant <value = double {1.0}> ()
  unit = Constant <value_float = 1.0> ()
  steps = Constant <value_float = 2048.0> ()
  length_exact = Cast <to = 11> (length)
  out_exact = Cast <to = 11> (out_length)
  growth = Div (out_exact, length_exact)
  scale = Div (whole, growth)
  index = Range (zero, out_length, one)
  index_exact = Cast <to = 11> (index)
  middle = Add (index_exact, half)
  scaled = Mul (middle, scale)
  shifted = Sub (scaled, half)
  at = Cast <to = 1> (shifted)
  first = Floor (at)
  after = Sub (at, first)
  before = Sub (unit, after)
  first_number = Cast <to = 7> (first)
  second_number = Add (first_number, one)
  last = Sub (length, one)
  first_least = Max (first_number, zero)
  second_least = Max (second_number, zero)
  first_place = Min (first_least, last)
  second_place = Min (second_least, last)
  before_steps = Mul (before, steps)
  after_steps = Mul (after, steps)
  before_rounded = Round (before_steps)
  after_rounded = Round (after_steps)
  of_first = Cast <to = 6> (before_rounded)
  of_second = Cast <to = 6> (after_rounded)
}"""

# Letters: the four pixels that one is mixed of, those of the line above first.
RESIZE_IMAGE = """
ResizeImage (image, size) => (out) {
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  column_axis = Constant <value_ints = [1]> ()
  two = Constant <value = int32 {2}> ()
  two_bits = Constant <value = int32 {4}> ()
  four_bits = Constant <value = int32 {16}> ()
  many_bits = Constant <value = int32 {65536}> ()
  sides = Shape <start = 2> (image)
  height = Gather (sides, zero)
  width = Gather (sides, one)
  out_height = Gather (size, zero)
  out_width = Gather (size, one)
  above, below, share_above, share_below = crossformer_mm.Samples (height, out_height)
  left, right, of_left, of_right = crossformer_mm.Samples (width, out_width)
  of_above = Unsqueeze (share_above, column_axis)
  of_below = Unsqueeze (share_below, column_axis)
  row_above = Gather <axis = 2> (image, above)
  row_below = Gather <axis = 2> (image, below)
  pixel_a = Gather <axis = 3> (row_above, left)
  pixel_b = Gather <axis = 3> (row_above, right)
  pixel_c = Gather <axis = 3> (row_below, left)
  pixel_d = Gather <axis = 3> (row_below, right)
  a = Cast <to = 6> (pixel_a)
  b = Cast <to = 6> (pixel_b)
  c = Cast <to = 6> (pixel_c)
  d = Cast <to = 6> (pixel_d)
  a_part = Mul (a, of_left)
  b_part = Mul (b, of_right)
  c_part = Mul (c, of_left)
  d_part = Mul (d, of_right)
  line_above = Add (a_part, b_part)
  line_below = Add (c_part, d_part)
  short_above = Div (line_above, four_bits)
  short_below = Div (line_below, four_bits)
  long_above = Mul (short_above, of_above)
  long_below = Mul (short_below, of_below)
  part_above = Div (long_above, many_bits)
  part_below = Div (long_below, many_bits)
  mixed = Add (part_above, part_below)
  to_cut = Add (mixed, two)
  cut = Div (to_cut, two_bits)
  out = Cast <to = 1> (cut)
}"""


def function_texts() -> List[str]:
    """Every function of the domain but OrderOfRois, of which there is one for each number."""
    attention = MAP_ATTENTION.replace('FILLING', str(FILLING))
    texts = [FIT_RULE, PADDED_AXIS, OFFSETS, attention, NMS, ROIS_OF_LEVEL, RESIZE]
    return texts + [SIZE_GIVEN, SIZE_INSIDE, SAMPLES, RESIZE_IMAGE]
