"""MMDetection's and MMSegmentation's own configs with this backbone: a step, a resumed one, a test.

Their models, data sets, samplers, pipelines, loops, hooks and metrics are as they are, only with
fewer channels, layers and pixels; the files of the data sets are generated.
"""

import json
import math
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

CONFIGS = {
    package.__name__: Path(package.__file__).parent / '.mim' / 'configs'
    for package in (mmdet, mmseg)
}
SIDE = 64
WIDTHS = [16, 32, 64, 128]  # of the backbone's stages


class Base(NamedTuple):
    """A config of theirs: its library, its file, what has to be changed besides, and the metric."""

    scope: str
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
    if key in (
        'in_channels',
        'out_channels',
        'feat_channels',
        'conv_out_channels',
        'channels',
        'fc_out_channels',
        'embed_dims',
        'feedforward_channels',
    ):
        return 32
    if key == 'num_points':
        return min(part, 64)
    return dict(
        num_layers=1,
        num_feats=16,
        num_queries=20,
        num_groups=8,
        num_workers=0,
        times=1,
        persistent_workers=False,
    ).get(key, part)


def with_this_backbone(model: ConfigDict) -> None:
    given = model.backbone.get('out_indices', (0, 1, 2, 3))
    model.pop('pretrained', None)
    model.backbone = ConfigDict(
        type='CrossFormer',
        out_norm=True,
        out_indices=given,
        arch=dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)),
    )


def of_a_step(base: Base, data: Path, work: Path) -> Config:
    """The config, of one step and a test on generated data."""
    cfg = Config.fromfile(CONFIGS[base.scope] / base.file)
    cfg = Config(smaller(cfg._cfg_dict), filename=cfg.filename)
    with_this_backbone(cfg.model.get('detector', cfg.model))
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.pop('pin_memory', None)
    cfg.merge_from_dict(
        dict(work_dir=str(work), load_from=None, **NO_VALIDATION, randomness=dict(seed=0))
    )
    cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=-1)
    cfg.default_hooks.checkpoint.pop('save_best', None)
    if base.change:
        base.change(cfg)
    rooted(cfg._cfg_dict, str(data) + '/')
    return cfg


def rooted(part, data: str) -> None:
    """Point every path below data/ to the generated files."""
    for key, value in list(part.items() if isinstance(part, dict) else enumerate(part)):
        if isinstance(value, str) and value.startswith('data/'):
            part[key] = data + value[len('data/') :]
        elif isinstance(value, tuple):
            part[key] = list(value) if any(isinstance(one, dict) for one in value) else value
        if isinstance(part[key], (dict, list)):
            rooted(part[key], data)


def steps(cfg: Config, count: int) -> None:
    """Shorten a training to some iterations, or epochs of one iteration."""
    length = 'max_iters' if 'max_iters' in cfg.train_cfg else 'max_epochs'
    cfg.train_cfg[length] = count
    cfg.train_cfg.pop('dynamic_intervals', None)


# What is generated


def picture(rng) -> np.ndarray:
    return rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


def coco(root: Path, folder: str, ann_file: str, classes, count: int = 2) -> None:
    """Images with two objects each, and their annotations, of which one is of the last class."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(1, count + 1):
        name = f'{number:012d}.png'
        if not (root / folder / name).exists():
            write(root / folder / name, picture(rng))
        images.append(dict(id=number, file_name=name, width=SIDE, height=SIDE))
        for category, x in ((1, 4), (len(classes), 30)):
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=number,
                    category_id=category,
                    iscrowd=0,
                    bbox=[x, 8, 30, 44],
                    area=30 * 44,
                    segmentation=[[x, 8, x + 30, 8, x + 30, 52, x, 52]],
                )
            )
    (root / ann_file).parent.mkdir(parents=True, exist_ok=True)
    (root / ann_file).write_text(
        json.dumps(
            dict(
                images=images,
                annotations=annotations,
                categories=[
                    dict(id=number, name=name) for number, name in enumerate(classes, start=1)
                ],
            )
        )
    )


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """A folder with what theirs is called data/."""
    root = tmp_path_factory.mktemp('data')
    classes = CocoDataset.METAINFO['classes']
    for split in ('train', 'val'):
        coco(root / 'coco', f'{split}2017', f'annotations/instances_{split}2017.json', classes)
    for name, count in (('1@10', 2), ('1@10-unlabeled', 4)):
        coco(
            root / 'coco', 'train2017', f'semi_anns/instances_train2017.{name}.json', classes, count
        )

    rng = np.random.default_rng(1)
    city = root / 'cityscapes'
    for split in ('train', 'val'):
        coco(
            city,
            f'leftImg8bit/{split}',
            f'annotations/instancesonly_filtered_gtFine_{split}.json',
            CityscapesDataset.METAINFO['classes'],
        )
        for number in range(2):
            name = f'town_{number:06d}'
            write(city / f'leftImg8bit/{split}/town/{name}_leftImg8bit.png', picture(rng))
            write(
                city / f'gtFine/{split}/town/{name}_gtFine_labelTrainIds.png',
                np.tile(np.repeat(rng.integers(0, 19, 8).astype(np.uint8), 8), (SIDE, 1)),
            )
    for split in ('training', 'validation'):
        for number in range(2):
            write(root / f'ade/ADEChallengeData2016/images/{split}/{number}.jpg', picture(rng))
            write(
                root / f'ade/ADEChallengeData2016/annotations/{split}/{number}.png',
                np.tile(np.repeat(rng.integers(0, 151, 8).astype(np.uint8), 8), (SIDE, 1)),
            )

    for year, split in (('2007', 'trainval'), ('2007', 'test'), ('2012', 'trainval')):
        voc, name = root / 'VOCdevkit' / f'VOC{year}', f'{year}_{split}'
        write(voc / 'JPEGImages' / f'{name}.jpg', picture(rng))
        for folder in ('Annotations', 'ImageSets/Main'):
            (voc / folder).mkdir(parents=True, exist_ok=True)
        (voc / f'ImageSets/Main/{split}.txt').write_text(f'{name}\n')
        (voc / f'Annotations/{name}.xml').write_text(
            f'<annotation><size><width>{SIDE}</width><height>{SIDE}</height><depth>3</depth>'
            f"</size><object><name>{VOCDataset.METAINFO['classes'][-1]}</name>"
            '<difficult>0</difficult><bndbox><xmin>5</xmin><ymin>9</ymin><xmax>60</xmax>'
            '<ymax>56</ymax></bndbox></object></annotation>'
        )
    return root


# What is changed besides


def without_scripts_of_cityscapes(cfg: Config) -> None:
    """Its own metric needs the package cityscapesscripts."""
    cfg.test_evaluator = [one for one in cfg.test_evaluator if one.type == 'CocoMetric']


def with_cocos_data(cfg: Config) -> None:
    """LVIS needs the package lvis: in the wrapper of classes that are balanced stand COCO's."""
    files = dict(type='CocoDataset', data_root='data/coco/')
    cfg.train_dataloader.dataset.dataset.update(
        files, ann_file='annotations/instances_train2017.json', data_prefix=dict(img='train2017/')
    )
    cfg.test_dataloader.dataset.update(
        files, ann_file='annotations/instances_val2017.json', data_prefix=dict(img='val2017/')
    )
    cfg.test_evaluator.update(
        type='CocoMetric', ann_file='data/coco/annotations/instances_val2017.json'
    )
    cfg.model.roi_head.bbox_head.num_classes = cfg.model.roi_head.mask_head.num_classes = 80


def switching(cfg: Config) -> None:
    cfg.custom_hooks = [
        dict(
            type='PipelineSwitchHook',
            switch_epoch=1,
            switch_pipeline=[
                *cfg.train_pipeline[:-1],
                dict(type='PhotoMetricDistortion'),
                cfg.train_pipeline[-1],
            ],
        )
    ]


def alone(cfg: Config) -> None:
    """MMCV's SyncBN cannot be built in a process alone."""
    heads = cfg.model.roi_head
    heads.bbox_head.norm_cfg = heads.mask_head.norm_cfg = dict(type='BN')


def auxiliary(cfg: Config) -> None:
    cfg.model.auxiliary_head.in_channels = WIDTHS[2]


def as_wide_as_it_is(cfg: Config) -> None:
    """The decoder of MMDetection 3.3 encodes positions in 4 x 128 numbers, whatever its width."""

    def widen(part) -> None:
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            if key in ('embed_dims', 'num_feats'):
                part[key] = dict(embed_dims=256, num_feats=128)[key]
            elif isinstance(value, (dict, list)):
                widen(value)

    widen(cfg.model)
    cfg.model.bbox_head.embed_dims = cfg.model.neck.out_channels = 256
    cfg.model.backbone.arch.embed_dims = WIDTHS[0]


def mosaic(cfg: Config) -> None:
    """A mosaic before large scale jittering; float16 needs a GPU."""
    cfg.optim_wrapper.type = 'OptimWrapper'
    inner = cfg.train_dataloader.dataset.dataset
    load, rest = inner.pipeline[:2], inner.pipeline[2:]
    inner.pipeline = load
    cfg.train_dataloader.dataset.dataset = dict(
        type='MultiImageMixDataset',
        dataset=inner,
        pipeline=[dict(type='Mosaic', img_scale=(SIDE, SIDE)), *rest],
    )


FASTER = 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
BASES = {
    'Cityscapes, instances': Base(
        'mmdet',
        'cityscapes/mask-rcnn_r50_fpn_1x_cityscapes.py',
        'coco/segm_mAP',
        without_scripts_of_cityscapes,
    ),
    'Cityscapes, semantic': Base(
        'mmseg', 'upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py', 'mIoU', auxiliary
    ),
    'class balanced': Base(
        'mmdet',
        'lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py',
        'coco/segm_mAP',
        with_cocos_data,
    ),
    'copy-paste': Base(
        'mmdet',
        'simple_copy_paste/mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_syncbn-all_32xb2-ssj-scp-'
        '270k_coco.py',
        'coco/segm_mAP',
        alone,
    ),
    'large scale jittering, mosaic': Base(
        'mmdet', 'retinanet/retinanet_r50_fpn_8xb8-amp-lsj-200e_coco.py', 'coco/bbox_mAP', mosaic
    ),
    'DINO': Base(
        'mmdet', 'dino/dino-4scale_r50_8xb2-12e_coco.py', 'coco/bbox_mAP', as_wide_as_it_is
    ),
    'Mask2Former, instances': Base(
        'mmdet', 'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py', 'coco/segm_mAP'
    ),
    'Mask2Former, semantic': Base(
        'mmseg', 'mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py', 'mIoU'
    ),
    'SoftTeacher': Base(
        'mmdet',
        'soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
        'coco/bbox_mAP',
    ),
    'switched pipeline': Base('mmdet', FASTER, 'coco/bbox_mAP', switching),
    'VOC': Base('mmdet', 'pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py', 'pascal_voc/mAP'),
}


@pytest.mark.parametrize('name', BASES)
def test_a_base_of_theirs_trains_resumes_and_tests(data, tmp_path, name):
    base = BASES[name]
    results, counts, weights = [], [], []
    for count in (1, 2):
        Visualizer._instance_dict.clear()
        cfg = of_a_step(base, data, tmp_path)
        steps(cfg, count)
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
    trained = [
        key
        for key in before
        if 'backbone.layers' in key and 'teacher' not in key and before[key].is_floating_point()
    ]
    assert len(trained) > 40
    moved = [key for key in trained if not torch.equal(before[key], after[key])]
    assert len(moved) > 0.6 * len(trained)  # warm-up begins with steps below rounding
    assert all(torch.isfinite(after[key]).all() for key in trained)
    for result in results:
        assert math.isfinite(result[base.metric])
