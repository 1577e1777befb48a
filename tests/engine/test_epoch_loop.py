"""A loop of epochs resumes at any iteration, to the bit, without loading the images before."""

import shutil
from pathlib import Path

import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, TRANSFORMS

from crossformer_mm.checkpoint import read_checkpoint

from ..helpers import run_tool
from ..trainings import assert_same_training, make_data
from .test_preemption import numbers, write


@TRANSFORMS.register_module(force=True)
class Recorded(BaseTransform):
    """Notes which images are loaded."""

    def __init__(self, file: str):
        self.file = file

    def transform(self, results: dict) -> dict:
        with open(self.file, 'a') as file:
            file.write(f"{Path(results['img_path']).name}\n")
        return results


@HOOKS.register_module(force=True)
class CountsEpochs(Hook):
    """A user's hook, whose count changes the training."""

    def __init__(self):
        self.epochs = 0

    def before_train_epoch(self, runner) -> None:
        self.epochs += 1

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        for group in runner.optim_wrapper.param_groups:
            group['lr'] *= 1 + 0.1 * self.epochs


# Three epochs of four iterations; 12 is no multiple of the 5 iterations of an update.
EPOCHS = '''
train_cfg = dict(by_epoch=True, max_epochs=3, val_interval=2)
train_dataloader['num_workers'] = WORKERS
train_dataloader['persistent_workers'] = WORKERS > 0
train_dataloader['dataset']['pipeline'].insert(0, dict(type='mmengine.Recorded', file=RECORD))
optim_wrapper = dict(accumulative_counts=COUNTS)
param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=6),
                   dict(type='MultiStepLR', milestones=[1, 2], by_epoch=True)]
EMA = dict(type='EMAHook', momentum=0.1)
custom_hooks = [EMA, dict(type='mmengine.CountsEpochs')]
'''
EACH = '''
default_hooks['checkpoint'] = dict(by_epoch=False, interval=1, max_keep_ckpts=-1,
                                   save_best='coco/bbox_mAP')
'''
LAST = "default_hooks['checkpoint'] = dict(max_keep_ckpts=-1)\n"


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp('data') / 'shapes', train=8, val=2, size=48)


def lines(record: Path, workers: int = 0, counts: int = 1) -> str:
    return f'WORKERS, COUNTS, RECORD = {workers}, {counts}, {str(record)!r}\n{EPOCHS}'


@pytest.fixture(scope='module')
def uninterrupted(request, data, tmp_path_factory):
    """A training to its end; its parameter is the number of batches that a step accumulates."""
    folder = tmp_path_factory.mktemp('epochs')
    text = lines(folder / 'record', counts=request.param)
    config = write(folder / 'config', data, text + EACH)
    assert run_tool('train.py', config, '--work-dir', folder / 'work') == 0
    return request.param, folder


@pytest.mark.parametrize(
    'uninterrupted, start, workers',
    [(1, 2, 2), (1, 4, 0), (1, 12, 0), (5, 7, 0)],
    ids=['workers', 'end of an epoch', 'end of the last epoch', 'accumulated'],
    indirect=['uninterrupted'],
)
def test_it_resumes_at_any_iteration(data, uninterrupted, tmp_path, start, workers):
    counts, reference = uninterrupted
    record, work = tmp_path / 'record', tmp_path / 'work'
    config = write(tmp_path / 'config', data, lines(record, workers, counts) + EACH)
    work.mkdir()
    record.touch()
    shutil.copy(reference / 'work' / f'iter_{start}.pth', work)
    assert run_tool('train.py', config, '--work-dir', work, '--resume') == 0
    loaded, all_of_them = record.read_text().split(), (reference / 'record').read_text().split()
    all_of_them = all_of_them[-24:]  # without those of the check for transforms with memory
    loaded = loaded[-(24 - 2 * start) :] if start < 12 else []
    assert sorted(loaded) == sorted(all_of_them[2 * start :])
    assert workers or loaded == all_of_them[2 * start :]
    written = {path.name for path in work.glob('iter_*.pth')}
    assert written == {f'iter_{n}.pth' for n in range(start, 13)}  # nothing was done again
    assert_same_training(work / 'iter_12.pth', reference / 'work' / 'iter_12.pth')
    files = (folder / 'work' / 'iter_12.pth' for folder in (reference, tmp_path))
    kept = [read_checkpoint(str(file))['message_hub'] for file in files]
    for name in ('train/loss', 'train/lr'):
        first, second = (hub['log_scalars'][name]._log_history for hub in kept)
        assert list(first) == list(second) and len(first) == 12
    best, other = (hub['runtime_info']['best_score'] for hub in kept)
    assert best == other is not None


@pytest.mark.parametrize(
    'uninterrupted, at',
    [(1, 7), (5, 5)],
    ids=['last iteration of an epoch', 'amid an epoch, accumulated'],
    indirect=['uninterrupted'],
)
def test_a_signal_costs_no_iteration_of_an_epoch(data, uninterrupted, tmp_path, at):
    counts, reference = uninterrupted
    text = lines(tmp_path / 'record', counts=counts) + LAST
    work = tmp_path / 'work'
    config = write(tmp_path / 'config', data, text, at=at)
    assert run_tool('train.py', config, '--work-dir', work) == 75
    assert numbers(work) == ['epoch_1.pth', f'iter_{at + 1}.pth']
    config = write(tmp_path / 'config', data, text)
    assert run_tool('train.py', config, '--work-dir', work, '--resume') == 0
    assert numbers(work) == ['epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth']
    files = (work / 'epoch_3.pth', reference / 'work' / 'iter_12.pth')
    resumed, expected = (read_checkpoint(str(file))['state_dict'] for file in files)
    torch.testing.assert_close(resumed, expected, rtol=0, atol=0)
