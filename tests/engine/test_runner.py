"""Configs that MMDetection's and MMSegmentation's tools take work; errors name the section."""

import pickle
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from mmengine._strategy import SingleDeviceStrategy
from mmengine.registry import MODELS, init_default_scope

from crossformer_mm.checkpoint import read_checkpoint, use_safe_loading
from crossformer_mm.engine.config import load_config

from ..helpers import DEMO_DETECTOR, NO_VALIDATION, refusals
from ..trainings import ONE_STAGE, write_config


def test_weights_may_be_named_where_a_config_has_none(tmp_path):
    file = tmp_path / 'resnet.pth'
    use_safe_loading()
    init_default_scope('mmdet')
    first, second = (
        MODELS.build(load_config('configs/mask_rcnn/r50_1x.py', options).model.backbone)
        for options in ({}, {'model.backbone.init_cfg.checkpoint': str(file)})
    )
    # As torchvision has it: with a classifier.
    torch.save({**first.state_dict(), 'fc.weight': torch.ones(1)}, file)
    assert not torch.equal(first.conv1.weight, second.conv1.weight)
    second.init_weights()
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    'options, said',
    [('', True), ('--cfg-options model.backbone.init_cfg.checkpoint=README.md', False)],
)
def test_training_another_backbone_from_random_weights_is_said(output_of, options, said):
    arguments = f'configs/mask_rcnn/r50_1x.py --data-root nowhere {options}'
    found = output_of('train.py', arguments, expect=2)
    assert ('No pretrained checkpoint is given' in found) == said


WRONG_VALUES = """
train_dataloader.batch_size=many -> config's train_cfg or train_dataloader cannot be
optim_wrapper.optimizer.lr=fast -> config's optim_wrapper cannot be built
model.roi_head.bbox_head.num_classes=3 -> model.roi_head.bbox_head.num_classes = 3 is too small for the 4 classes
val_evaluator.metric=boxes -> config's val_cfg, val_dataloader or val_evaluator can
model.type=MaskCNN -> config's model cannot be built
"""


@pytest.mark.parametrize('option, expected', refusals(WRONG_VALUES))
def test_values_that_cannot_work_name_their_section(refusal_of, data, tmp_path, option, expected):
    paths = f'--work-dir {tmp_path} --data-root {data}/coco'
    assert expected in refusal_of('train.py', f'{DEMO_DETECTOR} {paths} --cfg-options {option}')


def test_settings_may_be_lists_or_none(output_of, data, tmp_path):
    """No visualizer and no hook for pictures, evaluators and weights as lists, data in parts."""
    write_config(ONE_STAGE, tmp_path / 'base.py', data)
    config = tmp_path / 'lists.py'
    config.write_text('''
_base_ = './base.py'
visualizer = auto_scale_lr = custom_hooks = None
default_hooks = dict(_delete_=True, checkpoint=dict(type='CheckpointHook', interval=1))
val_evaluator = test_evaluator = [dict(_base_.val_evaluator)]
model = dict(backbone=dict(init_cfg=[]))
parts = [dict(_base_.train_dataloader.dataset), dict(_base_.train_dataloader.dataset)]
train_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=parts))
train_cfg = dict(max_epochs=1, val_interval=1)
''')
    moved = Path(shutil.copytree(data / 'coco', tmp_path / 'moved'))
    options = f'--data-root {moved} --work-dir {tmp_path}/work'
    said = output_of('train.py', config, options)
    assert re.search(r'Epoch\(train\) +\[1\]\[4/4\]', said) and 'coco/bbox_mAP' in said
    more = f'--out {tmp_path}/kept.pkl --show-dir {tmp_path}/pictures'
    output_of('test.py', config, tmp_path / 'work/epoch_1.pth', options, more)
    kept = pickle.loads((tmp_path / 'kept.pkl').read_bytes())
    assert [image['img_path'].startswith(str(moved)) for image in kept] == [True]
    assert len(list((tmp_path / 'pictures').iterdir())) == 1


@pytest.mark.parametrize(
    'lines, expected',
    [
        (
            "runner_type = 'FlexibleRunner'\nstrategy = dict(type='DeepSpeedStrategy')",
            "config's strategy cannot be built: AssertionError: DeepSpeed is not installed",
        ),
        ("runner_type = 'MyRunner'", "runner_type: there is no runner 'MyRunner'."),
        ("strategy = dict(type='MyStrategy')", "config's strategy cannot be built: "),
    ],
)
def test_runners_and_strategies_are_not_ignored(refusal_of, data, tmp_path, lines, expected):
    config = write_config(ONE_STAGE, tmp_path / 'strategy.py', data, lines)
    assert expected in refusal_of('train.py', config, '--work-dir', tmp_path)


def test_a_strategy_trains_by_mmengines_other_runner(output_of, data, tmp_path):
    prepared = mock.patch.object(
        SingleDeviceStrategy, 'prepare', autospec=True, side_effect=SingleDeviceStrategy.prepare
    )
    changes = dict(train_cfg=dict(max_epochs=1), strategy=dict(type='SingleDeviceStrategy'))
    path = tmp_path / 'single_device.py'
    config = write_config(ONE_STAGE, path, data, **NO_VALIDATION, **changes)
    with prepared as prepare:
        output_of('train.py', config, '--work-dir', tmp_path)
    prepare.assert_called_once()
    kept = read_checkpoint(str(tmp_path / 'epoch_1.pth'))
    assert {'state_dict', 'optimizer'} <= kept.keys()
