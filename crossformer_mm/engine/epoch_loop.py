"""A loop of epochs that resumes at any iteration."""

from itertools import islice
from typing import Any, Iterable, Iterator

from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop


@LOOPS.register_module()
class ResumableTrainLoop(EpochBasedTrainLoop):
    """MMEngine's loop of epochs, which resumes mid-epoch with the next image.

    MMEngine's own would repeat the epoch. Images of the iterations that are done are not loaded.
    """

    def run_epoch(self) -> None:
        done = iterations_in_epoch(self)
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        for idx, data_batch in enumerate(remaining(self.dataloader, done), done):
            self.run_iter(idx, data_batch)

        self.runner.call_hook('after_train_epoch')
        self._epoch += 1


def iterations_in_epoch(loop: EpochBasedTrainLoop) -> int:
    """Return the number of iterations done of the current epoch."""
    return loop.iter - loop.epoch * len(loop.dataloader)


def remaining(loader, done: int) -> Iterable:
    """Return the batches of an epoch after the first ``done``."""
    if done >= len(loader):
        return ()
    if done:
        # PyTorch's loader allows no other assignment, and its workers load ahead from the first.
        loader.__dict__['batch_sampler'] = Later(loader.batch_sampler, done)
    return loader


class Later:
    """A batch sampler, which persistent workers keep, without its first ``done`` batches when it is
    iterated for the first time."""

    def __init__(self, batches: Any, done: int):
        self.batches, self.done = batches, done

    def __iter__(self) -> Iterator:
        # Once there is a first batch to give: PyTorch's workers begin an iteration twice.
        done, self.done = self.done, 0
        yield from islice(self.batches, done, None)

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str):
        return getattr(self.batches, name)
