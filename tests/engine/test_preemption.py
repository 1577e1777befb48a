"""A signal ends a training with a checkpoint of the iteration under way; nothing stays behind."""

import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from crossformer_mm.checkpoint import read_checkpoint
from crossformer_mm.engine import preemption

from ..helpers import run_tool
from ..trainings import ONE_STAGE, SEGMENTOR, assert_same_training, train, write_config

RESUME_ME = 75


@HOOKS.register_module(force=True)
class SignalsItself(Hook):
    """The machine's owner: sends signals to the training that runs it.

    Args:
        attempt (int, optional): only in the process that torchrun started after so many restarts.
    """

    def __init__(self, at: int, name: str = 'SIGTERM', when='train', times=1, rank=0, attempt=None):
        self.at, self.name, self.when, self.times, self.rank = at, name, when, times, rank
        self.attempt = attempt

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if self.when == 'train' and runner.iter == self.at:
            self.send()

    def before_val_iter(self, runner, batch_idx, data_batch=None) -> None:
        if self.when == 'val' and runner.iter == self.at:
            self.send()

    def before_save_checkpoint(self, runner, checkpoint) -> None:
        if self.when == 'save' and checkpoint['meta']['iter'] == self.at:
            self.send()

    def send(self) -> None:
        if self.attempt not in (None, int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))):
            return
        for _ in range(self.times if get_rank() == self.rank else 0):
            signal.raise_signal(signal.Signals[self.name])


BY_ITERATION = '''
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=6, val_interval=3)
train_dataloader['sampler'] = dict(type='InfiniteSampler', shuffle=True)
default_hooks['checkpoint'] = dict(by_epoch=False, interval=4)
param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=6)]
EMA = dict(type='EMAHook', momentum=0.1)
custom_hooks = [EMA]
'''


def write(folder: Path, data: Path, lines: str, **signals) -> Path:
    if signals:
        hook = dict(type='mmengine.SignalsItself', **signals)
        lines += f"custom_hooks = [*globals().get('custom_hooks', []), {hook!r}]\n"
    return write_config(ONE_STAGE, folder / 'preempted.py', data, lines)


def numbers(work: Path) -> list:
    return sorted(path.name for path in work.glob('*.pth'))


@pytest.fixture(scope='module')
def uninterrupted(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('uninterrupted')
    config = write(folder / 'config', data, BY_ITERATION)
    assert run_tool('train.py', config, '--work-dir', folder / 'work') == 0
    return folder / 'work'


@pytest.mark.parametrize(
    'signals, written',
    [
        (dict(at=1), 'iter_2.pth'),
        (dict(at=4, name='SIGUSR1'), 'iter_5.pth'),
        (dict(at=4, times=2), 'iter_5.pth'),  # a launcher and the system, at the same time
        (dict(at=3), 'iter_4.pth'),  # which CheckpointHook writes
        (dict(at=4, when='save'), 'iter_4.pth'),
        (dict(at=3, when='val'), 'iter_3.pth'),  # while the model has the averaged weights
    ],
    ids=['first', 'SIGUSR1', 'twice', 'at a checkpoint', 'while writing', 'in validation'],
)
def test_a_signal_costs_no_iteration(data, uninterrupted, tmp_path, signals, written):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    config = write(tmp_path / 'config', data, BY_ITERATION, **signals)
    work = tmp_path / 'work'
    assert run_tool('train.py', config, '--work-dir', work) == RESUME_ME
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    assert written in numbers(work)
    last = Path((work / 'last_checkpoint').read_text())
    assert last.name == written and last.exists()
    config = write(tmp_path / 'config', data, BY_ITERATION)
    assert run_tool('train.py', config, '--work-dir', work, '--resume') == 0
    assert_same_training(work / 'iter_6.pth', uninterrupted / 'iter_6.pth')
    assert numbers(work) == numbers(uninterrupted)  # that of the signal is no longer needed


def test_any_runner_can_have_the_hook(data, tmp_path):
    hook = "custom_hooks = [EMA, dict(type='PreemptionHook', signals=['SIGUSR2'])]\n"
    config = write(tmp_path / 'config', data, BY_ITERATION + hook, at=1, name='SIGUSR2')
    cfg = Config.fromfile(config)  # as MMDetection's own tool does
    cfg.work_dir = str(tmp_path / 'work')
    with pytest.raises(preemption.Preempted) as ended:
        try:
            Runner.from_cfg(cfg).train()
        finally:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, signal.SIG_DFL)
    assert ended.value.code == RESUME_ME
    assert read_checkpoint(str(tmp_path / 'work' / 'iter_2.pth'))['meta']['iter'] == 2


def test_other_signals_can_be_named(data, tmp_path):
    config = write(tmp_path / 'config', data, BY_ITERATION, at=0, name='SIGUSR2')
    arguments = [config, '--work-dir', tmp_path / 'work', '--signals', 'SIGUSR2']
    assert run_tool('train.py', *arguments) == RESUME_ME
    assert numbers(tmp_path / 'work') == ['iter_1.pth']


def test_a_signal_that_cannot_be_handled_is_refused(refusal_of):
    said = refusal_of('train.py', 'any.py', '--signals', 'SIGKILL')
    assert 'SIGKILL' in said and "'SIGUSR2'" in said


def test_a_second_signal_ends_the_training_at_once(monkeypatch):
    monkeypatch.setattr(preemption, 'AT_ONCE', -1.0)
    hook, sent = preemption.PreemptionHook(), []
    monkeypatch.setattr(preemption.os, 'kill', lambda process, number: sent.append(number))
    monkeypatch.setattr(preemption.signal, 'signal', lambda *handler: sent.append(handler))
    hook.receive(signal.SIGTERM, None)
    assert sent == []
    hook.receive(signal.SIGUSR1, None)
    assert sent == [(signal.SIGUSR1, signal.SIG_DFL), signal.SIGUSR1]


@pytest.fixture
def endless(data, tmp_path) -> tuple:
    """A training under way that has no end: the tool, and its worker processes."""
    endless = dict(max_iters=10**6, val_interval=10**6)
    process = train(
        tmp_path, write_config(SEGMENTOR, tmp_path / 'config.py', data, train_cfg=endless)
    )
    process.wait_until(lambda: re.search(r'Iter\(train\) +\[ *3/', process.output))
    workers = psutil.Process(process.process.pid).children(recursive=True)
    assert len(workers) >= 2
    return process, workers


@pytest.mark.parametrize('everybody', [True, False], ids=['all processes', 'the training'])
def test_no_worker_stays_behind(endless, tmp_path, everybody):
    """Slurm and systemd send a signal to workers, too, which must not fail the iteration."""
    process, workers = endless
    for one in workers if everybody else ():
        with suppress(ProcessLookupError):  # a child for a moment only; without a worker it fails
            os.kill(one.pid, signal.SIGTERM)
    os.kill(process.process.pid, signal.SIGTERM)
    assert process.wait(60) == RESUME_ME, process.output[-3000:]
    done = max(map(int, re.findall(r'Iter\(train\) +\[ *(\d+)/', process.output)))
    assert (tmp_path / f'iter_{done}.pth').exists()
    assert f'SIGTERM: the training ends after iteration {done}' in process.output
    assert psutil.wait_procs(workers, timeout=10)[1] == []


def test_workers_end_with_a_training_that_is_killed(endless):
    process, workers = endless
    process.kill()
    assert psutil.wait_procs(workers, timeout=10)[1] == []
