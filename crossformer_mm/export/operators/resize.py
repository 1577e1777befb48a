"""Bilinear resizing of feature maps."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op('crossformer_mm::resize', mutates_args=())
def resize(x: Tensor, size: Tensor, align_corners: bool) -> Tensor:
    """Resize bilinearly to a size that is given as a tensor.

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


def to_onnx(op, x, size, align_corners):
    sizes = op.Concat(op.Shape(x, end=2), size, axis=0)
    mode = 'align_corners' if align_corners else 'half_pixel'
    return op.Resize(x, None, None, sizes, mode='linear', coordinate_transformation_mode=mode)
