"""A training stops at the first loss or gradient that is not finite; good checkpoints stay."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from torch import nn

from crossformer_mm.checkpoint import read_checkpoint
from crossformer_mm.engine import NonFiniteHook
from crossformer_mm.engine.runner_access import bare_model
from crossformer_mm.errors import UserError

from ..helpers import NO_VALIDATION, run_tool
from ..trainings import ONE_STAGE, write_config


@HOOKS.register_module(force=True)
class Breaks(Hook):
    """A learning rate too high, or a mistake in a head: breaks a training at an iteration."""

    def __init__(self, at: int, what: str, rank: int = 0):
        self.at, self.what, self.rank = at, what, rank

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter != self.at or runner.rank != self.rank:
            return
        weight = bare_model(runner).backbone.patch_embed.norm.weight
        if self.what == 'weight':
            weight.data[0] = float('nan')
        elif self.what == 'gradient':
            weight.register_hook(lambda gradient: gradient * float('inf'))
        elif self.what == 'loss':
            data_batch['inputs'][0] = data_batch['inputs'][0].float() * float('nan')
        elif self.what == 'last step':  # the losses and gradients are those before it
            for group in runner.optim_wrapper.param_groups:
                group['lr'] = float('inf')


def write(folder: Path, data: Path, **hook) -> Path:
    changes = dict(param_scheduler=[], custom_hooks=[dict(type='mmengine.Breaks', **hook)])
    path = folder / 'config' / 'broken.py'
    return write_config(ONE_STAGE, path, data, **NO_VALIDATION, **changes)


@pytest.mark.parametrize(
    'what, at, expected',
    [
        ('weight', 2, r'Iteration 3: .*loss nan.*\.png, .*\.png\)'),
        ('gradient', 3, r'Iteration 4: .*loss \d.*gradient norm (nan|inf).*\.png, .*\.png\)'),
        ('last step', 3, 'weights .* not finite after iteration 4: this checkpoint is not written'),
    ],
)
def test_the_iteration_and_its_images_are_named_and_the_last_checkpoint_stays(
    refusal_of, data, tmp_path, what, at, expected
):
    config, work = write(tmp_path, data, what=what, at=at), tmp_path / 'work'
    said = refusal_of('train.py', config, '--work-dir', work)
    assert re.search(expected, said), said
    assert [path.name for path in work.glob('*.pth*')] == ['epoch_1.pth']
    weights = read_checkpoint(str(work / 'epoch_1.pth'))['state_dict'].values()
    assert all(torch.isfinite(weight).all() for weight in weights)


def test_a_training_may_go_on_by_request(data, tmp_path):
    config = write(tmp_path, data, what='weight', at=2)
    arguments = [config, '--work-dir', tmp_path / 'work', '--allow-non-finite']
    assert run_tool('train.py', *arguments) == 0


class ScaledWrapper(OptimWrapper):
    """MMEngine's AmpOptimWrapper, which needs a GPU, with its scaler on a CPU."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_scaler = torch.amp.GradScaler('cpu', growth_interval=10**6)

    def backward(self, loss) -> None:
        self.loss_scaler.scale(loss).backward()
        self._inner_count += 1

    def step(self) -> None:
        self.loss_scaler.step(self.optimizer)
        self.loss_scaler.update()


def model_whose_gradient_overflows(limit: float) -> nn.Module:
    """At scales above the limit, as float16 does."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.register_hook(
        lambda gradient: gradient * float('inf') if gradient.abs() > limit else gradient
    )
    return model


@pytest.mark.skipif(not hasattr(torch.amp, 'GradScaler'), reason='scales on GPUs only')
@pytest.mark.parametrize('counts', [1, 2], ids=['each iteration', 'accumulated'])
@pytest.mark.parametrize('overflow, stops', [(2.0**6, None), (0.0, 20)], ids=['some', 'all'])
def test_updates_that_a_scaler_skips_are_tolerated_up_to_a_number_in_a_row(counts, overflow, stops):
    model, hook = model_whose_gradient_overflows(overflow), NonFiniteHook()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    wrapper = ScaledWrapper(optimizer, accumulative_counts=counts)
    runner = SimpleNamespace(optim_wrapper=wrapper, iter=0)
    hook.before_train(runner)
    done = 0
    try:
        for runner.iter in range(30 * counts):
            loss = model(torch.ones(1, 1)).sum()
            wrapper.update_params(loss)
            hook.after_train_iter(runner, runner.iter, {}, dict(loss=loss))
            done += 1
    except UserError as error:
        assert done == stops * counts - 1
        assert f'Iteration {stops * counts}: ' in str(error) and '20th time in a row' in str(error)
    else:
        assert stops is None and hook.skips == 0
        assert wrapper.loss_scaler.get_scale() * (1 if counts == 1 else 0.5) == overflow
