"""Images come in the same order for any number of processes with the same total batch size."""

import pytest
from mmdet.datasets.samplers import AspectRatioBatchSampler
from mmengine.dataset import DefaultSampler

from crossformer_mm.engine.total_batch import SharedBatchSampler


class Photos:
    """A data set of upright and lying images."""

    def __len__(self) -> int:
        return 23

    def get_data_info(self, index: int) -> dict:
        return dict(width=2 - index % 3 // 2, height=1 + index % 3 // 2)

    def is_upright(self, index: int) -> bool:
        return index % 3 == 2


def shared(batch_size: int, processes: int, rank: int, group: int) -> SharedBatchSampler:
    sampler = DefaultSampler(Photos(), seed=0)
    sampler.rank, sampler.world_size = rank, processes
    batches = SharedBatchSampler(sampler, batch_size, dict(type=AspectRatioBatchSampler))
    batches.grouped.batch_size = group  # as in a checkpoint
    return batches


def test_one_process_has_the_batches_of_mmdetection():
    sampler = DefaultSampler(Photos(), seed=0)
    reference, mine = AspectRatioBatchSampler(sampler, 4), shared(4, 1, 0, group=4)
    assert list(mine) == list(reference) and len(mine) == len(reference) == 6


@pytest.mark.parametrize('processes', [2, 4])
def test_processes_share_the_batches_of_one(processes):
    alone = shared(4, 1, 0, group=2)
    ranks = [shared(4 // processes, processes, rank, group=2) for rank in range(processes)]
    assert {len(one) for one in ranks} == {len(alone)}
    total = [sum(parts, []) for parts in zip(*ranks)]
    batches = list(alone)
    assert sorted(sum(batches, [])) == list(range(23))
    assert total[:-1] == batches[:-1]
    filled = len(total[-1]) - len(batches[-1])
    assert total[-1] == batches[-1] + batches[0][:filled]
    assert filled < processes
    for batch in batches[:4]:  # those before what is left over
        for pair in (batch[:2], batch[2:]):
            assert len({Photos().is_upright(index) for index in pair}) == 1
