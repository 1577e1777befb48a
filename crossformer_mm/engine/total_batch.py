"""The total batch size of a training, which a resumed one has to keep to see the same images."""

import copy
import math
from itertools import chain, cycle, islice
from typing import Iterator, List, Optional

from mmengine.dataset import DefaultSampler
from mmengine.dist import get_world_size
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import BatchSampler

from ..config_parts import kind_of
from ..openmmlab import warn


@DATA_SAMPLERS.register_module()
class SharedBatchSampler(BatchSampler):
    """Group the images of all processes, and take the part of this process of each total batch.

    MMDetection's AspectRatioBatchSampler groups the images that a process draws: another number of
    processes has other groups. Here it groups the images of all. Their order is then cut into total
    batches, so that it depends only on the seed and on the size of a group. In one process the
    batches are those of the AspectRatioBatchSampler.

    Args:
        sampler (DefaultSampler): the sampler of a process, of which a copy samples for all.
        batch_size (int): images of a process; and of a group, until a checkpoint says otherwise.
        grouped (dict): config of the batch sampler that groups images.
    """

    def __init__(self, sampler: DefaultSampler, batch_size: int, grouped: dict):
        self.rank, self.world_size = sampler.rank, sampler.world_size
        self.batch_size = batch_size
        count = len(sampler.dataset)
        self.sampler = copy.copy(sampler)
        vars(self.sampler).update(rank=0, world_size=1, num_samples=count, total_size=count)
        defaults = dict(sampler=self.sampler, batch_size=batch_size)
        self.grouped = DATA_SAMPLERS.build(grouped, default_args=defaults)

    def __iter__(self) -> Iterator[List[int]]:
        order, total = chain.from_iterable(self.grouped), self.batch_size * self.world_size
        first: List[int] = []
        while batch := list(islice(order, total)):
            first = first or batch
            # The last batch is filled up as MMEngine's sampler does, for all to have as many.
            batch += islice(cycle(first), -len(batch) % self.world_size)
            share = len(batch) // self.world_size
            yield batch[self.rank * share : (self.rank + 1) * share]

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / (self.batch_size * self.world_size))


def is_grouped_by_shape(batches) -> bool:
    """Check for the config of an AspectRatioBatchSampler without further settings."""
    only_type = isinstance(batches, dict) and len(batches) == 1
    return only_type and kind_of(batches) == 'AspectRatioBatchSampler'


def record_batch(runner, checkpoint: dict) -> None:
    """Note in a checkpoint by how many processes, with how many images each, it was written."""
    loader = runner.train_dataloader
    groups = getattr(loader.batch_sampler, 'grouped', None)
    checkpoint['meta'].update(
        processes=get_world_size(),
        batch_size=loader.batch_size or getattr(loader.batch_sampler, 'batch_size', None),
        group_size=groups and groups.batch_size,
    )


def batch_advice(checkpoint: dict) -> str:
    """Return the setting with which the total batch size stays that of a checkpoint."""
    total, processes = total_of(checkpoint), get_world_size()
    if total is None or total % processes:
        return 'train_dataloader.batch_size times the number of processes as it was'
    return f'train_dataloader.batch_size={total // processes}'


def total_of(checkpoint: dict) -> Optional[int]:
    """Return the total batch size of a checkpoint, None if it is unknown."""
    meta = checkpoint['meta']
    return meta['processes'] * meta['batch_size'] if meta.get('batch_size') else None


def compare_batches(runner, checkpoint: dict, name: str) -> None:
    """Say what another number of processes or another batch size changes; keep groups of images."""
    now: dict = dict(meta={})
    record_batch(runner, now)
    then, current = (
        (part['meta'].get('processes'), part['meta'].get('batch_size'))
        for part in (checkpoint, now)
    )
    if None in (*then, *current) or then == current:
        return
    begin = (
        f"Checkpoint '{name}' was written by {then[0]} process(es) with {then[1]} images each, now "
        f'there are {current[0]} with {current[1]}'
    )
    if total_of(checkpoint) != total_of(now):
        warn(
            f'{begin}: other images follow, and the schedule, which counts iterations, is another. '
            f'To go on as before, set {batch_advice(checkpoint)}.'
        )
        return
    sampler = runner.train_dataloader.batch_sampler
    groups = checkpoint['meta'].get('group_size')
    if groups and isinstance(sampler, SharedBatchSampler):
        sampler.grouped.batch_size = groups
    regrouped = type(sampler) not in (BatchSampler, SharedBatchSampler)
    warn(
        f'{begin}: the total batch size is the same. '
        + (
            f'{type(sampler).__name__} groups the images of each process, so that their order is '
            'another. '
            if regrouped
            else 'The same images follow. '
        )
        + 'Sums are rounded otherwise, random numbers in the model are others, and what is '
        'computed in each process, such as batch norms and the average of a loss, is over other '
        'images.'
    )
