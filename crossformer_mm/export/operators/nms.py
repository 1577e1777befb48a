"""Non-maximum suppression."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op('crossformer_mm::nms', mutates_args=())
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, keep: int) -> Tensor:
    """Apply non-maximum suppression to the boxes with a score above 0.

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


def to_onnx(op, boxes, scores, iou_threshold, keep):
    boxes, scores = op.Unsqueeze(boxes, [0]), op.Unsqueeze(scores, [0, 1])
    kept = op.NonMaxSuppression(boxes, scores, [keep], [iou_threshold], [0.0])
    kept = op.Gather(kept, 2, axis=1)  # of image, class, box
    return op.Slice(op.Concat(kept, op.Expand(-1, [keep]), axis=0), [0], [keep], [0])
