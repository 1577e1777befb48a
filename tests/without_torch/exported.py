"""Small models as checkpoints and as exported files, and comparisons of what both predict."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as rle

from crossformer_mm.compat import EXPORT, missing_torch

from ..helpers import (
    ROOT,
    TINY_BACKBONE,
    TINY_MASK_RCNN,
    TINY_RETINANET,
    TINY_SEGMENTOR,
    build_model,
    read_json,
    run_tool,
)

# What imports this is skipped.
if missing_torch(EXPORT):
    pytest.skip(f'export: {missing_torch(EXPORT)}', allow_module_level=True)
pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

PIPELINE = """
test_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale={scale}, keep_ratio=True),
    dict(type='Pack{kind}Inputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]))
"""
DETECTION = PIPELINE.format(scale=(160, 96), kind='Det')
RETINANET = TINY_RETINANET + DETECTION
MASK_RCNN = TINY_MASK_RCNN + DETECTION
SEGMENTOR = TINY_SEGMENTOR + PIPELINE.format(scale=(96, 64), kind='Seg')
CLASSIFIER = f'''
_base_ = {str(ROOT / 'configs/imagenet/cf_s_300e.py')!r}
model = dict(
    data_preprocessor=dict(num_classes=6),
    {TINY_BACKBONE},
    neck=dict(in_channels=16), head=dict(in_channels=16, num_classes=6), train_cfg=None)
test_dataloader = dict(dataset=dict(
    data_root='', metainfo=dict(classes=tuple('abcdef')), pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='ResizeEdge', scale=40, edge='short', backend='pillow', interpolation='bicubic'),
        dict(type='CenterCrop', crop_size=32),
        dict(type='PackInputs')]))
'''
CONFIGS = dict(retinanet=RETINANET, mask_rcnn=MASK_RCNN, segmentor=SEGMENTOR)
OPTIONS = dict(mask_rcnn=['--resize-inside'])
OF_ONE_COLOUR = (3, 4)  # ids of c.png and d_dark.png
# Metadata that the page lists.
PAGE = (ROOT / 'docs/deployment.md').read_text('utf-8')
LISTED = set(re.findall(r'`(\w+)`', re.search(r'The metadata of .*?\n\n', PAGE, re.DOTALL)[0]))
CLASSES = dict(retinanet='abcd', mask_rcnn='abcd', segmentor='abcde')


def spread(model: torch.nn.Module) -> None:
    """Change random weights so that scores reach from below thresholds to near 1."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() > 1 and not name.startswith('backbone.'):
                parameter.normal_(std=1.2 / parameter[0].numel() ** 0.5)
            if name.endswith(('retina_reg.weight', 'rpn_reg.weight', 'fc_reg.weight')):
                parameter.mul_(0.1)
            if name.endswith('retina_cls.bias'):
                parameter.fill_(-3)
            if name == 'head.fc.weight':
                parameter.mul_(4)


class Exported:
    """A small model as checkpoint and as file, and what both predict of the photos.

    Args:
        kind: one of CONFIGS.
        folder: for its files.
        photos: images to predict, and files that are none.
    """

    def __init__(self, kind: str, folder: Path, photos: Path):
        self.config, weights = folder / f'{kind}.py', folder / f'{kind}.pth'
        self.config.write_text(CONFIGS[kind])
        model = build_model(self.config)
        spread(model)
        meta = dict(dataset_meta=dict(classes=tuple(CLASSES[kind])))
        torch.save(dict(state_dict=model.state_dict(), meta=meta), weights)
        self.file, self.photos = folder / f'{kind}.onnx', photos
        arguments = (self.config, weights, '--out', self.file, '--shape', 64, 64, '--threads', 1)
        assert run_tool('export.py', *arguments, *OPTIONS.get(kind, ())) == 0
        self.folder, self.files = folder, sorted(photos.iterdir())
        if kind == 'segmentor':  # of one pixel MMSegmentation draws no label map
            self.files = [file for file in self.files if file.name != 'c.png']

    @functools.cached_property
    def torch(self) -> Path:
        """The folder of predictions by PyTorch."""
        weights, out = self.config.with_suffix('.pth'), self.folder / 'torch'
        assert run_tool('predict.py', self.config, weights, *self.files, '--out', out) == 1
        return out

    @functools.cached_property
    def onnx(self) -> Path:
        """The folder of predictions by ONNX Runtime."""
        out = self.folder / 'onnx'
        assert run_tool('run_onnx.py', self.file, *self.files, '--out', out, '--threads', 1) == 1
        return out

    def both(self, name: str):
        return [read_json(folder / name) for folder in (self.torch, self.onnx)]


def boxes_are_alike(one, other) -> bool:
    return np.abs(np.subtract(one['bbox'], other['bbox'])).max() < 0.05


def assert_one_to_one(theirs, ours, alike=boxes_are_alike):
    """One to one, in any order of almost equal scores. In an image of one colour, boxes at many
    places have the same score, and which of them are kept is open."""
    assert len(theirs) == len(ours)
    left = list(ours)
    for wanted in theirs:
        if wanted['image_id'] in OF_ONE_COLOUR:
            continue
        near = [
            one
            for one in left
            if all(one[key] == wanted[key] for key in ('image_id', 'category_id'))
            and abs(one['score'] - wanted['score']) < 1e-5
            and alike(one, wanted)
        ]
        assert near, wanted
        left.remove(near[0])


def masks_are_alike(one, other) -> bool:
    one, other = one['segmentation'], other['segmentation']
    if one['size'] != other['size']:
        return False
    return rle.iou([one], [other], [False]) >= 0.999 or not rle.area(one) + rle.area(other)
