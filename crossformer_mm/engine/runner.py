"""MMEngine's Runner, made for trainings that are killed and for data of other people."""
import copy
import functools
from pathlib import Path
from typing import Optional

from mmengine.hooks import CheckpointHook, LoggerHook
from mmengine.runner import Runner

from ..checkpoint import CheckpointError
from . import randomness
from . import whole_files  # noqa: F401  (registers the file backend)
from .command_line import NameWeights
from .data_checks import CountSkipped, DataError
from .errors import UserError, said


class ConfigError(UserError):
    """A config of which nothing can be built; the message is one sentence that names the part."""


def says_what(part: str):
    """Make errors of a method that builds something name the part of the config."""

    def decorate(build):
        @functools.wraps(build)
        def built(*args, **kwargs):
            try:
                return build(*args, **kwargs)
            except (UserError, CheckpointError):
                raise
            except Exception as error:  # whatever there is in a config
                raise ConfigError(f"The config's {part} cannot be built: {said(error)}.") from error

        return built

    return decorate


class CarefulRunner(Runner):
    """What the tools run.

    - Checkpoints are replaced in one step, see :mod:`whole_files`.
    - What is random depends on the seed and the iteration alone, see :mod:`randomness`.
    - Data are checked, see :mod:`checked_data`.
    - Weights are found in any file, under any of its names, see :class:`common.NameWeights`.

    The configuration that is kept with a training does not show it: any other tool
    can use it.
    """

    skip_to: Optional[str] = None  # where to list training images that are skipped

    build_visualizer = says_what('visualizer')(Runner.build_visualizer)
    build_optim_wrapper = says_what('optim_wrapper')(Runner.build_optim_wrapper)
    build_param_scheduler = says_what('param_scheduler')(Runner.build_param_scheduler)
    build_train_loop = says_what('train_cfg or train_dataloader')(Runner.build_train_loop)
    build_val_loop = says_what('val_cfg, val_dataloader or val_evaluator')(Runner.build_val_loop)
    build_test_loop = says_what('test_cfg, test_dataloader or test_evaluator')(
        Runner.build_test_loop)

    @says_what('model')
    def build_model(self, model):
        check_classifier(self.cfg)
        return super().build_model(model)

    @says_what('default_hooks or custom_hooks')
    def register_hooks(self, default_hooks=None, custom_hooks=None) -> None:
        super().register_hooks(default_hooks, custom_hooks)
        self.register_hook(randomness.SeedIterations())
        self.register_hook(NameWeights())
        for hook in self.hooks:
            if (isinstance(hook, CheckpointHook) and '://' not in str(hook.out_dir)
                    and hook.backend_args is None and hook.file_client_args is None):
                hook.backend_args = dict(backend='whole')
            if isinstance(hook, LoggerHook) and self.rank:
                # Or every process would write the results of a test to the same file, at once.
                hook.after_test_epoch = lambda *args, **kwargs: None

    def skip_bad_images(self, path: str, anew: bool) -> None:
        """Train on without images that cannot be used; list them in a file, or add to its list."""
        self.skip_to = path
        if anew and self.rank == 0:
            Path(path).unlink(missing_ok=True)
        self.register_hook(CountSkipped(path))

    def build_dataloader(self, dataloader, seed=None, diff_rank_seed=False):
        if isinstance(dataloader, dict) and isinstance(dataloader.get('dataset'), dict):
            training = dataloader is self._train_dataloader
            dataloader = copy.deepcopy(dataloader)
            dataset = dict(type='CheckedDataset', dataset=dataloader['dataset'],
                           skip_to=self.skip_to if training else None)
            counted = randomness.COUNTED.get(dataloader['sampler'].get('type'))
            if training and counted:
                dataloader['sampler']['type'] = counted
                dataset = dict(type='SeededDataset', dataset=dataset, seed=seed)
            dataloader['dataset'] = dataset
        loader = super().build_dataloader(dataloader, seed, diff_rank_seed)
        check_number_of_classes(self.cfg.model, loader.dataset)
        return loader


def check_classifier(cfg) -> None:
    """See that all of a classifier and its metrics have the same number of classes."""
    classes = (cfg.model.get('head') or {}).get('num_classes')
    mixed = (cfg.model.get('data_preprocessor') or {}).get('num_classes', classes)
    if classes != mixed:
        raise ConfigError(f'model.data_preprocessor.num_classes = {mixed} and model.head.'
                          f'num_classes = {classes} must be equal.')
    for split in ('val', 'test') if classes else ():
        evaluator = cfg.get(f'{split}_evaluator') or {}
        for metric in evaluator if isinstance(evaluator, list) else [evaluator]:
            best = metric.get('topk') or 1
            best = best if isinstance(best, int) else max(best)
            if best > classes:
                raise ConfigError(f'{split}_evaluator.topk has {best}, but there are '
                                  f'{classes} classes.')


def check_number_of_classes(model: dict, dataset) -> None:
    """See that every head can tell the classes of a data set apart."""
    classes = getattr(dataset, 'metainfo', {}).get('classes') or ()
    parts = [('model', model)]
    for name, part in parts:
        pairs = part.items() if isinstance(part, dict) else enumerate(part)
        parts += [(f'{name}.{key}', value) for key, value in pairs
                  if isinstance(value, (dict, list, tuple))]
        if isinstance(part, dict) and isinstance(part.get('num_classes'), int):
            if part['num_classes'] < len(classes):
                raise DataError(f'{name}.num_classes = {part["num_classes"]} is too small for the '
                                f'{len(classes)} classes of the data set, {classes[0]} to '
                                f'{classes[-1]}.')
