"""MMDetection's and MMSegmentation's own configs with this backbone: a step, a resumed one, a test.

Their models, data sets, samplers, pipelines, loops, hooks and metrics are as they are, only with
fewer channels, layers and pixels; the files of the data sets are generated.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import cv2
import mmdet
import mmseg
import numpy as np
import pytest
import torch
from mmdet.datasets import CityscapesDataset, CocoDataset, VOCDataset
from mmengine.config import Config, ConfigDict
from mmengine.visualization import Visualizer

from crossformer_mm.checkpoint import read_checkpoint
from crossformer_mm.engine import CarefulRunner

from ..helpers import NO_VALIDATION

CONFIGS = [Path(package.__file__).parent / '.mim' / 'configs' for package in (mmdet, mmseg)]
SIDE = 64
WIDTHS = [16, 32, 64, 128]  # of the backbone's stages


class Base(NamedTuple):
    """A config of theirs, its metric, and what has to be changed besides."""

    file: str
    metric: str
    change: Optional[Callable] = None


# What is made smaller


def smaller(part, key: str = ''):
    """A part of a config with less of everything, the kinds of things as they were."""
    if isinstance(part, dict):
        for name in part:
            part[name] = smaller(part[name], name)
        return part
    if isinstance(part, (list, tuple)):
        if key == 'in_channels':
            return WIDTHS[-len(part) :]
        if isinstance(part, list) and all(isinstance(one, int) and one > 50 for one in part):
            return [max(one // 16, 32) for one in part]  # of shorter sides
        if len(part) == 2 and all(isinstance(one, int) and one >= 200 for one in part):
            return type(part)(one // 16 for one in part)  # an image's size
        return type(part)(smaller(one, key) for one in part)
    if key == 'score_thr':
        return 0.0  # or a model that has learnt nothing detects nothing
    if not isinstance(part, int) or isinstance(part, bool):
        return part
    if key.endswith('channels') or key == 'embed_dims':
        return 32
    if key == 'num_points':
        return min(part, 64)
    few = dict(num_layers=1, num_feats=16, num_queries=20, num_groups=8, times=1)
    return few.get(key, part)


def of_some_steps(base: Base, count: int, work: Path) -> Config:
    """The config, of some iterations, or epochs of one iteration, and a test."""
    (file,) = (folder / base.file for folder in CONFIGS if (folder / base.file).exists())
    cfg = Config.fromfile(file)
    cfg = Config(smaller(cfg._cfg_dict), filename=cfg.filename)
    model = cfg.model.get('detector', cfg.model)
    model.pop('pretrained', None)
    model.backbone = ConfigDict(
        type='CrossFormer',
        out_norm=True,
        out_indices=model.backbone.get('out_indices', (0, 1, 2, 3)),
        arch=dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)),
    )
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.pop('pin_memory', None)
    cfg.update(work_dir=str(work), load_from=None, **NO_VALIDATION, randomness=dict(seed=0))
    cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=-1)
    cfg.default_hooks.checkpoint.pop('save_best', None)
    cfg.train_cfg['max_iters' if 'max_iters' in cfg.train_cfg else 'max_epochs'] = count
    cfg.train_cfg.pop('dynamic_intervals', None)
    if base.change:
        base.change(cfg)
    return cfg


# What is generated


def picture(rng) -> np.ndarray:
    return rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


def write_labels(path: Path, classes: int, rng) -> None:
    """Write a label map of eight stripes."""
    stripes = np.repeat(rng.integers(0, classes, 8, np.uint8), SIDE // 8)
    write(path, np.tile(stripes, (SIDE, 1)))


def coco(root: Path, folder: str, ann_file: str, classes) -> None:
    """Write two images with two objects each, and annotations, of which one is of the last class."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in (1, 2):
        name = f'{number:012d}.png'
        write(root / folder / name, picture(rng))
        images.append(dict(id=number, file_name=name, width=SIDE, height=SIDE))
        for category, x in ((1, 4), (len(classes), 30)):
            corners = [x, 8, x + 30, 8, x + 30, 52, x, 52]
            annotations.append(dict(
                id=len(annotations) + 1, image_id=number, category_id=category, area=30 * 44,
                iscrowd=0, bbox=[x, 8, 30, 44], segmentation=[corners],
            ))  # fmt: skip
    categories = [dict(id=number, name=name) for number, name in enumerate(classes, start=1)]
    content = dict(images=images, annotations=annotations, categories=categories)
    (root / ann_file).parent.mkdir(parents=True, exist_ok=True)
    (root / ann_file).write_text(json.dumps(content))


VOC = f'''
<annotation>
  <size><width>{SIDE}</width><height>{SIDE}</height><depth>3</depth></size>
  <object>
    <name>{VOCDataset.METAINFO['classes'][-1]}</name><difficult>0</difficult>
    <bndbox><xmin>5</xmin><ymin>9</ymin><xmax>60</xmax><ymax>56</ymax></bndbox>
  </object>
</annotation>'''


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """The folder that their configs call data."""
    root = tmp_path_factory.mktemp('files') / 'data'
    rng = np.random.default_rng(1)
    city, ade = root / 'cityscapes', root / 'ade/ADEChallengeData2016'
    classes = CityscapesDataset.METAINFO['classes']
    for split in ('train', 'val'):
        ann_file = f'annotations/instances_{split}2017.json'
        coco(root / 'coco', f'{split}2017', ann_file, CocoDataset.METAINFO['classes'])
        ann_file = f'annotations/instancesonly_filtered_gtFine_{split}.json'
        coco(city, f'leftImg8bit/{split}', ann_file, classes)
        for name in ('town/town_0', 'town/town_1'):
            write(city / f'leftImg8bit/{split}/{name}_leftImg8bit.png', picture(rng))
            write_labels(city / f'gtFine/{split}/{name}_gtFine_labelTrainIds.png', 19, rng)
    semi = root / 'coco/semi_anns'
    semi.mkdir()
    for part in ('1@10', '1@10-unlabeled'):
        everything = root / 'coco/annotations/instances_train2017.json'
        shutil.copy(everything, semi / f'instances_train2017.{part}.json')
    for split in ('training', 'validation'):
        for number in range(2):
            write(ade / f'images/{split}/{number}.jpg', picture(rng))
            write_labels(ade / f'annotations/{split}/{number}.png', 151, rng)

    for year, split in (('2007', 'trainval'), ('2007', 'test'), ('2012', 'trainval')):
        voc, name = root / 'VOCdevkit' / f'VOC{year}', f'{year}_{split}'
        write(voc / 'JPEGImages' / f'{name}.jpg', picture(rng))
        for folder in ('Annotations', 'ImageSets/Main'):
            (voc / folder).mkdir(parents=True, exist_ok=True)
        (voc / f'ImageSets/Main/{split}.txt').write_text(f'{name}\n')
        (voc / f'Annotations/{name}.xml').write_text(VOC)
    return root


# What is changed besides


def without_scripts_of_cityscapes(cfg: Config) -> None:
    """Its own metric needs the package cityscapesscripts."""
    cfg.test_evaluator = [one for one in cfg.test_evaluator if one.type == 'CocoMetric']


def with_cocos_data(cfg: Config) -> None:
    """LVIS needs the package lvis: in the wrapper of classes that are balanced stand COCO's."""
    train, val = (
        dict(
            type='CocoDataset',
            data_root='data/coco/',
            ann_file=f'annotations/instances_{split}2017.json',
            data_prefix=dict(img=f'{split}2017/'),
        )
        for split in ('train', 'val')
    )
    cfg.train_dataloader.dataset.dataset.update(train)
    cfg.test_dataloader.dataset.update(val)
    cfg.test_evaluator.update(type='CocoMetric', ann_file=val['data_root'] + val['ann_file'])
    cfg.model.roi_head.bbox_head.num_classes = cfg.model.roi_head.mask_head.num_classes = 80


def switching(cfg: Config) -> None:
    *steps, last = cfg.train_pipeline
    pipeline = [*steps, dict(type='PhotoMetricDistortion'), last]
    cfg.custom_hooks = [dict(type='PipelineSwitchHook', switch_epoch=1, switch_pipeline=pipeline)]


def alone(cfg: Config) -> None:
    """MMCV's SyncBN cannot be built in a process alone."""
    heads = cfg.model.roi_head
    heads.bbox_head.norm_cfg = heads.mask_head.norm_cfg = dict(type='BN')


def auxiliary(cfg: Config) -> None:
    cfg.model.auxiliary_head.in_channels = WIDTHS[2]


def as_wide_as_it_is(cfg: Config) -> None:
    """The decoder of MMDetection 3.3 encodes positions in 4 x 128 numbers, whatever its width."""

    encoder, decoder = cfg.model.encoder.layer_cfg, cfg.model.decoder.layer_cfg
    for part in (*encoder.values(), *decoder.values(), cfg.model.bbox_head):
        part.embed_dims = 256
    cfg.model.neck.out_channels, cfg.model.positional_encoding.num_feats = 256, 128


def mosaic(cfg: Config) -> None:
    """A mosaic before large scale jittering; float16 needs a GPU."""
    cfg.optim_wrapper.type = 'OptimWrapper'
    inner = cfg.train_dataloader.dataset.dataset
    inner.pipeline, rest = inner.pipeline[:2], inner.pipeline[2:]
    pipeline = [dict(type='Mosaic', img_scale=(SIDE, SIDE)), *rest]
    mixed = dict(type='MultiImageMixDataset', dataset=inner, pipeline=pipeline)
    cfg.train_dataloader.dataset.dataset = mixed


BOXES, MASKS = 'coco/bbox_mAP', 'coco/segm_mAP'
BASES = {
    'Cityscapes, instances': Base(
        'cityscapes/mask-rcnn_r50_fpn_1x_cityscapes.py', MASKS, without_scripts_of_cityscapes
    ),
    'Cityscapes, semantic': Base(
        'upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py', 'mIoU', auxiliary
    ),
    'class balanced': Base(
        'lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py', MASKS, with_cocos_data
    ),
    'copy-paste': Base(
        'simple_copy_paste/mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_syncbn-all_32xb2-ssj-scp-270k_coco.py',
        MASKS,
        alone,
    ),
    'large scale jittering, mosaic': Base(
        'retinanet/retinanet_r50_fpn_8xb8-amp-lsj-200e_coco.py', BOXES, mosaic
    ),
    'DINO': Base('dino/dino-4scale_r50_8xb2-12e_coco.py', BOXES, as_wide_as_it_is),
    'Mask2Former, instances': Base('mask2former/mask2former_r50_8xb2-lsj-50e_coco.py', MASKS),
    'Mask2Former, semantic': Base(
        'mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py', 'mIoU'
    ),
    'SoftTeacher': Base(
        'soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py', BOXES
    ),
    'switched pipeline': Base('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', BOXES, switching),
    'VOC': Base('pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py', 'pascal_voc/mAP'),
}


@pytest.mark.parametrize('name', BASES)
def test_a_base_of_theirs_trains_resumes_and_tests(monkeypatch, data, tmp_path, name):
    monkeypatch.chdir(data.parent)
    results, counts, weights = [], [], []
    for count in (1, 2):
        Visualizer._instance_dict.clear()
        cfg = of_some_steps(BASES[name], count, tmp_path)
        cfg.experiment_name = f'{name} {count}'
        cfg.resume = count > 1
        runner = CarefulRunner.from_cfg(cfg)
        runner.train()
        results.append(runner.test())
        counts.append(runner.iter)
        newest = max(tmp_path.glob('*.pth'), key=lambda path: path.stat().st_mtime)
        weights.append(read_checkpoint(str(newest)))
    # The second training did what the first had not done, and no more.
    assert counts[1] == 2 * counts[0] == weights[1]['meta']['iter'] > 0
    before, after = (checkpoint['state_dict'] for checkpoint in weights)
    layers = [key for key in before if 'backbone.layers' in key and 'teacher' not in key]
    trained = [key for key in layers if before[key].is_floating_point()]
    assert len(trained) > 40
    moved = [key for key in trained if not torch.equal(before[key], after[key])]
    assert len(moved) > 0.6 * len(trained)  # warm-up begins with steps below rounding
    assert all(torch.isfinite(after[key]).all() for key in trained)
    for result in results:
        assert math.isfinite(result[BASES[name].metric])
