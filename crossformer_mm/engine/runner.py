"""MMEngine's runners with exact resumption, atomic checkpoints and validated data."""

import functools
import logging
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, List, Type, Union

from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.device import get_device
from mmengine.dist import barrier, broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook, Hook, LoggerHook
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapperDict
from mmengine.registry import DATA_SAMPLERS, LOOPS, MODELS, RUNNERS
from mmengine.runner import EpochBasedTrainLoop, FlexibleRunner, Runner
from torch import nn

from ..checkpoint import use_safe_loading, whole_model_follows
from ..errors import ConfigError, UserError, said
from .atomic_checkpoints import FULL, WholeFileBackend, WholeFilesHook
from .coco_checks import annotations_checked
from .dataset_checks import explained_data
from .dataset_guard import CheckDataHook, list_skipped
from .epoch_loop import ResumableTrainLoop
from .newest_checkpoint import newest_checkpoint
from .nonfinite import NonFiniteHook
from .preemption import PreemptionHook
from .preflight import check_classifier
from .randomness import COUNTED, SeedHook
from .restarts import first_start, may_restart
from .resuming import ResumeHook
from .total_batch import is_grouped_by_shape
from .weight_checks import CheckWeightsHook, SafeLoadingHook

# Added in this order after the config's hooks, unless the config has one of the class. The package
# adds hooks that know the model.
ADDED_HOOKS: List[Type[Hook]] = [
    SafeLoadingHook,
    SeedHook,
    CheckDataHook,
    WholeFilesHook,
    CheckWeightsHook,
    NonFiniteHook,
    PreemptionHook,
    ResumeHook,
]


@contextmanager
def name_config_section(section: str) -> Iterator[None]:
    """Decorate a method that builds something: an error becomes a :class:`ConfigError`, which names
    the section of the config."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever there is in a config
        raise ConfigError(f"The config's {section} cannot be built: {said(error)}.") from error


Mixin: Any = object  # combined with a runner of MMEngine, whose attributes it uses


class RobustRunnerMixin(Mixin):
    """Add robust training and testing to a runner of MMEngine.

    - Checkpoints are written atomically, see :mod:`.atomic_checkpoints`, and read as plain data;
      weights are found in any file, under any of their names, and must fit, see
      :mod:`.weight_checks`.
    - Random numbers depend only on the seed and the iteration, see :mod:`.randomness`, so that a
      resumed training equals an uninterrupted one.
    - Data are checked, see :mod:`.dataset_guard`.

    Each is a hook, which a config can name for any other runner. The config that is kept with a
    training does not contain them: any other tool can use it.

    Attributes:
        resume_newest (bool): resume from the newest checkpoint, if there is any.
    """

    # Nothing public of MMEngine's runners tells or sets whether and from where they resume.
    _resume: bool
    _load_from: Any
    resume_newest = False
    _chosen = False

    @name_config_section('default_hooks or custom_hooks')
    def register_hooks(self, default_hooks=None, custom_hooks=None) -> None:
        super().register_hooks(default_hooks, custom_hooks)
        for kind in ADDED_HOOKS:
            if self.hook_of(kind) is None:
                self.register_hook(kind())
        for hook in self.hooks:
            if isinstance(hook, LoggerHook) and self.rank:
                # Every process would write the results of a test to the same file at once.
                hook.after_test_epoch = lambda *args, **kwargs: None

    def hook_of(self, kind: type):
        """Return the runner's hook of a class, or None."""
        return next((hook for hook in self.hooks if isinstance(hook, kind)), None)

    def allow_non_finite(self) -> None:
        """Train on with losses and gradients that are not finite."""
        self.hooks.remove(self.hook_of(NonFiniteHook))

    def skip_bad_images(self, path: str, anew: bool) -> None:
        """Skip training images that cannot be used.

        Args:
            path (str): file that lists them.
            anew (bool): start a new list instead of adding to it.
        """
        if anew and self.rank == 0:
            Path(path).unlink(missing_ok=True)
        self.hook_of(CheckDataHook).skip_to = path

    @name_config_section('visualizer')
    def build_visualizer(self, *args, **kwargs):
        return super().build_visualizer(*args, **kwargs)

    @name_config_section('train_cfg or train_dataloader')
    def build_train_loop(self, loop):
        if isinstance(loop, dict):
            kind = loop.get('type', EpochBasedTrainLoop if loop.get('by_epoch') else None)
            kind = LOOPS.get(kind) if isinstance(kind, str) else kind
            if kind is EpochBasedTrainLoop:
                loop = {key: value for key, value in loop.items() if key != 'by_epoch'}
                loop['type'] = ResumableTrainLoop
        return super().build_train_loop(loop)

    @name_config_section('val_cfg, val_dataloader or val_evaluator')
    def build_val_loop(self, loop):
        return super().build_val_loop(loop)

    @name_config_section('test_cfg, test_dataloader or test_evaluator')
    def build_test_loop(self, loop):
        return super().build_test_loop(loop)

    def build_dataloader(self, dataloader, seed=None, diff_rank_seed=False):
        sampler = dataloader.get('sampler') if isinstance(dataloader, dict) else None
        skip = None
        training = dataloader is self._train_dataloader  # as given; train_dataloader would build it
        if training and (file := self.hook_of(CheckDataHook).skip_to):
            skip = functools.partial(list_skipped, file)
        if training and isinstance(sampler, dict):
            kind = sampler.get('type')
            kind = DATA_SAMPLERS.get(kind) if isinstance(kind, str) else kind
            if kind in (DefaultSampler, InfiniteSampler):
                dataloader = {**dataloader, 'sampler': {**sampler, 'type': COUNTED[kind]}}
            batches = dataloader.get('batch_sampler')
            if kind is DefaultSampler and is_grouped_by_shape(batches):
                shared = dict(type='SharedBatchSampler', grouped=batches)
                dataloader = {**dataloader, 'batch_sampler': shared}
        with explained_data(), annotations_checked(skip):
            return super().build_dataloader(dataloader, seed, diff_rank_seed)

    def save_checkpoint(self, *args, **kwargs) -> None:
        self.hook_of(ResumeHook).gather_gradients(self)
        super().save_checkpoint(*args, **kwargs)

    def choose_checkpoint(self) -> None:
        """Choose the checkpoint to resume from, in one process for all; without one, start anew.

        A job that torchrun has restarted takes the newest that it wrote, if there is any.
        """
        automatic = self.resume_newest or (self._resume is True and self._load_from is None)
        if self._chosen or not (automatic or may_restart()):
            return
        self._chosen = True
        found: list = [None]
        if is_main_process():
            try:
                since = 0.0 if automatic else first_start(self.work_dir)
                path, content = (None, {}) if since is None else newest_checkpoint(self, since)
                found = [path]
                if path and content:
                    use_safe_loading({path: content})  # not to read it again
            except UserError as error:
                found = [error]
        broadcast_object_list(found)
        if isinstance(found[0], UserError):
            raise found[0]
        if found[0] is not None:
            self._resume, self._load_from = True, found[0]
        elif automatic:
            self._resume = False
            self.logger.warning('There is no whole checkpoint to resume, training starts anew.')

    def train(self):
        self._train_loop = self.train_loop  # builds it: choosing a checkpoint depends on it
        self.choose_checkpoint()
        token = whole_model_follows.set(bool(self._load_from))
        try:
            return self.run_logging_errors(super().train)
        finally:
            whole_model_follows.reset(token)
            self.hook_of(PreemptionHook).restore()

    def val(self) -> dict:
        return self.run_logging_errors(super().val)

    def test(self) -> dict:
        return self.run_logging_errors(super().test)

    def run_logging_errors(self, run: Callable):
        """Run a loop; log the traceback of any error that is not the user's mistake."""
        try:
            result = run()
        except UserError:
            raise
        except Exception as error:
            if getattr(error, 'errno', None) not in FULL:  # or the log cannot be written either
                self.logger.error(traceback.format_exc())
            raise
        # A process that ends while others still communicate with it aborts the finished job.
        barrier()
        return result


@RUNNERS.register_module()
class CarefulRunner(RobustRunnerMixin, Runner):
    """MMEngine's Runner with :class:`RobustRunnerMixin`: ``runner_type = 'CarefulRunner'`` in a
    config. With a ``strategy`` it builds a :class:`CarefulFlexibleRunner`."""

    @name_config_section('param_scheduler')
    def build_param_scheduler(self, scheduler):
        return super().build_param_scheduler(scheduler)

    @name_config_section('model')
    def build_model(self, model):
        return without_sync_batchnorm(super().build_model(model), self.distributed)

    @name_config_section('optim_wrapper')
    def build_optim_wrapper(self, optim_wrapper):
        try:
            return super().build_optim_wrapper(optim_wrapper)
        except NotImplementedError as error:  # has no message in MMDetection and MMSegmentation
            if 'LearningRateDecay' not in str(optim_wrapper.get('constructor')):
                raise
            raise ConfigError(
                f"optim_wrapper.constructor: {optim_wrapper['constructor']} does not support this "
                "backbone; use 'LayerDecayOptimWrapperConstructor' with "
                'paramwise_cfg=dict(layer_decay_rate=...), see docs/custom_projects.md.'
            ) from error

    def scale_lr(self, optim_wrapper, auto_scale_lr=None) -> None:
        super().scale_lr(optim_wrapper, auto_scale_lr)
        if (auto_scale_lr or {}).get('enable'):
            scale_by_accumulation(optim_wrapper, self.logger)

    @classmethod
    def from_cfg(cls, cfg) -> Union['CarefulRunner', 'CarefulFlexibleRunner']:
        check_classifier(cfg)
        if cfg.get('strategy'):
            return CarefulFlexibleRunner.from_cfg(cfg)
        return super().from_cfg(cfg)


@RUNNERS.register_module()
class CarefulFlexibleRunner(RobustRunnerMixin, FlexibleRunner):
    """MMEngine's FlexibleRunner, which shards models by strategies, with
    :class:`RobustRunnerMixin`."""

    model: Any

    @name_config_section('strategy')
    def build_strategy(self, *args, **kwargs):
        strategy = super().build_strategy(*args, **kwargs)
        scale_lr = strategy._scale_lr  # no public method is called between building and training

        def scale_lr_by_total_batch() -> None:
            scale_lr()
            if (strategy._auto_scale_lr or {}).get('enable'):
                scale_by_accumulation(strategy.optim_wrapper, self.logger)

        strategy._scale_lr = scale_lr_by_total_batch
        return strategy

    def run_logging_errors(self, run: Callable):
        if isinstance(self.model, dict) and self.distributed and get_device() == 'cpu':
            self.model = without_sync_batchnorm(MODELS.build(self.model), True)
        return super().run_logging_errors(run)

    def save_checkpoint(self, out_dir: str, filename: str, *args, **kwargs) -> None:
        """Write a checkpoint atomically: rename it once all processes have written their part.

        Strategies write files, or a folder with a file of each process, without a file backend.
        """
        hook = self.hook_of(CheckpointHook)
        if (hook.backend_args or {}).get('backend') != 'whole':
            super().save_checkpoint(out_dir, filename, *args, **kwargs)
            return
        super().save_checkpoint(out_dir, f'{filename}.part', *args, **kwargs)
        barrier()
        if is_main_process():
            WholeFileBackend.finish(Path(out_dir, f'{filename}.part'), Path(out_dir, filename))
        barrier()


def without_sync_batchnorm(model: nn.Module, distributed: bool) -> nn.Module:
    """Replace SyncBatchNorm, which needs a GPU, in a distributed training on CPUs.

    MMEngine does so only for a single process.
    """
    return revert_sync_batchnorm(model) if distributed and get_device() == 'cpu' else model


def scale_by_accumulation(optim_wrapper, logger: logging.Logger) -> None:
    """Scale learning rates by the number of batches in an update, which MMEngine's linear scaling
    ignores."""
    several = isinstance(optim_wrapper, OptimWrapperDict)
    for wrapper in optim_wrapper.values() if several else [optim_wrapper]:
        count = getattr(wrapper, '_accumulative_counts', 1)  # has no public name
        if count > 1:
            logger.info(
                f'Gradients of {count} batches are accumulated (accumulative_counts): the total '
                f'batch size is {count} times larger. Scaling the LR by another {count}.'
            )
            for group in wrapper.optimizer.param_groups:
                group['lr'] *= count


def build_runner(cfg) -> Runner:
    """Build the runner that a config names by ``runner_type``, with this package's for MMEngine's.
    Raise a UserError if there is no such runner."""
    named = cfg.get('runner_type') or ('FlexibleRunner' if cfg.get('strategy') else 'Runner')
    kind = RUNNERS.get(named) if isinstance(named, str) else named
    if kind is None:
        raise UserError(f"runner_type: there is no runner '{named}'.")
    kind = {Runner: CarefulRunner, FlexibleRunner: CarefulFlexibleRunner}.get(kind, kind)
    return kind.from_cfg(cfg)
