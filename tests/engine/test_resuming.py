"""A resumed training is the uninterrupted one, or a warning says why not."""

import re
import shutil
from collections import deque
from pathlib import Path

import pytest
from mmcv.transforms import BaseTransform
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.registry import HOOKS, METRICS, MODELS, TRANSFORMS
from torch import nn

from crossformer_mm.checkpoint import read_checkpoint

from ..helpers import NO_VALIDATION, refusals, run_tool
from ..trainings import ONE_STAGE, assert_same_training, make_data, write_config


@METRICS.register_module(force=True)
class ScoreOfEpoch(BaseMetric):
    """A metric that is known: it falls after the first epoch."""

    def process(self, data_batch, data_samples) -> None:
        self.results.append(0)

    def compute_metrics(self, results) -> dict:
        epoch = MessageHub.get_current_instance().get_info('epoch')
        return dict(score=[0.9, 0.5, 0.4, 0.3, 0.2, 0.1][epoch])


@HOOKS.register_module(force=True)
class LowerEachThirdTime(Hook):
    """A user's hook: it counts iterations, and results of validation."""

    def __init__(self):
        self.count, self.scores, self.is_ready = 0, [], False

    def before_train_epoch(self, runner) -> None:
        if not self.is_ready:  # as hooks that switch a pipeline do, once in a process
            self.scale, self.is_ready = 0.5, True

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.count += 1
        if self.count % 3 == 0:
            for group in runner.optim_wrapper.param_groups:
                group['lr'] *= self.scale

    def after_val_epoch(self, runner, metrics=None) -> None:
        self.scores.append(metrics['score'])
        if len(self.scores) == 2:
            for group in runner.optim_wrapper.param_groups:
                group['lr'] *= sum(self.scores)


@MODELS.register_module(force=True)
class Brighter(nn.Module):
    """A user's augmentation of batches, brighter from batch to batch."""

    def __init__(self):
        super().__init__()
        self.helper = Steps()

    def forward(self, inputs, data_samples):
        self.helper.steps += 1
        return inputs + 0.1 * self.helper.steps, data_samples


class Steps:
    def __init__(self):
        self.steps = 0


@TRANSFORMS.register_module(force=True)
class Mirror(BaseTransform):
    """A user's transform that mixes each image with the one before it."""

    def __init__(self):
        self.before = deque(maxlen=1)

    def transform(self, results: dict) -> dict:
        image = results['img'].copy()
        if self.before:
            height, width = (min(pair) for pair in zip(image.shape, self.before[0].shape[:2]))
            results['img'][:height, :width] = self.before[0][:height, :width]
        self.before.append(image)
        return results


def write(folder: Path, data: Path, lines: str = '', **changes) -> Path:
    # Not in the work folder, in which a run keeps its config under the same name.
    return write_config(ONE_STAGE, folder / 'configs' / 'resuming.py', data, lines, **changes)


SCORED = '''
val_evaluator = dict(_delete_=True, type='mmengine.ScoreOfEpoch')
test_evaluator = val_evaluator
default_hooks['checkpoint'] = dict(max_keep_ckpts=-1)
train_cfg = dict(max_epochs=4, val_interval=1)
'''
PLATEAU = '''
param_scheduler = [dict(type='ReduceOnPlateauLR', monitor='score', rule='greater', factor=0.1,
                        patience=0, by_epoch=True)]
'''
EARLY_STOPPING = '''
custom_hooks = [dict(type='EarlyStoppingHook', monitor='score', rule='greater', patience=2)]
'''
EARLY = 'param_scheduler = []' + EARLY_STOPPING
BEST = '''
default_hooks['checkpoint'] = dict(max_keep_ckpts=-1, save_best='score', rule='greater')
'''
BY_ITERATION = '''
param_scheduler = []
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=8, val_interval=2)
train_dataloader['sampler'] = dict(type='InfiniteSampler', shuffle=True)
default_hooks['checkpoint'] = dict(by_epoch=False, interval=2, max_keep_ckpts=-1)
custom_hooks = [dict(type='mmengine.LowerEachThirdTime')]
'''
UNSCORED = '''
val_cfg = val_dataloader = val_evaluator = None
default_hooks['checkpoint'] = dict(max_keep_ckpts=-1)
train_cfg = dict(max_epochs=3)
model['data_preprocessor'] = dict(batch_augments=[AUGMENT])
'''
STRATEGY = "strategy = dict(type='SingleDeviceStrategy')"
SYNC_RESIZE = "dict(type='BatchSyncRandomResize', random_size_range=(64, 160), interval=3)"


@pytest.mark.parametrize(
    'lines, resumed_from',
    [
        (SCORED + PLATEAU + STRATEGY, 'epoch_2.pth'),
        (SCORED + EARLY, 'epoch_2.pth'),
        (SCORED + PLATEAU + EARLY_STOPPING + BEST, 'epoch_1.pth'),
        (SCORED + BY_ITERATION, 'iter_4.pth'),
        (UNSCORED.replace('AUGMENT', SYNC_RESIZE), 'epoch_2.pth'),
        (UNSCORED.replace('AUGMENT', "dict(type='mmengine.Brighter')"), 'epoch_1.pth'),
    ],
    ids=['strategy', 'early stopping', 'best', 'iterations', 'resize', 'augmentation'],
)
def test_what_is_counted_goes_on_where_it_was(output_of, data, tmp_path, lines, resumed_from):
    config = write(tmp_path, data, lines)
    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    output_of('train.py', config, '--work-dir', whole)
    resumed.mkdir()
    shutil.copy(whole / resumed_from, resumed)
    output_of('train.py', config, '--work-dir', resumed, '--resume')
    numbers = [{int(path.stem[-1]) for path in one.glob('*_[0-9].pth')} for one in (whole, resumed)]
    last = f'{resumed_from[:-5]}{max(numbers[0])}.pth'
    assert max(numbers[0]) == max(numbers[1])
    assert_same_training(whole / last, resumed / last)


def test_a_training_killed_in_the_best_validation_keeps_it_as_the_best(output_of, data, tmp_path):
    config = write(tmp_path, data, SCORED + 'param_scheduler = []' + BEST)
    unvalidated = '--cfg-options train_cfg.max_epochs=1 train_cfg.val_begin=9'
    output_of('train.py', config, '--work-dir', tmp_path, unvalidated)
    output_of('train.py', config, '--work-dir', tmp_path, '--resume')
    assert [path.name for path in tmp_path.glob('best*')] == ['best_score_epoch_1.pth']


# What cannot go on exactly is said


PIPELINE = '''
train_cfg = dict(max_epochs=1)
train_dataloader['num_workers'] = WORKERS
train_dataloader['dataset']['pipeline'] = train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True), STEP,
    dict(type='RandomResize', scale=(48, 48), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5), dict(type='PhotoMetricDistortion'),
    dict(type='PackDetInputs')]
'''


@pytest.mark.parametrize(
    'step, workers, named',
    [
        ("dict(type='CachedMosaic', img_scale=(48, 48), max_cached_images=8)", 0, 'CachedMosaic'),
        ("dict(type='CachedMixUp', img_scale=(48, 48), prob=0.5)", 2, 'CachedMixUp'),
        ("dict(type='mmengine.Mirror')", 0, 'Mirror'),
        ("dict(type='RandomCrop', crop_size=(40, 40))", 2, None),
    ],
    ids=['mosaic', 'mixup', 'own', 'none'],
)
def test_transforms_that_remember_images_are_named(output_of, tmp_path, step, workers, named):
    data = make_data(tmp_path / 'shapes', train=8, val=1, size=48)
    lines = f'STEP, WORKERS = {step}, {workers}\n{PIPELINE}'
    config = write(tmp_path, data, lines, **NO_VALIDATION)
    said = output_of('train.py', config, '--work-dir', tmp_path)
    warned = re.findall(r'depends on the images that were loaded before it, by (.*?)\. Check', said)
    assert warned == ([named] if named else [])
    assert not named or said.index('loaded before it') < said.index('Epoch(train)')


STEPS = dict(type='MultiStepLR', by_epoch=True, begin=0, end=2, milestones=[1])
SCHEDULE = dict(param_scheduler=[STEPS], **NO_VALIDATION)


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    """A work folder with checkpoints of a training that has a schedule."""
    folder = tmp_path_factory.mktemp('trained')
    lines = "default_hooks['checkpoint'] = dict(max_keep_ckpts=-1)"
    config = write(folder, data, lines, **SCHEDULE)
    assert run_tool('train.py', config, '--work-dir', folder, folder=folder) == 0
    return folder


REPLACED = """
randomness = dict(seed=0) -> nothing
optim_wrapper = dict(optimizer=dict(lr=5e-3)) -> optim_wrapper.optimizer.lr: 0.0001 (config: 0.005)
optim_wrapper = dict(optimizer=dict(weight_decay=0.5)) -> optim_wrapper.optimizer.weight_decay: 0.0001 (config: 0.5)
param_scheduler[0].update(milestones=[2], gamma=0.5, end=3) -> param_scheduler.0.milestones: [1] (config: [2]) | param_scheduler.0.gamma: 0.1 (config: 0.5) | param_scheduler.0.end: 2 (config: 3)
param_scheduler[0] = dict(type='CosineAnnealingLR', T_max=2) -> param_scheduler.0: one of another type (config: CosineAnnealingLR)
param_scheduler = [] -> param_scheduler.0: one more (config: none, so it ends)
param_scheduler.append(dict(type='ConstantLR', factor=0.5, by_epoch=True)) -> param_scheduler.1: none (config: ConstantLR, which starts now)
"""


@pytest.mark.parametrize('lines, listed', refusals(REPLACED))
def test_settings_that_a_checkpoint_replaces_are_listed(
    output_of, data, trained, tmp_path, lines, listed
):
    config = write(tmp_path, data, lines, **SCHEDULE)
    said = output_of('train.py', f'{config} --work-dir {tmp_path} --resume {trained}/epoch_1.pth')
    warnings = re.findall('with other settings, and those that it holds are used: .*', said)
    (warning,) = warnings or ['nothing']
    for setting in listed.split(' | '):
        assert setting in warning


def test_a_new_training_from_weights_has_its_own_settings(output_of, data, trained, tmp_path):
    config = write(tmp_path, data, **SCHEDULE)
    options = f'load_from={trained}/epoch_1.pth optim_wrapper.optimizer.lr=0.005'
    said = output_of('train.py', f'{config} --work-dir {tmp_path} --cfg-options {options}')
    assert 'other settings' not in said and 'lr: 5.0000e-03' in said


def test_a_checkpoint_of_another_optimizer_is_refused(refusal_of, data, trained, tmp_path):
    lines = "optim_wrapper = dict(optimizer=dict(_delete_=True, type='SGD', lr=0.1))"
    config = write(tmp_path, data, lines, **SCHEDULE)
    said = refusal_of('train.py', f'{config} --work-dir {tmp_path} --resume {trained}/epoch_1.pth')
    assert "than the config's SGD" in said and 'load_from=' in said


def test_a_checkpoint_of_other_parameters_is_refused(output_of, refusal_of, data, tmp_path):
    groups = 'optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))'
    config = write(tmp_path, data, groups, **NO_VALIDATION)
    frozen = '--cfg-options model.backbone.frozen_stages=2 train_cfg.max_epochs=1'
    output_of('train.py', config, '--work-dir', tmp_path, frozen)
    said = refusal_of('train.py', config, '--work-dir', tmp_path, '--resume')
    assert 'epoch_1.pth' in said and 'cannot be resumed' in said and 'load_from=' in said


# Settings of MMEngine that would do something else than they say


@pytest.mark.parametrize('part', ["['backbone']", "'backbone.layers.0'", "['neck']"])
def test_activation_checkpointing_that_stops_gradients_is_refused(refusal_of, data, tmp_path, part):
    lines = f'activation_checkpointing = {part}'
    config = write(tmp_path, data, lines, **NO_VALIDATION)
    said = refusal_of('train.py', config, '--work-dir', tmp_path)
    assert 'gets no gradient' in said and 'Use model.backbone.with_cp=True.' in said


@pytest.mark.parametrize('lines', ['', STRATEGY], ids=['runner', 'strategy'])
def test_scaling_the_learning_rate_counts_accumulated_batches(output_of, data, tmp_path, lines):
    changes = dict(param_scheduler=[], optim_wrapper=dict(accumulative_counts=4))
    epoch = dict(max_epochs=1)
    config = write(tmp_path, data, lines, train_cfg=epoch, **changes, **NO_VALIDATION)
    output_of('train.py', config, '--work-dir', tmp_path, '--auto-scale-lr')
    (group,) = read_checkpoint(str(tmp_path / 'epoch_1.pth'))['optimizer']['param_groups']
    assert group['lr'] == pytest.approx(1e-4 * 2 * 4 / 16)  # 2 images in each of 4 batches
