"""Random numbers that depend only on the seed and on the progress of a training.

MMEngine seeds once, at the start: a resumed training then draws other numbers than an uninterrupted
one. Here the generators of Python, NumPy and PyTorch are seeded again

- for each image that is loaded, from the seed and the number of the draw, which tells the image and
  how often it was drawn before, and
- for each iteration, from the seed, the iteration and the rank.

A resumed training thus repeats an uninterrupted one, with any number of workers, and no state of a
generator has to be saved. The position in the data follows from epoch and iteration.

This package's runners do so by default. For any other, give the training's data loader
``sampler=dict(type='CountedSampler')`` (or ``'CountedInfiniteSampler'``), and add
``custom_hooks = [dict(type='SeedHook')]``.
"""

import hashlib
import itertools
import random
from collections import deque
from functools import partial
from typing import Any, Iterator, List, Sequence, Tuple

import numpy as np
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, HOOKS
from torch.utils.data import DataLoader, get_worker_info

from ..openmmlab import warn

DRAW, ITERATION = range(2)  # tell the two kinds of seeds apart
PROBED = 8  # images, of which a transform such as CachedMosaic needs five before it acts


def seed_all(*numbers: int) -> None:
    """Seed the generators of this process by whole numbers, all of which count."""
    words = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


class Draw(int):
    """Index of an image, with the number of its draw: ``p * n + i`` for draw ``p`` of image ``i``
    of ``n``."""

    number: int

    @classmethod
    def numbered(cls, index: int, number: int) -> 'Draw':
        draw = cls(index)
        draw.number = number
        return draw


@DATA_SAMPLERS.register_module()
class CountedSampler(DefaultSampler):
    """MMEngine's sampler of epochs, whose indices are of type :class:`Draw`."""

    def __iter__(self) -> Iterator[Draw]:
        start = self.epoch * len(self.dataset)
        return (Draw.numbered(index, start + index) for index in super().__iter__())

    def start_anew(self, seed: int) -> None:
        self.seed = seed


@DATA_SAMPLERS.register_module()
class CountedInfiniteSampler(InfiniteSampler):
    """MMEngine's sampler without end, whose indices are of type :class:`Draw`."""

    drawn = 0

    def __iter__(self) -> Iterator[Draw]:
        for index in super().__iter__():
            passes = (self.rank + self.drawn * self.world_size) // self.size
            self.drawn += 1
            yield Draw.numbered(index, passes * self.size + index)

    def skip(self, num_samples: int) -> None:
        """Go to where this rank has drawn ``num_samples`` images."""
        # The method of the base class that its iterator is made of.
        self.indices = itertools.islice(self._indices_of_rank(), num_samples, None)
        self.drawn = num_samples

    def start_anew(self, seed: int) -> None:
        self.seed = seed
        self.skip(0)


# Replacements of samplers. With any other sampler, MMEngine seeds the augmentation of images.
COUNTED = {DefaultSampler: 'CountedSampler', InfiniteSampler: 'CountedInfiniteSampler'}


def seeded_items(dataset, seed: int, indices: Sequence[int]) -> List:
    """Load a batch of a data set, whose augmentation is seeded by the number of each draw."""
    items = []
    for index in indices:
        if isinstance(index, Draw):
            seed_all(seed, DRAW, index.number)
        items.append(dataset[int(index)])
    return items


@HOOKS.register_module()
class SeedHook(Hook):
    """Seed each iteration (stochastic depth, sampled boxes) by its number, and each image by the
    number of its draw, if the data loader's sampler counts draws."""

    priority = 'VERY_HIGH'

    def before_train(self, runner) -> None:
        loader, seed = runner.train_dataloader, seed_of(runner)
        # PyTorch, too, puts a loader's sampler into a batch sampler.
        sampler: Any = getattr(loader.batch_sampler, 'sampler', None)
        if hasattr(sampler, 'start_anew'):
            sampler.start_anew(seed)
            # PyTorch looks the method up at the object, so that its class stays as it is.
            loader.dataset.__getitems__ = partial(seeded_items, loader.dataset, seed)
            restart_workers(runner.train_loop)
            if runner.rank == 0:
                warn_of_memory(loader.dataset)
        else:
            runner.logger.warning(
                f'{type(loader.sampler).__name__} does not count draws: a training that is resumed '
                'does not repeat what is random in images, see CountedSampler.'
            )

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        seed_all(seed_of(runner), ITERATION, runner.iter, get_rank())


def seed_of(runner) -> int:
    """Return the seed that all ranks share."""
    # runner.seed includes the rank if this setting, which the runner tells nobody, is true.
    apart = runner.rank if runner._randomness_cfg.get('diff_rank_seed') else 0
    return runner.seed - apart


def restart_workers(loop) -> None:
    """Discard images that a loop's workers load before the training, with the wrong seeds.

    MMEngine up to 0.10.7 starts the workers of a loop of iterations when it builds the loop.
    """
    # Neither MMEngine's iterator nor PyTorch's loader can be reset otherwise.
    iterator: Any = getattr(loop, 'dataloader_iterator', None)
    if getattr(iterator, '_iterator', None) is not None:
        loop.dataloader.__dict__['_iterator'] = None  # kept with persistent workers
        loop.dataloader_iterator = type(iterator)(loop.dataloader)


# Randomness that no seed determines


def warn_of_memory(dataset) -> None:
    """Warn if a loaded image depends on the images that were loaded before it.

    Two workers load the same images in opposite orders. They have copies of the data set: that of
    the training stays as it is. An error is ignored, because the training raises it, too, and
    images that take over a minute are not compared.
    """
    draws = [Draw.numbered(index, index) for index in range(min(PROBED, len(dataset)))]
    orders = [draws, draws[::-1]]
    try:
        (forward, after), (backward, _) = DataLoader(
            dataset,
            batch_sampler=orders,
            num_workers=2,
            collate_fn=fingerprints,
            timeout=60,
            generator=torch.Generator(),  # not that of the training
        )
    except Exception:
        return
    if forward != backward[::-1]:
        names = {name for (name, size), now in zip(sizes_of(dataset), after) if (name, size) != now}
        warn(
            'What is loaded of an image depends on the images that were loaded before it, by '
            f"{' and '.join(sorted(names)) or 'a transform or the data set'}. Checkpoints do not "
            'hold these images: a training that is resumed, or has another number of workers, is '
            'not exactly the same.'
        )


def fingerprints(items: Sequence) -> Tuple[List[str], List[Tuple[str, List[int]]]]:
    """Return a hash of each item, and the sizes of the containers of this worker's data set."""
    hashes = []
    for item in items:
        found = hashlib.sha256()
        for array in arrays_in(item):
            found.update(np.ascontiguousarray(array).tobytes())
        hashes.append(found.hexdigest())
    return hashes, sizes_of(get_worker_info().dataset)


def arrays_in(item) -> Iterator[np.ndarray]:
    """Yield all arrays and tensors of a sample, in order."""
    if isinstance(item, torch.Tensor):
        yield item.detach().numpy()
    elif isinstance(item, np.ndarray):
        if item.dtype != object:
            yield item
    elif isinstance(item, (list, tuple)):
        for part in item:
            yield from arrays_in(part)
    elif isinstance(item, dict) or hasattr(item, '__dict__'):
        yield from arrays_in(list((item if isinstance(item, dict) else vars(item)).values()))


def sizes_of(dataset) -> List[Tuple[str, List[int]]]:
    """List data sets and transforms, wrapped ones too, with the sizes of their containers."""
    found, parts, seen = [], [dataset], set()
    for part in parts:
        if id(part) in seen or not hasattr(part, '__dict__'):
            continue
        seen.add(id(part))
        held = [len(v) for v in vars(part).values() if isinstance(v, (list, dict, deque))]
        found.append((type(part).__name__, held))
        for name in ('dataset', '_dataset', 'datasets', 'pipeline', 'transforms'):
            inner = vars(part).get(name)
            parts += inner if isinstance(inner, (list, tuple)) else [inner]
    return found
