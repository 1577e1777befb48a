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


def to_onnx(op, features, rois, levels, scales, height, width, sampling_ratio, aligned):
    found, places = [], []
    for level, (feature, scale) in enumerate(zip(features, scales)):
        here = op.Squeeze(op.NonZero(op.Equal(levels, level)), [0])
        # One extra region, so that no level is empty: not all runtimes accept that.
        extra = op.Reshape([0.0, 0.0, 1.0, 1.0], [1, 4])
        regions = op.Concat(extra, op.Gather(rois, here), axis=0)
        out = op.RoiAlign(
            feature,
            regions,
            op.Expand(0, op.Shape(regions, end=1)),  # the image of each
            coordinate_transformation_mode='half_pixel' if aligned else 'output_half_pixel',
            output_height=height,
            output_width=width,
            sampling_ratio=sampling_ratio,
            spatial_scale=scale,
        )
        found.append(op.Slice(out, [1], [2**63 - 1], [0]))
        places.append(here)
    order = op.Concat(*places, axis=0)
    inverse = op.ScatterElements(order, order, op.Range(0, op.Size(levels), 1))
    return op.Gather(op.Concat(*found, axis=0), inverse)
