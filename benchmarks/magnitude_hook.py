"""Cost of MagnitudeHook: its own time in a logged iteration, next to that of a training step.

OMP_NUM_THREADS=1 python benchmarks/magnitude_hook.py
"""

import time
from types import SimpleNamespace
from unittest import mock

import torch

from crossformer_mm import CrossFormer, MagnitudeHook, hooks

STEPS = 3


def main():
    backbone = CrossFormer('s').train()
    image = torch.randn(1, 3, 800, 1216)
    runner = SimpleNamespace(
        rank=0, iter=49, model=backbone, logger=mock.Mock(), visualizer=mock.Mock()
    )
    own, steps = [], []

    def timed(function):
        def run(*args):
            start = time.perf_counter()
            result = function(*args)
            own[-1] += time.perf_counter() - start
            return result

        return run

    MagnitudeHook.keep = timed(MagnitudeHook.keep)
    hooks.sample_logits = timed(hooks.sample_logits)
    hook = MagnitudeHook()
    for _ in range(STEPS):
        own.append(0.0)
        start = time.perf_counter()
        hook.before_train_iter(runner, 49)
        sum(feature.square().mean() for feature in backbone(image)).backward()
        hook.after_train_iter(runner, 49)
        steps.append(time.perf_counter() - start)
    print(
        f'CrossFormer-S, 800x1216, {torch.get_num_threads()} thread(s): the hook takes '
        f'{min(own):.2f} s of a logged step of {min(steps):.1f} s'
    )


if __name__ == '__main__':
    main()
