"""Whole detectors of crossformer_mm/export/models.py: what MMDetection's own prediction returns."""

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope

from crossformer_mm.compat import missing_torch

if missing_torch('2.6'):
    pytest.skip('torch.export.Dim.DYNAMIC came with PyTorch 2.6', allow_module_level=True)
pytest.importorskip('mmdet')
from crossformer_mm.export.models import UnknownModel, WholeDetector  # noqa: E402

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
TEST = dict(
    nms_pre=80,
    min_bbox_size=0,
    score_thr=0.2,
    nms=dict(type='nms', iou_threshold=0.5),
    max_per_img=30,
)
BACKBONE = dict(
    type='CrossFormer',
    arch=dict(embed_dims=16, depths=(2,), num_heads=(2,)),
    merge_sizes=(),
    group_size=(3,),
    interval=(2,),
    out_indices=(0,),
)


def random_model(cfg: dict) -> torch.nn.Module:
    init_default_scope('mmdet')
    torch.manual_seed(0)
    preprocessor = dict(
        type='DetDataPreprocessor', mean=[120.0] * 3, std=[60.0] * 3, pad_size_divisor=32
    )
    neck = dict(type='FPN', in_channels=[16], out_channels=8, num_outs=2)
    model = MODELS.build(
        ConfigDict(data_preprocessor=preprocessor, backbone=BACKBONE, neck=neck, **cfg)
    )
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


def assert_same(model: torch.nn.Module) -> None:
    image = torch.nn.functional.interpolate(
        torch.randint(256, (1, 3, 9, 12)).float(), (61, 83), mode='bilinear'
    )
    image = image.to(torch.uint8)
    found, wanted = WholeDetector(model)(image), of_mmdet(model, image)
    assert len(wanted) > 5
    assert torch.equal(found['labels'], wanted.labels)
    torch.testing.assert_close(found['scores'], wanted.scores)
    torch.testing.assert_close(found['boxes'], wanted.bboxes, atol=1e-3, rtol=0)


@pytest.mark.parametrize('name', list(HEADS))
def test_one_stage_detectors(name):
    assert_same(random_model(dict(type=name, bbox_head=HEADS[name], test_cfg=TEST)))


def test_a_cascade():
    head = dict(
        type='Shared2FCBBoxHead',
        in_channels=8,
        fc_out_channels=8,
        roi_feat_size=7,
        num_classes=3,
        reg_class_agnostic=True,
    )
    extractor = dict(
        type='SingleRoIExtractor',
        roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
        out_channels=8,
        featmap_strides=STRIDES,
        finest_scale=16,
    )
    rpn = dict(type='RPNHead', in_channels=8, feat_channels=8, anchor_generator=ANCHORS)
    rpn_cfg = dict(TEST, nms=dict(type='nms', iou_threshold=0.7), max_per_img=40)
    roi_head = dict(
        type='CascadeRoIHead',
        num_stages=2,
        stage_loss_weights=[1, 0.5],
        bbox_head=[head, head],
        bbox_roi_extractor=extractor,
    )
    test_cfg = dict(rpn=rpn_cfg, rcnn=TEST)
    assert_same(
        random_model(dict(type='CascadeRCNN', rpn_head=rpn, roi_head=roi_head, test_cfg=test_cfg))
    )


def test_what_the_file_cannot_do_is_said():
    model = random_model(dict(type='FCOS', bbox_head=HEADS['FCOS'], test_cfg=TEST))
    model.test_cfg['nms'] = dict(type='soft_nms', iou_threshold=0.5)
    with pytest.raises(UnknownModel, match='nms must be of type nms .* found .*soft_nms'):
        WholeDetector(model)
