"""Configs of dense prediction, as they stand, train a step and test; only data and sizes are small.
Classifiers are in test_pretraining.py.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings

from crossformer_mm.engine.config import prepare_for_cpu, replace_data_root

from ..helpers import ROOT, shorten

CONFIGS = ROOT / 'configs'
PUBLISHED = json.loads((ROOT / 'docs' / 'model_zoo.json').read_text())
# Of a folder, the smallest CrossFormer and CrossFormer++ of each schedule, and baselines of another
# backbone or method. What the larger ones cost is counted in test_model_zoo.py, which builds and runs them.
LARGER = re.compile(r'/(cf_[bl]|cfpp_b|swin_s|r101)_|retinanet/(pvt|swin)')
ZOO = [
    name
    for name in (*PUBLISHED['models'], *PUBLISHED['baselines'])
    if not name.startswith('imagenet/') and not LARGER.search(name)
]


def small_run(config: str, data: Path, work: Path) -> Runner:
    cfg = Config.fromfile(CONFIGS / f'{config}.py')
    import_modules_from_strings(**cfg.custom_imports)
    cfg.work_dir = str(work)
    cfg.experiment_name = config.replace('/', '_')
    cfg.launcher = 'none'
    prepare_for_cpu(cfg)
    replace_data_root(cfg, str(data / ('coco' if cfg.default_scope == 'mmdet' else 'ade')))
    shorten(cfg, length=1)
    cfg.train_dataloader.batch_size = 2  # both images: one step is an epoch
    cfg.default_hooks.checkpoint = None  # up to 1.5 GB each, and not what is asked here
    cfg.default_hooks.logger.interval = 1
    # The warm-up's first step changes a weight by less than its rounding.
    cfg.param_scheduler = None
    cfg.log_level = 'ERROR'
    return Runner.from_cfg(cfg)


@pytest.mark.parametrize('config', ZOO)
def test_trains_a_step_and_tests(config, zoo_data, tmp_path):
    runner = small_run(config, zoo_data, tmp_path)
    weights = runner.model.backbone.parameters()
    first, *_, last = (one for one in weights if one.requires_grad and one.dim() > 1)
    before = [weight.detach().clone() for weight in (first, last)]
    runner.train()
    scalars = runner.message_hub.log_scalars
    losses = {key: log.current() for key, log in scalars.items() if 'loss' in key}
    assert len(losses) > 1 and all(np.isfinite(loss) for loss in losses.values()), losses
    for old, new in zip(before, (first, last)):
        assert not torch.equal(old, new) and new.isfinite().all()

    metrics = runner.test()
    boxes, masks = {'coco/bbox_mAP'}, {'coco/bbox_mAP', 'coco/segm_mAP'}
    expected = dict(retinanet=boxes, mask_rcnn=masks, cascade_mask_rcnn=masks)
    assert expected.get(config.split('/')[0], {'mIoU', 'aAcc'}) <= metrics.keys(), metrics
