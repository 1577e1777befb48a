"""The module ``mmcv._ext`` of an mmcv without compiled operators.

mmcv's Python calls its compiled operators as functions of ``mmcv._ext``. Most of them write into
tensors that they are given. The functions here have the names and arguments of mmcv's and run on
CPUs and GPUs. They cover what MMDetection and MMSegmentation call. Any other operator raises a
RuntimeError when it is called. float16 and bfloat16 inputs are computed in float32.

=======================  ========================================================================
nms                      ``torchvision.ops.nms``
softnms, nms_match       a step for each box that is kept, on the CPU
roi_align                torchvision's operators; not mmcv's ``pool_mode='max'``
deform_conv,             torchvision's operators
modulated_deform_conv
ms_deform_attn           mmcv's own definition in PyTorch
sigmoid_focal_loss       PyTorch
=======================  ========================================================================
"""

from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import torchvision

    torch.ops.torchvision.nms  # noqa: B018
except (ImportError, RuntimeError, AttributeError) as error:
    raise ModuleNotFoundError(
        'mmcv was installed without compiled operators, and the operators of torchvision, which '
        f'crossformer_mm uses instead, are not available ({error}): install the torchvision '
        f'for PyTorch {torch.__version__}, or compile mmcv.',
        name='mmcv._ext',
    ) from error

vision = torch.ops.torchvision


def widen(tensor: Tensor) -> Tensor:
    """Convert to float32 what is narrower."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def differentiate(function: Callable, inputs: Sequence[Tensor], grad: Tensor) -> Sequence[Tensor]:
    """Recompute a function and return the gradient with respect to each input."""
    with torch.enable_grad():
        inputs = [one.detach().requires_grad_() for one in inputs]
        return torch.autograd.grad(function(*inputs), inputs, grad)


# Boxes --------------------------------------------------------------------------------------------


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Return the indices of the kept boxes, best first."""
    # torchvision keeps the first of equal scores; mmcv keeps the one that this sort puts first.
    order = scores.sort(0, descending=True)[1]
    boxes = widen(boxes[order])
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    ranks = torch.arange(len(order), 0, -1, dtype=boxes.dtype, device=boxes.device)
    return order[torchvision.ops.nms(boxes, ranks, in_float32(iou_threshold))]


def in_float32(value: float) -> float:
    """Round as mmcv does: an IoU of 3 / 10 does not exceed a threshold of 0.3."""
    return torch.tensor(value, dtype=torch.float32).item()


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Return the indices of boxes whose decayed scores reach ``min_score``, best first.

    Writes these boxes and scores into ``dets``. ``method``: 0 'naive', 1 'linear', 2 'gaussian'.
    """
    iou_threshold, min_score = in_float32(iou_threshold), in_float32(min_score)
    boxes = boxes.float()
    sides = boxes.T.contiguous()
    # Arrays share the tensors' memory. Small operations cost less on them.
    kept_scores = scores.float().clone()
    left = kept_scores.numpy()
    boxes_at = torch.arange(len(boxes))
    places = boxes_at.numpy()
    decays: Dict[int, Any] = {}
    start, stop = 0, len(boxes)
    while start < stop:
        best = start + int(left[start:stop].argmax())
        for array in (places, left):
            array[start], array[best] = array[best], array[start]
        index = int(places[start])
        if index not in decays:
            # Compute the rows of the boxes that are likely to be next, too.
            ahead = kept_scores[start:stop].topk(min(64, stop - start))[1] + start
            ahead[-1] = start
            rows = boxes_at[ahead]
            overlap = iou(sides[:, rows, None], sides, offset)
            if method == 2:
                factors = (-overlap * overlap / in_float32(sigma)).exp()
            else:
                factors = torch.where(overlap >= iou_threshold, (1 - overlap) * method, 1.0)
            decays = dict(zip(rows.tolist(), factors.numpy()))
        start += 1
        rest = left[start:stop]
        rest *= decays[index][places[start:stop]]
        low = rest < min_score
        if low.any():
            # As in mmcv, the last box moves to where one was dropped. The order decides between
            # equal scores.
            stay = len(low) - int(low.sum())
            dropped = low[:stay].nonzero()[0] + start
            moved = (~low[stay:]).nonzero()[0][::-1] + start + stay
            left[dropped], places[dropped] = left[moved], places[moved]
            stop = start + stay
    kept = boxes_at[:start]
    dets[:start, :4], dets[:start, 4] = boxes[kept], kept_scores[:start]
    return kept


def nms_match(dets: Tensor, iou_threshold: float) -> List[List[int]]:
    """Return a list for each box that NMS keeps: its index and those that it suppresses."""
    groups = []
    order = dets[:, 4].sort(descending=True)[1]
    while len(order):
        sides = dets[order, :4].float().T.contiguous()
        near = iou(sides[:, :64, None], sides, 0) >= in_float32(iou_threshold)
        near.fill_diagonal_(True)  # the IoU of an empty box with itself is NaN
        indices, left = order.numpy(), torch.ones(len(order), dtype=torch.bool).numpy()
        for place, group in enumerate(near.numpy()):
            if left[place]:
                group &= left
                groups.append(indices[group].tolist())
                left &= ~group
        order = order[torch.from_numpy(left)]
    return groups


def iou(one: Tensor, other: Tensor, offset: int) -> Tensor:
    """Intersection over union. Each tensor has left, top, right and bottom in its first axis."""
    area, areas = ((box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (one, other))
    width = torch.minimum(one[2], other[2]).sub_(torch.maximum(one[0], other[0])).add_(offset)
    height = torch.minimum(one[3], other[3]).sub_(torch.maximum(one[1], other[1])).add_(offset)
    both = width.clamp_(min=0).mul_(height.clamp_(min=0))
    return both / (area + areas - both)


# Regions ------------------------------------------------------------------------------------------


def roi_align_forward(
    input, rois, output, argmax_y, argmax_x,
    aligned_height, aligned_width, spatial_scale, sampling_ratio, pool_mode, aligned,
) -> None:  # fmt: skip
    if pool_mode == 0:
        raise_missing("roi_align with pool_mode='max'")
    size = aligned_height, aligned_width
    output.copy_(
        vision.roi_align(widen(input), widen(rois), spatial_scale, *size, sampling_ratio, aligned)
    )


def roi_align_backward(
    grad_output, rois, argmax_y, argmax_x, grad_input,
    aligned_height, aligned_width, spatial_scale, sampling_ratio, pool_mode, aligned,
) -> None:  # fmt: skip
    size = aligned_height, aligned_width
    grad_output, rois = widen(grad_output), widen(rois)
    if torch.are_deterministic_algorithms_enabled():
        # On GPUs the operator's gradient raises then, and this function computes without it.
        def align(input):
            return torchvision.ops.roi_align(
                input, rois, size, spatial_scale, sampling_ratio, aligned
            )

        (gradient,) = differentiate(align, [widen(grad_input)], grad_output)
    else:
        gradient = vision._roi_align_backward(
            grad_output, rois, spatial_scale, *size, *grad_input.shape, sampling_ratio, aligned
        )
    grad_input.copy_(gradient)


# Deformable convolutions --------------------------------------------------------------------------


def deform_conv_forward(
    input, weight, offset, output, columns, ones,
    kW, kH, dW, dH, padW, padH, dilationW, dilationH, group, deformable_group, im2col_step,
) -> None:  # fmt: skip
    geometry = dH, dW, padH, padW, dilationH, dilationW, group, deformable_group
    output.copy_(vision.deform_conv2d(*layer(input, weight, offset), *geometry, False))


def deform_conv_backward_input(
    input, offset, gradOutput, gradInput, gradOffset, weight, columns,
    kW, kH, dW, dH, padW, padH, dilationW, dilationH, group, deformable_group, im2col_step,
) -> None:  # fmt: skip
    geometry = dH, dW, padH, padW, dilationH, dilationW, group, deformable_group
    of_input, of_weight, of_offset, *_ = vision._deform_conv2d_backward(
        widen(gradOutput), *layer(input, weight, offset), *geometry, False
    )
    gradInput.copy_(of_input)
    gradOffset.copy_(of_offset)
    # torchvision computes all gradients at once, mmcv asks for that of the weight next. Both calls
    # get this workspace.
    columns.of_weight = (gradOutput, gradOutput._version, of_weight)


def deform_conv_backward_parameters(
    input, offset, gradOutput, gradWeight, columns, ones,
    kW, kH, dW, dH, padW, padH, dilationW, dilationH, group, deformable_group, im2col_step, scale=1,
) -> None:  # fmt: skip
    known = vars(columns).pop('of_weight', None)
    if known is not None and known[0] is gradOutput and known[1] == gradOutput._version:
        gradient = known[2]
    else:
        geometry = dH, dW, padH, padW, dilationH, dilationW, group, deformable_group
        tensors = layer(input, torch.zeros_like(gradWeight), offset)  # any weight gives the same
        gradient = vision._deform_conv2d_backward(widen(gradOutput), *tensors, *geometry, False)[1]
    gradWeight.copy_(gradient * scale)


def modulated_deform_conv_forward(
    input, weight, bias, ones, offset, mask, output, columns,
    kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    group, deformable_group, with_bias,
) -> None:  # fmt: skip
    geometry = stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group
    tensors = layer(input, weight, offset, mask, bias if with_bias else None)
    output.copy_(vision.deform_conv2d(*tensors, *geometry, True))


def modulated_deform_conv_backward(
    input, weight, bias, ones, offset, mask, columns,
    grad_input, grad_weight, grad_bias, grad_offset, grad_mask, grad_output,
    kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    group, deformable_group, with_bias,
) -> None:  # fmt: skip
    geometry = stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group
    tensors = layer(input, weight, offset, mask, bias if with_bias else None)
    gradients = vision._deform_conv2d_backward(widen(grad_output), *tensors, *geometry, True)
    targets = [grad_input, grad_weight, grad_offset, grad_mask] + [grad_bias] * with_bias
    for gradient, target in zip(gradients, targets):
        target.copy_(gradient)


def layer(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
) -> List[Tensor]:
    """Tensors in the order of torchvision's operators, which do not take None."""
    mask = offset.new_zeros(len(offset), 1) if mask is None else mask
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return [widen(one) for one in (input, weight, offset, mask, bias)]


def ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step) -> Tensor:
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)


def ms_deform_attn_backward(
    value, shapes, starts, locations, weights, grad_output,
    grad_value, grad_sampling_loc, grad_attn_weight, im2col_step,
) -> None:  # fmt: skip
    def attend(value, locations, weights):
        return ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step)

    gradients = differentiate(attend, [value, locations, weights], grad_output)
    for gradient, target in zip(gradients, [grad_value, grad_sampling_loc, grad_attn_weight]):
        target.copy_(gradient)


# Losses -------------------------------------------------------------------------------------------


def sigmoid_focal_loss_forward(input, target, weight, output, gamma, alpha) -> None:
    output.copy_(focal_loss(widen(input), target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(input, target, weight, grad_input, gamma, alpha) -> None:
    def total(input):
        return focal_loss(input, target, weight, gamma, alpha).sum()

    (gradient,) = differentiate(total, [widen(input)], None)
    grad_input.copy_(gradient)


def focal_loss(input, target, weight, gamma, alpha) -> Tensor:
    """Loss of each logit. A target outside the classes is background: no logit is positive."""
    positive = target[:, None] == torch.arange(input.shape[1], device=input.device)
    logit = torch.where(positive, input, -input)
    loss = -torch.where(positive, alpha, 1 - alpha) * (-logit).sigmoid() ** gamma
    return loss * F.logsigmoid(logit) * (weight[target][:, None] if len(weight) else 1)


# The rest -----------------------------------------------------------------------------------------


def get_compiler_version() -> str:
    return f'none, operators of torchvision {torchvision.__version__}'


def get_compiling_cuda_version() -> str:
    return f'none, PyTorch has {torch.version.cuda}'


def raise_missing(name: str) -> None:
    raise RuntimeError(
        f'mmcv was installed without compiled operators, and {name} is not among those that '
        f'crossformer_mm takes from torchvision: compile mmcv, {how_to_compile()}.'
    )


def how_to_compile() -> str:
    """The command that compiles the installed mmcv. A cached build may lack operators, too."""
    install = 'pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall'
    for name in ('onedl-mmcv', 'mmcv', 'mmcv-lite'):
        try:
            version = distribution(name).version
        except PackageNotFoundError:
            continue
        if name == 'mmcv-lite':
            return f'pip uninstall mmcv-lite, then {install} mmcv=={version}'
        return f'{install} --no-binary {name} {name}=={version}'
    return f'{install} onedl-mmcv'


def __getattr__(name: str) -> Callable:
    """mmcv asks for all of its operators when it is imported."""
    if name.startswith('__'):
        raise AttributeError(name)
    return lambda *args, **kwargs: raise_missing(name)
