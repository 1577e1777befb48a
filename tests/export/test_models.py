"""Whole detectors of crossformer_mm/export/models.py, as modules and as ONNX files: what MMDetection's
own prediction returns."""

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope

from crossformer_mm.compat import EXPORT, missing_torch

if missing_torch(EXPORT):
    pytest.skip(f'export: {missing_torch(EXPORT)}', allow_module_level=True)
pytest.importorskip('mmdet')
from crossformer_mm.export import export_any_size  # noqa: E402
from crossformer_mm.export.fixed_size import export_fixed_size, exportable_for  # noqa: E402
from crossformer_mm.export.models import UnknownModel, WholeDetector  # noqa: E402
from crossformer_mm.export.onnx_file import to_onnx  # noqa: E402
from crossformer_mm.export.operators.resize_image import resize_image  # noqa: E402
from crossformer_mm.without_torch.model import paste  # noqa: E402

from ..helpers import ONE_STAGE, run_onnx  # noqa: E402

STRIDES = [4, 8]
ANCHORS = dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=4, scales_per_octave=1)
ANCHORS['strides'] = STRIDES
GROUPS = dict(type='GN', num_groups=2)
COMMON = dict(num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1, norm_cfg=GROUPS)
HEADS = dict(
    FCOS=dict(type='FCOSHead', strides=STRIDES, regress_ranges=((-1, 32), (32, 1e8)), **COMMON),
    ATSS=dict(
        type='ATSSHead',
        anchor_generator=ANCHORS,
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]),
        **COMMON,
    ),
    GFL=dict(type='GFLHead', anchor_generator=ANCHORS, reg_max=6, **COMMON),
)
TEST = dict(nms_pre=80, min_bbox_size=0, score_thr=0.2, max_per_img=30)
TEST['nms'] = dict(type='nms', iou_threshold=0.5)


def random_model(cfg: dict) -> torch.nn.Module:
    init_default_scope('mmdet')
    torch.manual_seed(0)
    cfg = dict(
        data_preprocessor=dict(
            type='DetDataPreprocessor', mean=[120.0] * 3, std=[60.0] * 3, pad_size_divisor=32
        ),
        backbone=dict(ONE_STAGE, type='CrossFormer'),
        neck=dict(type='FPN', in_channels=[16], out_channels=8, num_outs=2),
        **cfg,
    )
    model = MODELS.build(ConfigDict(cfg))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.startswith('backbone.'):
            torch.nn.init.normal_(parameter, std=1.2 / parameter[0].numel() ** 0.5)
    return model.eval().requires_grad_(False)


def of_mmdet(model: torch.nn.Module, image: torch.Tensor):
    """Its own prediction of an RGB image, for which its preprocessor takes BGR."""
    from mmdet.structures import DetDataSample

    sides = tuple(image.shape[2:])
    meta = dict(img_shape=sides, ori_shape=sides, scale_factor=(1.0, 1.0), img_id=0, img_path='')
    data = dict(inputs=[image[0].flip(0)], data_samples=[DetDataSample(metainfo=meta)])
    return model(**model.data_preprocessor(data, False), mode='predict')[0].pred_instances


def in_onnx_runtime(module: WholeDetector, image: torch.Tensor) -> dict:
    """Return the results of its file of one size, which is faster to write.

    Around the backbone, a file of any size is the same; test_run_onnx.py has tests of those.
    """
    pytest.importorskip('onnxscript')
    names = list(module(image))
    program = export_fixed_size(exportable_for(module, [image]), [image])
    file = to_onnx(program, dict(image={}), names, {}).SerializeToString()
    return dict(zip(names, run_onnx(file, names, image=image)))


def assert_same(model: torch.nn.Module) -> None:
    coarse = torch.randint(256, (1, 3, 9, 12)).float()
    image = torch.nn.functional.interpolate(coarse, (61, 83), mode='bilinear').to(torch.uint8)
    module, wanted = WholeDetector(model), of_mmdet(model, image)
    assert len(wanted) > 5
    for found in (module(image), in_onnx_runtime(module, image)):
        assert torch.equal(found['labels'], wanted.labels)
        torch.testing.assert_close(found['scores'], wanted.scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(found['boxes'], wanted.bboxes, atol=0.05, rtol=0)
        assert ('masks' in found) == ('masks' in wanted)
        if 'masks' in found:
            arrays = (found[key].numpy() for key in ('masks', 'boxes'))
            masks = torch.from_numpy(paste(*arrays, *image.shape[2:], 0.5))
            both = (masks & wanted.masks).sum((1, 2)) / (masks | wanted.masks).sum((1, 2))
            assert both[both.isfinite()].min() >= 0.999 and wanted.masks.any()


@pytest.mark.parametrize('name', list(HEADS))
def test_one_stage_detectors(name):
    assert_same(random_model(dict(type=name, bbox_head=HEADS[name], test_cfg=TEST)))


@pytest.mark.parametrize('name', ['FasterRCNN', 'CascadeRCNN'])
def test_two_stage_detectors(name):
    head = dict(type='Shared2FCBBoxHead', in_channels=8, fc_out_channels=8, num_classes=3)
    head['reg_class_agnostic'] = name == 'CascadeRCNN'
    extractor = dict(type='SingleRoIExtractor', featmap_strides=STRIDES, finest_scale=16)
    extractor['roi_layer'] = dict(type='RoIAlign', output_size=7, sampling_ratio=0)
    extractor['out_channels'] = 8
    rpn = dict(type='RPNHead', in_channels=8, feat_channels=8, anchor_generator=ANCHORS)
    rpn_cfg = dict(TEST, nms=dict(type='nms', iou_threshold=0.7), max_per_img=40)
    roi_head = dict(type='StandardRoIHead', bbox_head=head, bbox_roi_extractor=extractor)
    if name == 'CascadeRCNN':  # with masks, by a head for each stage, too
        masks = dict(type='FCNMaskHead', num_convs=1, in_channels=8, conv_out_channels=8)
        roi_head.update(
            type='CascadeRoIHead',
            num_stages=2,
            stage_loss_weights=[1, 0.5],
            bbox_head=[head, head],
            mask_roi_extractor=extractor,
            mask_head=dict(masks, num_classes=3),
        )
    cfgs = dict(train_cfg=None, test_cfg=dict(rpn=rpn_cfg, rcnn=dict(TEST, mask_thr_binary=0.5)))
    assert_same(random_model(dict(type=name, rpn_head=rpn, roi_head=roi_head, **cfgs)))


@pytest.mark.parametrize(
    'kind, rule', [(torch.uint8, (96, 160, True)), (torch.float32, (64, 96, False))], ids=str
)
def test_images_are_resized_in_a_file_as_opencv_does(kind, rule):
    """To the bit, in PyTorch and in ONNX Runtime, of any batch; sizes are those of MMCV."""
    pytest.importorskip('onnxscript')
    *size, keep_ratio = rule

    class Module(torch.nn.Module):
        def forward(self, image):
            return resize_image(image, *rule)

    example = torch.zeros(2, 3, 170, 203, dtype=kind)
    open_sides = dict(image={0: 'batch', 2: 'height', 3: 'width'})
    proto = to_onnx(export_any_size(Module(), inputs=[example]), open_sides, ['out'], {})
    file = proto.SerializeToString()
    random = np.random.default_rng(0)
    # Made larger and smaller, by 2, not at all; sides that are rounded; long and tiny ones.
    shapes = [(60, 80), (75, 51), (427, 640), (48, 80), (192, 320), (96, 160), (64, 96)]
    shapes += [(33, 200), (1, 1), (4000, 30), (1, 70)]
    for height, width in shapes:
        images = random.integers(256, size=(2, height, width, 3), dtype=np.uint8)
        resize = mmcv.imrescale if keep_ratio else mmcv.imresize
        wanted = np.stack([resize(image, tuple(size[::-1])) for image in images])
        given = torch.from_numpy(images).permute(0, 3, 1, 2).to(kind)
        for out in (Module()(given), *run_onnx(file, image=given)):
            np.testing.assert_array_equal(out.permute(0, 2, 3, 1), wanted)


def test_what_the_file_cannot_do_is_said():
    model = random_model(dict(type='FCOS', bbox_head=HEADS['FCOS'], test_cfg=TEST))
    model.test_cfg['nms'] = dict(type='soft_nms', iou_threshold=0.5)
    with pytest.raises(UnknownModel, match='nms must be of type nms .* found .*soft_nms'):
        WholeDetector(model)
