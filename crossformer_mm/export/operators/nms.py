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


def to_onnx(call, boxes, scores, iou_threshold, keep):
    return call(NMS, [boxes, scores], iou=iou_threshold, keep=keep)
