"""Features of regions, each from a level of its own."""

from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op('crossformer_mm::roi_features', mutates_args=())
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


# One extra region, so that no level is empty: not all runtimes accept that.
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
    """Write an ONNX function that joins the features of all levels in the order of the regions."""
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


def to_onnx(call, features, rois, levels, scales, height, width, sampling_ratio, aligned):
    found = [
        call(
            ROIS_OF_LEVEL,
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
    return call(order_of_rois(len(found)), [levels, *found])
