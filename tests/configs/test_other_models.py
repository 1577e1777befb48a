"""Other models of MMDetection and MMSegmentation take the backbone: they train and they predict.

The models are those of the installed packages' own configs; what a user changes to put CrossFormer
into them is what this file changes: the backbone, and the channels of whatever takes its features.
"""

from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData

from crossformer_mm import CrossFormer

TINY = dict(embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))

# Different for each image and no multiples of any stride: the model's preprocessor pads them.
SHAPES = [(97, 131), (120, 86)]

# Box heads, then instance heads.
DETECTORS = '''
    faster_rcnn/faster-rcnn_r50_fpn_1x_coco cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco
    pafpn/faster-rcnn_r50_pafpn_1x_coco sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco
    fcos/fcos_r50-caffe_fpn_gn-head_1x_coco atss/atss_r50_fpn_1x_coco gfl/gfl_r50_fpn_1x_coco
    vfnet/vfnet_r50_fpn_1x_coco centernet/centernet-update_r50-caffe_fpn_ms-1x_coco
    reppoints/reppoints-moment_r50_fpn_1x_coco yolof/yolof_r50-c5_8xb8-1x_coco
    yolox/yolox_tiny_8xb8-300e_coco detr/detr_r50_8xb2-150e_coco
    conditional_detr/conditional-detr_r50_8xb2-50e_coco dab_detr/dab-detr_r50_8xb2-50e_coco
    deformable_detr/deformable-detr_r50_16xb2-50e_coco dino/dino-4scale_r50_8xb2-12e_coco
'''.split()
INSTANCE_DETECTORS = '''
    solov2/solov2-light_r50_fpn_ms-3x_coco condinst/condinst_r50_fpn_ms-poly-90k_coco_instance
    rtmdet/rtmdet-ins_tiny_8xb32-300e_coco mask2former/mask2former_r50_8xb2-lsj-50e_coco
'''.split()
SEGMENTORS = '''
    fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512 pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512
    deeplabv3plus/deeplabv3plus_r50-d8_4xb4-80k_ade20k-512x512
    segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512
    isanet/isanet_r50-d8_4xb4-80k_ade20k-512x512 ocrnet/ocrnet_hr18_4xb4-80k_ade20k-512x512
    point_rend/pointrend_r50_4xb4-160k_ade20k-512x512
    knet/knet-s3_r50-d8_deeplabv3_8xb2-adamw-80k_ade20k-512x512
    segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512
    maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512
    mask2former/mask2former_r50_8xb2-160k_ade20k-512x512
'''.split()


def name_of(config: str) -> str:
    return config.rpartition('/')[2].rpartition('_')[0]


def config_of(package: str, name: str) -> Config:
    """By path: `mmseg::` in a config finds only a package installed as `mmsegmentation`."""
    folder = Path(find_spec(package).origin).parent / '.mim' / 'configs'
    return Config.fromfile(folder / f'{name}.py')


def dicts_in(node):
    """Every dict of a config, outer ones first."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, (dict, list, tuple)):
            yield from dicts_in(child)


def put_in(model: dict, backbone: dict) -> None:
    """Replace the backbone of a model's config and fit what takes its features.

    As many features go out as before, the last ones: strides (4, 8, 16,) 32 as with a ResNet.
    """
    before = MODELS.build(model['backbone'])
    count = len(getattr(before, 'out_indices', range(4)))
    backbone = dict(backbone, out_indices=tuple(range(4 - count, 4)))
    built = MODELS.build(backbone)
    channels, strides = built.out_channels, built.out_strides
    model['backbone'] = backbone
    model.pop('pretrained', None)

    neck = model.get('neck')
    if neck:
        neck = neck[0] if isinstance(neck, (list, tuple)) else neck
        several = isinstance(neck['in_channels'], (list, tuple))
        neck['in_channels'] = list(channels) if several else channels[-1]
        return
    for head in dicts_in([value for key, value in model.items() if key.endswith('head')]):
        index = head.get('in_index')
        if isinstance(index, int):
            head['in_channels'] = channels[index]
        elif isinstance(index, (list, tuple)):
            head['in_channels'] = [channels[i] for i in index]
        elif isinstance(head.get('in_channels'), (list, tuple)):
            head['in_channels'] = list(channels)
            if 'strides' in head:
                head['strides'] = list(strides)
        if 'c1_in_channels' in head:
            head['c1_in_channels'] = channels[0]


def lighten(model: dict) -> None:
    """Take out what costs time or needs several processes and has nothing to do with features."""
    mosts = dict(num_queries=20, num_proposals=20, num_points=400, max_per_img=20, nms_pre=100)
    for node in dicts_in(model):
        for key, most in mosts.items():
            if isinstance(node.get(key), int):
                node[key] = min(node[key], most)
        for key in ('score_thr', 'mask_thr', 'filter_thr'):  # which untrained heads rarely reach
            if key in node:
                node[key] = 0.0
    # A size to pad to or to crop is one of the data set's images, ours are smaller.
    preprocessor = model['data_preprocessor']
    preprocessor.pop('batch_augments', None)
    if preprocessor['type'] == 'SegDataPreProcessor':
        preprocessor.pop('size', None)
        preprocessor.update(size_divisor=32)
    else:
        # not said where all images would have one size
        preprocessor.setdefault('pad_size_divisor', 32)
        preprocessor.setdefault('pad_mask', True)


@pytest.fixture
def build():
    """Builds the model of a package's config with a tiny CrossFormer for its backbone; for the rest
    of the test modules are looked up in that package."""
    scopes = ExitStack()

    def model_of(package: str, name: str) -> torch.nn.Module:
        scopes.enter_context(DefaultScope.overwrite_default_scope(package))
        cfg = config_of(package, name).model
        put_in(cfg, dict(type='CrossFormer', arch=TINY))
        lighten(cfg)
        model = revert_sync_batchnorm(MODELS.build(cfg))  # no processes to be in step with
        model.init_weights()
        assert isinstance(model.backbone, CrossFormer)
        return model

    with scopes:
        yield model_of


def check_training(model: torch.nn.Module, batch: dict) -> None:
    """Every loss is finite, and all of the backbone learns from them."""
    model.train()
    data = model.data_preprocessor(batch, training=True)
    losses = model(**data, mode='loss')
    total, values = model.parse_losses(losses)
    assert len(values) > 1
    for name, value in values.items():
        assert torch.isfinite(torch.as_tensor(value)).all(), f'{name} is {value}'
    total.backward()
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None, f'{name} gets no gradient'
        assert parameter.grad.isfinite().all(), name
    for stage in model.backbone.layers:
        assert stage.blocks[0].attn.proj.weight.grad.any()


def predict(model: torch.nn.Module, batch: dict) -> list:
    """Evaluate one image after the other, as MMSegmentation does."""
    model.eval()
    samples = []
    for image, sample in zip(batch['inputs'], batch['data_samples']):
        with torch.no_grad():
            samples += model.test_step(dict(inputs=[image], data_samples=[sample]))
    assert [tuple(sample.ori_shape) for sample in samples] == SHAPES
    return samples


def detection_batch(with_mask: bool) -> dict:
    from mmdet.testing import demo_mm_inputs

    images = [(3, *shape) for shape in SHAPES]
    batch = demo_mm_inputs(2, images, num_items=[3, 5], with_mask=with_mask)
    for sample in batch['data_samples']:
        sample.set_metainfo(dict(scale_factor=(1.0, 1.0)))  # as its shapes say
    return batch


def segmentation_batch() -> dict:
    from mmseg.structures import SegDataSample

    samples = []
    for shape in SHAPES:
        sample = SegDataSample(metainfo=dict(img_shape=shape, ori_shape=shape))
        sample.gt_sem_seg = PixelData(data=torch.randint(19, (1, *shape)))
        samples.append(sample)
    images = [torch.randint(256, (3, *shape), dtype=torch.uint8) for shape in SHAPES]
    return dict(inputs=images, data_samples=samples)


@pytest.mark.parametrize('config', DETECTORS + INSTANCE_DETECTORS, ids=name_of)
def test_detector_trains_and_predicts(config, build):
    with_mask = config in INSTANCE_DETECTORS
    model = build('mmdet', config)
    check_training(model, detection_batch(with_mask))
    for sample in predict(model, detection_batch(with_mask)):
        found = sample.pred_instances
        assert len(found) > 0
        assert found.bboxes.shape == (len(found), 4) and found.bboxes.isfinite().all()
        assert found.scores.shape == found.labels.shape == (len(found),)
        assert ((0 <= found.scores) & (found.scores <= 1)).all()
        assert ((0 <= found.labels) & (found.labels < 80)).all()
        assert ('masks' in found) == with_mask
        if with_mask:
            assert found.masks.shape == (len(found), *sample.ori_shape)


@pytest.mark.parametrize('config', SEGMENTORS, ids=name_of)
def test_segmentor_trains_and_predicts(config, build):
    model = build('mmseg', config)
    check_training(model, segmentation_batch())
    for sample in predict(model, segmentation_batch()):
        assert sample.pred_sem_seg.data.shape == (1, *sample.ori_shape)
        assert sample.seg_logits.data.shape == (model.num_classes, *sample.ori_shape)
        assert sample.seg_logits.data.isfinite().all()
        assert torch.equal(sample.pred_sem_seg.data[0], sample.seg_logits.data.argmax(0))
