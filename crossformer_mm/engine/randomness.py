"""Random numbers that are a function of the seed and of how far a training is.

MMEngine seeds once, at the start: what a training draws after it was resumed then is
not what it would have drawn. Here the generators of Python, NumPy and PyTorch start
anew

- for each image that is loaded, from the seed and the number of the draw, which tells
  the image and how often it was drawn before, and
- for each iteration, from the seed, the iteration and the rank.

So a resumed training repeats what an uninterrupted one does, with any number of
workers, and no state of a generator has to be kept. Where in the data it goes on
follows from epoch and iteration.
"""
import itertools
import random
from typing import Iterator

import numpy as np
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, DATASETS

from .data_checks import DatasetWrapper

DRAW, ITERATION = range(2)  # tell the two kinds of seeds apart


def seed_all(*numbers: int) -> None:
    """Seed the generators of this process by some whole numbers, all of which count."""
    words = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


class SeedIterations(Hook):
    """Random numbers of an iteration (stochastic depth, sampled boxes) from its number."""

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        seed_all(runner.seed, ITERATION, runner.iter, get_rank())


@DATASETS.register_module()
class SeededDataset(DatasetWrapper):
    """A data set without end: item ``p * len(dataset) + i`` is image i drawn in pass p.

    Args:
        dataset: see :class:`DatasetWrapper`.
        seed (int): with an item's number, what its augmentation is made of.
    """

    def __init__(self, dataset, seed: int):
        super().__init__(dataset)
        self.seed = seed

    def __getitem__(self, number: int) -> dict:
        seed_all(self.seed, DRAW, number)
        return self.dataset[number % len(self)]

    def get_data_info(self, number: int) -> dict:
        return self.dataset.get_data_info(number % len(self))


@DATA_SAMPLERS.register_module()
class CountedSampler(DefaultSampler):
    """MMEngine's sampler of epochs, for a :class:`SeededDataset`."""

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * len(self.dataset)
        return (start + index for index in super().__iter__())


@DATA_SAMPLERS.register_module()
class CountedInfiniteSampler(InfiniteSampler):
    """MMEngine's sampler without end, for a :class:`SeededDataset`."""

    drawn = 0

    def __iter__(self) -> Iterator[int]:
        for index in super().__iter__():
            passes = (self.rank + self.drawn * self.world_size) // self.size
            self.drawn += 1
            yield passes * self.size + index

    def skip(self, num_samples: int) -> None:
        """Go to where this rank has drawn ``num_samples`` images."""
        self.indices = itertools.islice(self._indices_of_rank(), num_samples, None)
        self.drawn = num_samples


# Which sampler takes the place of which. With any other, images are augmented as MMEngine says.
COUNTED = {'DefaultSampler': 'CountedSampler', 'InfiniteSampler': 'CountedInfiniteSampler'}
