"""Configs of dense prediction, as they stand, train a step and test; only data and sizes are small.
Classifiers are in test_pretraining.py.
"""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings

from crossformer_mm.config_parts import innermost
from crossformer_mm.engine.config import prepare_for_cpu, replace_data_root

ROOT = Path(__file__).parent.parent

CONFIGS = ROOT / 'configs'
PUBLISHED = json.loads((ROOT / 'docs' / 'published.json').read_text())
# Baselines that only have more layers than another, or its backbone in another method: what they
# cost is counted in test_model_zoo.py, for which they are built and run.
ALIKE = {
    'mask_rcnn/r101_1x',
    'mask_rcnn/swin_s_1x',
    'retinanet/pvt_m_1x',
    'retinanet/r101_1x',
    'retinanet/swin_t_1x',
}
ZOO = [
    name
    for name in (*PUBLISHED['models'], *PUBLISHED['baselines'])
    if not name.startswith('imagenet/') and name not in ALIKE
]
CATEGORIES = 80
CLASSES = 150
SIDES = (64, 96)


def image_of(generator: np.random.Generator) -> np.ndarray:
    return generator.integers(0, 256, (*SIDES, 3), dtype=np.uint8)


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """Two images for each split, in the layouts of COCO 2017 and of ADE20K, with all classes."""
    from mmdet.datasets import CocoDataset

    root = tmp_path_factory.mktemp('data')
    generator = np.random.default_rng(0)
    categories = [
        dict(id=i + 1, name=name) for i, name in enumerate(CocoDataset.METAINFO['classes'])
    ]
    for split in ('train', 'val'):
        folder = root / 'coco' / f'{split}2017'
        folder.mkdir(parents=True)
        images, annotations = [], []
        for i in range(2):
            cv2.imwrite(str(folder / f'{i}.png'), image_of(generator))
            images.append(dict(id=i, file_name=f'{i}.png', height=SIDES[0], width=SIDES[1]))
            for x, y, side in ((4, 6, 40), (50, 20, 36)):
                corners = [x, y, x + side, y, x + side, y + side, x, y + side]
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=i,
                        category_id=1 + len(annotations) * 13,
                        bbox=[x, y, side, side],
                        area=side * side,
                        iscrowd=0,
                        segmentation=[corners],
                    )
                )
        labels = root / 'coco' / 'annotations'
        labels.mkdir(exist_ok=True)
        (labels / f'instances_{split}2017.json').write_text(
            json.dumps(dict(images=images, annotations=annotations, categories=categories))
        )
    for split in ('training', 'validation'):
        for kind in ('images', 'annotations'):
            (root / 'ade' / kind / split).mkdir(parents=True)
        for i in range(2):
            cv2.imwrite(str(root / 'ade' / 'images' / split / f'{i}.jpg'), image_of(generator))
            cv2.imwrite(
                str(root / 'ade' / 'annotations' / split / f'{i}.png'),
                generator.integers(0, CLASSES + 1, SIDES, dtype=np.uint8),
            )
    return root


def shrink(part) -> None:
    """Adapt a pipeline or model to the size of the images here, so that it finds something."""
    for value in part.values() if isinstance(part, dict) else part:
        if isinstance(value, (dict, list, tuple)):
            shrink(value)
    if not isinstance(part, dict):
        return
    if isinstance(part.get('scale'), tuple):
        part['scale'] = SIDES[::-1]
    if 'scales' in part and part.get('type') == 'RandomChoiceResize':
        part['scales'] = [SIDES[::-1], (72, 48)]
    if 'crop_size' in part:
        part['crop_size'] = (64, 64)
    if part.get('type') == 'SegDataPreProcessor':
        part['size'] = (64, 64)
    if 'score_thr' in part:  # which untrained heads do not reach
        part.update(score_thr=0.0, max_per_img=5)
    if part.get('type') == 'RandomSampler':
        part['num'] = 16
    if 'nms_pre' in part:
        part['nms_pre'] = 100


def small_run(config: str, data: Path, work: Path) -> Runner:
    cfg = Config.fromfile(CONFIGS / f'{config}.py')
    import_modules_from_strings(**cfg.custom_imports)
    cfg.work_dir = str(work)
    cfg.experiment_name = config.replace('/', '_')
    cfg.launcher = 'none'
    prepare_for_cpu(cfg)
    replace_data_root(cfg, str(data / ('coco' if cfg.default_scope == 'mmdet' else 'ade')))
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        shrink(innermost(loader.dataset).pipeline)
    shrink(cfg.model)
    if 'max_epochs' in cfg.train_cfg:
        cfg.train_cfg.max_epochs = 1
        cfg.train_dataloader.batch_size = 2  # both images: one step is an epoch
    else:
        cfg.train_cfg.max_iters = 1
    cfg.train_cfg.val_interval = 10
    cfg.default_hooks.checkpoint = None  # up to 1.5 GB each, and not what is asked here
    cfg.default_hooks.logger.interval = 1
    # The warm-up's first step changes a weight by less than its rounding.
    cfg.param_scheduler = None
    cfg.log_level = 'ERROR'
    return Runner.from_cfg(cfg)


@pytest.mark.parametrize('config', ZOO)
def test_trains_a_step_and_tests(config, data, tmp_path):
    runner = small_run(config, data, tmp_path)
    trained = [
        weight
        for weight in runner.model.backbone.parameters()
        if weight.requires_grad and weight.dim() > 1
    ]
    first, last = trained[0], trained[-1]
    before = [weight.detach().clone() for weight in (first, last)]
    runner.train()
    losses = {
        key: log.current() for key, log in runner.message_hub.log_scalars.items() if 'loss' in key
    }
    assert len(losses) > 1 and all(np.isfinite(loss) for loss in losses.values()), losses
    for old, new in zip(before, (first, last)):
        assert not torch.equal(old, new) and new.isfinite().all()

    metrics = runner.test()
    expected = {
        'retinanet': {'coco/bbox_mAP'},
        'mask_rcnn': {'coco/bbox_mAP', 'coco/segm_mAP'},
        'cascade_mask_rcnn': {'coco/bbox_mAP', 'coco/segm_mAP'},
    }
    expected = expected.get(config.split('/')[0], {'mIoU', 'aAcc'})
    assert expected <= metrics.keys(), metrics
