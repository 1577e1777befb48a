"""End a training on a signal, with a checkpoint of the iteration under way."""

import functools
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Set

import torch
from mmengine.dist import all_reduce, barrier, broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.registry import HOOKS

from ..files import write_whole
from .atomic_checkpoints import WholeFileBackend
from .runner_access import built_loop, checkpoint_name, is_resumed
from .workers import start_worker

SIGNALS = ('SIGTERM', 'SIGUSR1')  # what Slurm, Kubernetes and spot machines send
RESUME_ME = 75  # exit status, EX_TEMPFAIL of sysexits.h: try again later
AT_ONCE = 1.0  # seconds in which signals count as one: a launcher passes on what its group gets
# Those that a handler can be for.
NAMES = sorted({one.name for one in signal.Signals} - {'SIGKILL', 'SIGSTOP'})


class Preempted(SystemExit):
    """The end of a training on a signal; a tool that does not catch it exits with status 75."""

    def __init__(self):
        super().__init__(RESUME_ME)


@HOOKS.register_module()
class PreemptionHook(Hook):
    """End the training on SIGTERM or SIGUSR1: finish the iteration, write a checkpoint, exit.

    The exit status is 75. All processes end after the same iteration, whichever got the signal. A
    checkpoint that is being written is finished. A validation is abandoned; the checkpoint is that
    of the iteration before it. If CheckpointHook has written that one, it is not written again.
    Otherwise it is ``iter_N.pth`` next to CheckpointHook's, and is removed once the resumed
    training has written another one atomically.

    A second signal, at least a second after the first, ends the process at once.

    Workers of the data loaders leave these signals to the training, and end with it however it ends
    (on Linux).

    Args:
        signals (Sequence[str]): names of further signals, such as 'SIGUSR2'.
    """

    priority = 'LOWEST'  # after all hooks that belong to the iteration

    def __init__(self, signals: Sequence[str] = ()):
        self.signals: Set[int] = set()
        self.listen_to((*SIGNALS, *signals))
        self._replaced: Dict[int, Any] = {}
        self._received, self._time = 0, 0.0
        self._saved = -1  # iterations done at the last checkpoint, in the first process
        self._position: Optional[dict] = None  # of the checkpoint that is written for a signal
        self._resumed = ''  # the checkpoint that was written for a signal
        self._common = 0  # steps of validation that all processes do

    def listen_to(self, names: Sequence[str]) -> None:
        """Add signals that end the training, by their names."""
        self.signals.update(signal.Signals[name] for name in names)

    def before_run(self, runner) -> None:
        if built_loop(runner, 'train') is None:
            return
        for mode in ('train', 'val'):
            loop = built_loop(runner, mode)
            if loop is not None:
                loop.dataloader.worker_init_fn = functools.partial(
                    start_worker, self.signals, loop.dataloader.worker_init_fn
                )
        if threading.current_thread() is not threading.main_thread():
            runner.logger.warning('Signals do not end this training: it runs in a thread.')
            return
        self._received = 0
        for number in self.signals:
            self._replaced[number] = signal.signal(number, self.receive)

    def after_run(self, runner) -> None:
        self.restore()

    def restore(self) -> None:
        """Restore the signal handlers that the training has replaced."""
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._replaced.clear()

    def receive(self, number: int, frame) -> None:
        """Handle a signal."""
        if self._received and time.monotonic() - self._time > AT_ONCE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self._received:
            self._received, self._time = number, time.monotonic()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.end_on_signal(runner, runner.epoch, runner.iter + 1)

    def before_val_epoch(self, runner) -> None:
        steps = torch.tensor(len(runner.val_dataloader))
        all_reduce(steps, 'min')
        self._common = int(steps)

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if built_loop(runner, 'train') is not None and batch_idx < self._common:
            self.end_on_signal(runner, runner.epoch, runner.iter, validating=True)

    def end_on_signal(self, runner, epoch: int, done: int, validating: bool = False) -> None:
        """End this process if any has received a signal."""
        received = torch.tensor(self._received)
        all_reduce(received, 'max')
        if not received:
            return
        saved = [self._saved == done]
        broadcast_object_list(saved)
        if not saved[0]:
            for hook in runner.hooks if validating else ():
                if isinstance(hook, EMAHook):
                    hook.after_val_epoch(runner)  # the model has the averaged weights
            self.save(runner, epoch, done)
        runner.logger.warning(
            f'{signal.Signals(int(received)).name}: the training ends after iteration {done}, its '
            f'checkpoint is written. To go on, resume. The exit status is {RESUME_ME}.'
        )
        barrier()
        raise Preempted

    def save(self, runner, epoch: int, done: int) -> None:
        """Write a checkpoint of a position in the training."""
        found = (hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
        hook = next(found, CheckpointHook(out_dir=runner.work_dir))
        self._position = dict(epoch=epoch, iter=done, preempted=True)
        name = f'iter_{done}.pth'
        runner.save_checkpoint(
            hook.out_dir,
            name,
            hook.file_client_args,
            by_epoch=False,
            backend_args=hook.backend_args,
        )
        if is_main_process():
            last = Path(runner.work_dir, 'last_checkpoint')
            write_whole(last, f'{hook.out_dir}/{name}'.encode())

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        checkpoint['meta'].update(self._position or {})
        if 'optimizer' in checkpoint:  # not in the best one
            self._saved = checkpoint['meta']['iter']
            if self._resumed:
                WholeFileBackend.outdated.append(self._resumed)
                self._resumed = ''

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if built_loop(runner, 'train') is not None and is_resumed(runner):
            self._saved = checkpoint['meta']['iter']
            if checkpoint['meta'].get('preempted'):
                self._resumed = checkpoint_name(runner)
