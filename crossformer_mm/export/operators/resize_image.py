"""Resizing of images as OpenCV does it, to the bit."""

from typing import List, Tuple

import torch
from torch import Tensor

FLOAT, INT32, INT64, DOUBLE = 1, 6, 7, 11  # ONNX's numbers of the types


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


def samples_to_onnx(op, length, out):
    exact_length, exact_out, index, half, one = (
        op.Cast(number, to=DOUBLE) for number in (length, out, op.Range(0, out, 1), 0.5, 1)
    )
    at = op.Cast((index + half) * (one / (exact_out / exact_length)) - half, to=FLOAT)
    first = op.Floor(at)
    after = at - first
    place = op.Cast(first, to=INT64)
    places = [op.Min(op.Max(number, 0), length - 1) for number in (place, place + 1)]
    return places, [op.Cast(op.Round(share * 2048.0), to=INT32) for share in (1.0 - after, after)]


def to_onnx(op, image, height, width, keep_ratio):
    shape = op.Shape(image, start=2)
    if keep_ratio:
        # In float64 as in Python: float32 would round a side halfway between two to the other one.
        sides, half, shorter, longer = (
            op.Cast(number, to=DOUBLE) for number in (shape, 0.5, *sorted((height, width)))
        )
        factor = op.Min(
            longer / op.ReduceMax(sides, keepdims=0), shorter / op.ReduceMin(sides, keepdims=0)
        )
        size = op.Max(op.Cast(sides * factor + half, to=INT64), 1)
        height, width = op.Gather(size, 0), op.Gather(size, 1)
    rows = samples_to_onnx(op, op.Gather(shape, 0), height)
    columns = samples_to_onnx(op, op.Gather(shape, 1), width)
    two, four, sixteen, many = (op.Cast(number, to=INT32) for number in (2, 4, 16, 2**16))
    parts = []
    for row, share in zip(*rows):
        line = op.Gather(image, row, axis=2)
        left, right = (
            op.Cast(op.Gather(line, column, axis=3), to=INT32) * weight
            for column, weight in zip(*columns)
        )
        line = op.Div(left + right, sixteen)
        parts.append(op.Div(line * op.Unsqueeze(share, [1]), many))
    return op.Cast(op.Div(parts[0] + parts[1] + two, four), to=FLOAT)
