"""Trainings that take seconds, of detectors and of a segmentor, and that use random numbers."""

import json
import operator
from pathlib import Path
from typing import NamedTuple

import torch

from crossformer_mm.checkpoint import read_checkpoint

from .helpers import ROOT, ToolProcess, load_script, read_json


class Training(NamedTuple):
    """One kind: its name, and what it changes of a configuration."""

    name: str
    config: str


BACKBONE = '''dict(
    arch=dict(_delete_=True, embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8),
              drop_path_rate=0.3),
    attn_drop_rate=0.1)'''

# The number of images is no multiple of the batch; validation comes between.
DETECTOR = Training(
    'detector',
    f'''
_base_ = {str(ROOT / 'configs/demo/mask_rcnn_shapes.py')!r}
model = dict(
    backbone={BACKBONE}, neck=dict(in_channels=[16, 32, 64, 128], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16), mask_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, conv_out_channels=16, fc_out_channels=32),
        mask_head=dict(in_channels=16, conv_out_channels=16)))
train_dataloader = dict(batch_size=4, dataset=dict(data_root=DATA + '/coco'))
val_dataloader = dict(dataset=dict(data_root=DATA + '/coco'))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=DATA + '/coco/annotations/instances_val2017.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=3, val_interval=2)
default_hooks = dict(logger=dict(interval=1))
''',
)

# With workers that load ahead, averaged weights, and a change of colours.
SEGMENTOR = Training(
    'segmentor',
    f'''
_base_ = {str(ROOT / 'configs/demo/upernet_shapes.py')!r}
model = dict(backbone={BACKBONE}, decode_head=dict(in_channels=[16, 32, 64, 128], channels=16),
             auxiliary_head=dict(in_channels=64, channels=16))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomResize', scale=(96, 96), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(64, 64), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(batch_size=4, num_workers=2, persistent_workers=True,
                        dataset=dict(data_root=DATA + '/ade', pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=DATA + '/ade'))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=11, val_interval=6)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=3))
custom_hooks = [dict(type='EMAHook', momentum=0.1)]
''',
)


# What is quickest: two iterations in an epoch of four images.
ONE_STAGE = Training(
    'one_stage',
    f'''
_base_ = {str(ROOT / 'configs/retinanet/cf_s_1x.py')!r}
model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=16, depths=(1, 1, 2, 1),
                            num_heads=(1, 2, 4, 8), drop_path_rate=0.3), out_norm=True),
    neck=dict(in_channels=[32, 64, 128], out_channels=16),
    bbox_head=dict(num_classes=4, in_channels=16, feat_channels=16, stacked_convs=1),
    test_cfg=dict(score_thr=0.))
metainfo = dict(classes=('disk', 'square', 'triangle', 'star'))
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(48, 48), keep_ratio=True), dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(48, 48), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                                          'scale_factor'))]
dataset = dict(data_root=DATA + '/coco', metainfo=metainfo)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False,
                        dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(num_workers=0, persistent_workers=False,
                      dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=DATA + '/coco/annotations/instances_val2017.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=2, val_interval=9)
default_hooks = dict(logger=dict(interval=1))
randomness = dict(seed=0)
''',
)


def make_data(folder: Path, train: int = 10, val: int = 2, size: int = 64) -> Path:
    """Write a data set of shapes, for detectors and segmentors."""
    shapes = load_script(ROOT / 'tools' / 'make_shapes.py')
    for split, count in (('train', train), ('val', val)):
        shapes.write_split(folder, split, count, size, seed=0)
    return folder


def write_zoo_data(folder: Path) -> Path:
    """Write two images for each split, in the layouts of COCO 2017 and ADE20K, with COCO's classes."""
    from mmdet.datasets import CocoDataset

    names = enumerate(CocoDataset.METAINFO['classes'], start=1)
    categories = [dict(id=number, name=name) for number, name in names]
    for file in make_data(folder, train=2).glob('coco/annotations/*.json'):
        file.write_text(json.dumps(dict(read_json(file), categories=categories)))
    return folder


def write_config(kind: Training, path: Path, data: Path, lines: str = '', **changes) -> Path:
    """Write the configuration of a training on some data, with settings and lines of code added."""
    path.parent.mkdir(exist_ok=True)
    added = ''.join(f'{name} = {value!r}\n' for name, value in changes.items())
    path.write_text(f'{kind.config}{added}{lines}\n'.replace('DATA', repr(str(data))))
    return path


def train(folder: Path, config: Path, *options) -> ToolProcess:
    """Start a training in a folder."""
    return ToolProcess(folder / 'log.txt', 'tools/train.py', config, '--work-dir', folder, *options)


def assert_same_training(one: Path, other: Path) -> None:
    """Assert that two checkpoints agree to the bit in all that a resumed training depends on."""

    def leaves(part, name: str):
        if isinstance(part, (dict, list, tuple)):
            for key, value in part.items() if isinstance(part, dict) else enumerate(part):
                yield from leaves(value, f'{name}.{key}')
        else:
            yield name, part

    one, other = read_checkpoint(str(one)), read_checkpoint(str(other))
    assert one.keys() == other.keys() and {'state_dict', 'optimizer'} <= one.keys()
    for key in one.keys() - {'meta', 'message_hub'}:  # paths, times, the log
        mine, theirs = (dict(leaves(checkpoint[key], key)) for checkpoint in (one, other))
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            equal = torch.equal if torch.is_tensor(value) else operator.eq
            assert equal(value, theirs[name]), name
