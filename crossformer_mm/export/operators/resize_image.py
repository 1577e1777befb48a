"""Resizing of images as OpenCV does it, to the bit."""

from typing import List, Tuple

import torch
from torch import Tensor


@torch.library.custom_op('crossformer_mm::resize_image', mutates_args=())
def resize_image(image: Tensor, height: int, width: int, keep_ratio: bool) -> Tensor:
    """Resize images as a test pipeline's Resize does, to the bit.

    OpenCV's bilinear resizing of bytes uses weights that are multiples of 1/2048, and drops low
    bits between its steps.

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


@resize_image.register_fake
def _(image, height, width, keep_ratio):
    sides = [torch.library.get_ctx().new_dynamic_size(min=1) for _ in range(2)]
    return image.new_empty(*image.shape[:2], *sides, dtype=torch.float32)


def samples(length: int, out: int, device) -> Tuple[List[Tensor], List[Tensor]]:
    """Compute the two source positions of each output position, and their weights times 2048.

    Args:
        length: of the axis.
        out: number of output positions.
    """
    at = (torch.arange(out, dtype=torch.float64, device=device) + 0.5) * (1 / (out / length)) - 0.5
    at = at.float()
    first = at.floor()
    after = at - first
    places = [(first.long() + step).clamp(0, length - 1) for step in (0, 1)]
    return places, [(share * 2048).round().int() for share in (1 - after, after)]


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


SIZE_GIVEN = """
SizeGiven <height: int, width: int> (image) => (size) {
  one = Constant <value_ints = [1]> ()
  height_number = Constant <value_int: int = @height> ()
  width_number = Constant <value_int: int = @width> ()
  height_size = Reshape (height_number, one)
  width_size = Reshape (width_number, one)
  size = Concat <axis = 0> (height_size, width_size)
}"""


# In float64 as in Python: float32 would round a side halfway between two to the other one.
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


# a, b: source pixels in the row above; c, d: those in the row below.
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


def to_onnx(call, image, height, width, keep_ratio):
    if keep_ratio:
        limits = dict(longer=float(max(height, width)), shorter=float(min(height, width)))
        size = call(SIZE_INSIDE, [image], **limits)
    else:
        size = call(SIZE_GIVEN, [image], height=height, width=width)
    return call(RESIZE_IMAGE, [image, size])
