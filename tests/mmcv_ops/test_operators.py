"""mmcv without compiled operators computes with torchvision's, as compiled ones do.

Where mmcv is compiled, its operators are what the functions of ``mmcv_ops`` are compared with.
Where it is not, definitions in float64 are.
"""

import importlib.util
import itertools
import math
import sys
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from crossformer_mm import mmcv_ops

try:
    spec = importlib.util.spec_from_file_location('ours', mmcv_ops.OPERATORS)
    ours = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ours)
except ModuleNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)
COMPILED = importlib.util.find_spec('mmcv._ext').origin != mmcv_ops.OPERATORS
compiled_only = pytest.mark.skipif(not COMPILED, reason='mmcv is not compiled')

from mmcv import ops  # noqa: E402


@contextmanager
def operators(module):
    """Make mmcv's Python code call the operators of a module."""
    with pytest.MonkeyPatch.context() as patch:
        for name, user in [*sys.modules.items()]:
            if name.startswith('mmcv.ops.') and hasattr(user, 'ext_module'):
                patch.setattr(user, 'ext_module', module)
        yield


def run(call, *inputs, module=ours):
    """Outputs of a call, and gradients with respect to the inputs of floating point."""
    inputs = [one.clone().requires_grad_() for one in inputs]
    with operators(module):
        out = call(*inputs)
        up = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
        return [out.detach(), *torch.autograd.grad(out, inputs, up)]


def run_compiled(call, *inputs):
    return run(call, *inputs, module=sys.modules['mmcv._ext'])


def random_boxes(count, size=100, most=40):
    corner = torch.rand(count, 2) * size
    return torch.cat([corner, corner + 1 + torch.rand(count, 2) * most], 1)


def whole_boxes(count, side=20):
    """Boxes whose IoUs are often equal to a threshold."""
    corner = torch.randint(side, (count, 2))
    return torch.cat([corner, corner + torch.randint(1, 12, (count, 2))], 1).float()


def iou(one, other, offset=0):
    width = min(one[2], other[2]) - max(one[0], other[0]) + offset
    height = min(one[3], other[3]) - max(one[1], other[1]) + offset
    both = max(width, 0) * max(height, 0)
    areas = [(b[2] - b[0] + offset) * (b[3] - b[1] + offset) for b in (one, other)]
    return both / (sum(areas) - both) if sum(areas) > both else math.nan


SCORES = {'random': lambda n: torch.rand(n), 'ties': lambda n: torch.randint(1, 6, (n,)) / 5}


# Boxes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('scores', SCORES)
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('count', [0, 1, 60])
def test_nms_keeps_what_the_definition_keeps(count, offset, scores):
    boxes, scores = whole_boxes(count), SCORES[scores](count)
    with operators(ours):
        dets, kept = ops.nms(boxes, scores, 0.4, offset=offset)
    left, wanted = scores.sort(descending=True)[1].tolist(), []
    while left:
        wanted.append(left.pop(0))
        box = boxes[wanted[-1]].tolist()
        # in whole numbers, so that an IoU of 2 / 5 equals the threshold
        left = [i for i in left if not round(iou(box, boxes[i].tolist(), offset), 9) > 0.4]
    assert kept.tolist() == wanted
    assert torch.equal(dets, torch.cat([boxes, scores[:, None]], 1)[kept])


def test_nms_rounds_the_threshold_to_float32():
    boxes = torch.tensor([[0.0, 0, 10, 1], [0, 0, 3, 1]])
    for threshold in (0.3, 0.7):
        boxes[1, 2] = round(threshold * 10)
        assert ours.nms(boxes, torch.tensor([2.0, 1.0]), threshold, 0).tolist() == [0, 1]


@compiled_only
@pytest.mark.parametrize('scores', SCORES)
@pytest.mark.parametrize('threshold', [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize('offset', [0, 1])
def test_nms_equals_the_compiled_operator(offset, threshold, scores):
    theirs = sys.modules['mmcv._ext']
    options = dict(iou_threshold=threshold, offset=offset)
    for boxes in (random_boxes(500), whole_boxes(2000, 60), torch.zeros(5, 4), torch.zeros(0, 4)):
        given = boxes, SCORES[scores](len(boxes))
        assert torch.equal(ours.nms(*given, threshold, offset), theirs.nms(*given, **options))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_nms_takes_other_types(dtype):
    boxes, scores = whole_boxes(50).to(dtype), torch.rand(50)
    assert torch.equal(ours.nms(boxes, scores, 0.5, 0), ours.nms(boxes.float(), scores, 0.5, 0))


METHODS = ['naive', 'linear', 'gaussian']


def soft_nms_by_definition(boxes, scores, threshold, sigma, least, method, offset):
    left, kept = dict(enumerate(scores)), []
    while left:
        best = max(left, key=left.get)
        kept.append((best, left.pop(best)))
        for index in list(left):
            overlap = iou(boxes[best], boxes[index], offset)
            near = overlap >= threshold
            left[index] *= dict(
                naive=0.0 if near else 1.0,
                linear=1 - overlap if near else 1.0,
                gaussian=math.exp(-(overlap**2) / sigma),
            )[method]
            if left[index] < least:
                del left[index]
    return kept


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('count', [0, 1, 150])
def test_soft_nms_gives_the_scores_of_the_definition(count, offset, method):
    boxes, scores = random_boxes(count), torch.rand(count)
    with operators(ours):
        dets, kept = ops.soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
    wanted = soft_nms_by_definition(boxes.tolist(), scores.tolist(), 0.3, 0.5, 0.05, method, offset)
    assert kept.tolist() == [index for index, _ in wanted]
    assert dets[:, 4].tolist() == pytest.approx([score for _, score in wanted], abs=1e-5)
    assert torch.equal(dets[:, :4], boxes[kept])


@compiled_only
@pytest.mark.parametrize('scores', SCORES)
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('offset', [0, 1])
def test_soft_nms_equals_the_compiled_operator(offset, method, scores):
    cases = (random_boxes(300), 0.05), (random_boxes(60, 30), 0.3), (random_boxes(9), 2)
    for boxes, least in cases:
        given = boxes, SCORES[scores](len(boxes)), 0.3, 0.5, least, method, offset
        wanted = ops.soft_nms(*given)
        with operators(ours):
            got = ops.soft_nms(*given)
        assert torch.equal(got[1], wanted[1])
        torch.testing.assert_close(got[0], wanted[0], rtol=1e-6, atol=0)


def test_nms_match_groups_each_box_with_those_it_suppresses():
    boxes, scores = whole_boxes(150), torch.rand(150)
    with operators(ours):
        groups = ops.nms_match(torch.cat([boxes, scores[:, None]], 1), 0.5)
    left, wanted = scores.argsort(descending=True).tolist(), []
    while left:
        box = boxes[left[0]].tolist()
        near = [i for i in left if i == left[0] or iou(box, boxes[i].tolist()) >= 0.5]
        wanted.append(near)
        left = [i for i in left if i not in near]
    assert [group.tolist() for group in groups] == wanted


@compiled_only
def test_nms_match_equals_the_compiled_operator():
    for boxes in (random_boxes(200), whole_boxes(300), torch.zeros(3, 4)):
        dets = torch.cat([boxes, torch.rand(len(boxes), 1)], 1)
        wanted = [group.tolist() for group in ops.nms_match(dets, 0.6)]
        with operators(ours):
            assert [group.tolist() for group in ops.nms_match(dets, 0.6)] == wanted


# Regions ------------------------------------------------------------------------------------------

# Partly and wholly outside the map, without extent, at its border.
ODD = [[0, 0, 0, 0], [10, 10, 10, 10], [-50, -50, -20, -20], [-30, -30, 40, 40], [60, 60, 900, 900]]


def regions(count, batch=3):
    boxes = torch.cat([random_boxes(count), torch.tensor(ODD, dtype=torch.float)])
    return torch.cat([torch.randint(batch, (len(boxes), 1)).float(), boxes], 1)


def roi_align_by_definition(x, rois, size, scale, ratio, aligned):
    """Means of bilinear samples, a sample at a time, in float64."""
    x, (high, wide) = x.double(), x.shape[2:]
    out = []
    for batch, *box in rois.double().tolist():
        left, top, right, bottom = (side * scale - 0.5 * aligned for side in box)
        width, height = right - left, bottom - top
        if not aligned:
            width, height = max(width, 1), max(height, 1)
        bins = [height / size[0], width / size[1]]
        counts = [ratio or math.ceil(one) for one in bins]
        for i, j in itertools.product(*map(range, size)):
            total = x.new_zeros(x.shape[1])
            for a, b in itertools.product(*map(range, counts)):
                v = top + bins[0] * (i + (a + 0.5) / counts[0])
                u = left + bins[1] * (j + (b + 0.5) / counts[1])
                if not (-1 <= v <= high and -1 <= u <= wide):
                    continue
                v, u = (min(max(at, 0), side - 1) for at, side in ((v, high), (u, wide)))
                v0, u0 = int(v), int(u)
                for p, q in itertools.product((0, 1), (0, 1)):
                    weight = (1 - abs(v - v0 - p)) * (1 - abs(u - u0 - q))
                    if weight:
                        total = total + weight * x[int(batch), :, v0 + p, u0 + q]
            out.append(total / max(counts[0] * counts[1], 1))
    return torch.stack(out).view(len(rois), *size, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('ratio', [0, 2])
def test_roi_align_gives_values_and_gradients_of_the_definition(ratio, aligned):
    x, rois = torch.randn(3, 2, 12, 17), regions(4)
    given = rois, (3, 2), 0.25, ratio

    def align(x):
        return ops.roi_align(x, *given, 'avg', aligned)

    def define(x):
        return roi_align_by_definition(x, *given, aligned).to(x)

    torch.testing.assert_close(run(align, x), run(define, x), rtol=1e-4, atol=1e-5)


@compiled_only
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('ratio', [0, 1, 3])
@pytest.mark.parametrize('count', [0, 30])
def test_roi_align_equals_the_compiled_operator(count, ratio, aligned):
    x, rois = torch.randn(3, 8, 32, 64), regions(count)[: count + 5 if count else 0]

    def align(x):
        return ops.roi_align(x, rois, (7, 5), 0.25, ratio, 'avg', aligned)

    assert all(map(torch.equal, run(align, x), run_compiled(align, x)))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_roi_align_computes_narrow_types_in_float32(dtype):
    x, rois = torch.randn(3, 2, 12, 17).to(dtype), regions(4).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)

    def align(x):
        return ops.roi_align(x, rois.to(x.dtype), (3, 2), 0.25, 0, 'avg', True)

    for got, wanted in zip(run(align, x), run(align, x.to(wide))):
        assert got.dtype == dtype
        assert torch.equal(got, wanted.to(dtype)) or dtype != torch.float64


def test_deterministic_gradient_of_roi_align_is_left_to_torchvision(monkeypatch):
    """Its function avoids the operator whose gradient raises on GPUs."""
    x, rois = torch.randn(3, 2, 12, 17), regions(4)

    def align(x):
        return ops.roi_align(x, rois, (3, 2), 0.25, 0, 'avg', True)

    wanted = run(align, x)
    function = mock.Mock(wraps=ours.torchvision.ops.roi_align)
    monkeypatch.setattr(ours.torchvision.ops, 'roi_align', function)
    torch.use_deterministic_algorithms(True)
    try:
        got = run(align, x)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(got, wanted)
    assert function.call_count == 1


# Deformable convolutions --------------------------------------------------------------------------

# stride, padding, dilation, groups, deformable groups
LAYERS = [(1, 1, 1, 1, 1), (2, 1, 1, 1, 4), (1, 2, 2, 2, 2), (1, 0, 1, 4, 1)]


def deformable(x, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups):
    """Samples at the offset positions, then a product with the weight, in float64."""
    x, offset, mask, weight, bias = (one.double() for one in (x, offset, mask, weight, bias))
    batch, channels, high, wide = x.shape
    size, (rows, columns) = weight.shape[2:], offset.shape[2:]
    offset = offset.view(batch, deform_groups, -1, 2, rows, columns)
    mask = mask.view(batch, deform_groups, 1, -1, rows, columns)
    samples = []
    for k, (i, j) in enumerate(itertools.product(*map(range, size))):
        v = torch.arange(rows)[:, None] * stride - padding + i * dilation + offset[:, :, k, 0]
        u = torch.arange(columns) * stride - padding + j * dilation + offset[:, :, k, 1]
        grid = torch.stack([2 * u / (wide - 1) - 1, 2 * v / (high - 1) - 1], -1).flatten(0, 1)
        parts = x.reshape(batch * deform_groups, -1, high, wide)
        sampled = F.grid_sample(parts, grid, align_corners=True)
        samples.append(sampled.view(batch, deform_groups, -1, rows, columns))
    samples = (torch.stack(samples, 3) * mask).view(batch, groups, -1, len(samples), rows, columns)
    weight = weight.view(groups, len(weight) // groups, channels // groups, -1)
    return torch.einsum('bgckhw,gock->bgohw', samples, weight).flatten(1, 2) + bias[:, None, None]


def layer_inputs(stride, padding, dilation, groups, deform_groups):
    sides = [(one + 2 * padding - 2 * dilation - 1) // stride + 1 for one in (9, 11)]
    return (
        torch.randn(2, 8, 9, 11),
        torch.randn(2, 18 * deform_groups, *sides) * 2,
        torch.rand(2, 9 * deform_groups, *sides),
        torch.randn(8, 8 // groups, 3, 3),
        torch.randn(8),
    )


@pytest.mark.parametrize('layer', LAYERS)
def test_deform_conv_gives_values_and_gradients_of_the_definition(layer):
    x, offset, mask, weight, bias = layer_inputs(*layer)

    def define(x, offset, weight):
        return deformable(x, offset, torch.ones_like(mask), weight, torch.zeros(8), *layer).float()

    got = run(lambda *inputs: ops.deform_conv2d(*inputs, *layer), x, offset, weight)
    torch.testing.assert_close(got, run(define, x, offset, weight), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('layer', LAYERS)
def test_modulated_deform_conv_gives_values_and_gradients_of_the_definition(layer):
    inputs = layer_inputs(*layer)
    got = run(lambda *inputs: ops.modulated_deform_conv2d(*inputs, *layer), *inputs)
    wanted = run(lambda *inputs: deformable(*inputs, *layer).float(), *inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@compiled_only
@pytest.mark.parametrize('layer', LAYERS)
def test_deformable_convolutions_equal_the_compiled_operators(layer):
    x, offset, mask, weight, bias = layer_inputs(*layer)

    def plain(*inputs):
        return ops.deform_conv2d(*inputs, *layer)

    def modulated(x, offset, mask, weight, bias=None):
        return ops.modulated_deform_conv2d(x, offset, mask, weight, bias, *layer)

    for call, inputs in (
        (plain, [x, offset, weight]),
        (modulated, [x, offset, mask, weight, bias]),
        (modulated, [x, offset, mask, weight]),
    ):
        wanted = run_compiled(call, *inputs)
        torch.testing.assert_close(run(call, *inputs), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_deformable_convolutions_compute_narrow_types_in_float32(dtype):
    inputs = [one.to(dtype) for one in layer_inputs(*LAYERS[0])]

    def conv(*inputs):
        return ops.modulated_deform_conv2d(*inputs, *LAYERS[0])

    for got, wanted in zip(run(conv, *inputs), run(conv, *(one.float() for one in inputs))):
        assert got.dtype == dtype
        # only what comes in and goes out is rounded
        assert (got - wanted).abs().max() <= 0.01 * wanted.abs().max()


def test_gradients_of_deform_conv_are_computed_once(monkeypatch):
    x, offset, _, weight, _ = layer_inputs(*LAYERS[0])
    torchvision = mock.Mock(wraps=ours.vision)
    monkeypatch.setattr(ours, 'vision', torchvision)
    run(lambda *inputs: ops.deform_conv2d(*inputs, *LAYERS[0]), x, offset, weight)
    assert torchvision._deform_conv2d_backward.call_count == 1


def test_gradients_of_deform_conv_are_those_of_each_backward_pass():
    x, offset, _, weight, _ = (one.requires_grad_() for one in layer_inputs(*LAYERS[0]))
    with operators(ours):
        out = ops.deform_conv2d(x, offset, weight, *LAYERS[0])
        up = torch.ones_like(out)
        (once,) = torch.autograd.grad(out, weight, up, retain_graph=True)
        torch.autograd.grad(out, x, up, retain_graph=True)
        (twice,) = torch.autograd.grad(out, weight, up.mul_(2))
    torch.testing.assert_close(twice, 2 * once)


def test_multi_scale_attention_gives_values_and_gradients_of_the_definition():
    from mmcv.ops import multi_scale_deform_attn as theirs

    shapes, starts = torch.tensor([[5, 7], [3, 4]]), torch.tensor([0, 35])
    inputs = (torch.randn(2, 47, 2, 4), torch.rand(2, 6, 2, 2, 3, 2), torch.rand(2, 6, 2, 2, 3))

    def attend(value, places, weights):
        function = theirs.MultiScaleDeformableAttnFunction.apply
        return function(value, shapes, starts, places, weights, 64)

    def define(value, places, weights):
        return theirs.multi_scale_deformable_attn_pytorch(value, shapes, places, weights)

    torch.testing.assert_close(run(attend, *inputs), run(define, *inputs))


# Losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('reduction', ['none', 'sum', 'mean'])
@pytest.mark.parametrize('weighted', [False, True])
def test_focal_loss_gives_values_and_gradients_of_the_formula(weighted, reduction):
    x, weight = torch.randn(40, 6) * 5, torch.rand(6) + 0.5 if weighted else None
    target = torch.randint(6 if weighted else 7, (40,))  # 6: background

    def define(x):
        p = x.double().sigmoid()
        positive, negative = -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()
        loss = torch.where(F.one_hot(target, 7)[:, :6].bool(), positive, negative)
        if weighted:
            loss = loss * weight[target][:, None]
        return dict(none=loss, sum=loss.sum(), mean=loss.sum() / 40)[reduction].float()

    def compute(x):
        return ops.sigmoid_focal_loss(x, target, 2.0, 0.25, weight, reduction)

    torch.testing.assert_close(run(compute, x), run(define, x), rtol=1e-4, atol=1e-5)


def test_a_missing_operator_says_which_and_how_to_compile():
    x = torch.zeros(3, 1, 4, 4)
    for call, name in (
        (lambda x: ours.carafe_forward(x), 'carafe_forward'),
        (lambda x: ops.roi_align(x, regions(1), 2, 1.0, 0, 'max'), "pool_mode='max'"),
    ):
        with pytest.raises(RuntimeError) as error:
            run(call, x)
        said = str(error.value)
        assert name in said and 'pip install --no-build-isolation' in said and '\n' not in said
