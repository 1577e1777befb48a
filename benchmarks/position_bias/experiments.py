"""Experiments of the study: tasks, position options, kinds of training and tests."""

from typing import NamedTuple, Tuple

SIDE = 64  # of the images in training, as in the configs
OPTIONS = ('dynamic', 'dynamic_residual', 'relative', 'absolute', 'none')
TRAININGS = ('single', 'mixed')
MIXED = (0.5, 0.75, 1, 1.25, 1.5)  # sizes of mixed training: mean area 1.1, about the same budget


class Experiment(NamedTuple):
    """One task on one kind of images: its config and its metric."""

    config: str
    images: str
    metric: str
    label: str
    scale: float  # makes the metric one of 100
    lr_mult: float = 0  # of positions; 0: the config's
    beside: str = ''  # the experiment that has the options that this one leaves out
    options: Tuple[str, ...] = OPTIONS


EXPERIMENTS = {
    'semantic': Experiment('semantic.py', 'shapes', 'mIoU', 'semantic segmentation, mIoU', 1),
    'instance': Experiment(
        'instance.py', 'shapes', 'coco/segm_mAP_50', 'instance segmentation, mask AP50', 100
    ),
    'pairs': Experiment('pairs.py', 'pairs', 'mIoU', 'pairs: only positions count, mIoU', 1),
    # Each value of a table or a map is learnt by itself; 250 iterations at the rate that suits an
    # MLP are too few.
    'pairs_fast': Experiment(
        *('pairs.py', 'pairs', 'mIoU', 'pairs: tables, maps 4 times as fast, mIoU', 1, 20),
        beside='pairs',
        options=('relative', 'absolute'),
    ),
}


class Test(NamedTuple):
    """One evaluation: objects scaled along or on a larger canvas, at ``factor`` times the size."""

    way: str
    factor: float = 1
    group_factor: float = 1  # on the group size in training
    interval_factor: float = 1
    without_position: bool = False  # the position bias, or map, is removed

    @property
    def name(self) -> str:
        changes = [
            f'{name} x{factor:g}'
            for name, factor in (('G', self.group_factor), ('I', self.interval_factor))
            if factor != 1
        ]
        changes += ['without position'] * self.without_position
        return ', '.join([f'{self.way} x{self.factor:g}', *changes])
