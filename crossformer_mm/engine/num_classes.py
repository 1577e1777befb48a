"""Compare the number of classes of a model's heads with that of a data set."""

from functools import partial
from types import SimpleNamespace
from typing import Any, Optional, Tuple

from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from ..class_names import drop_unnamed
from ..errors import ConfigError


def check_number_of_classes(runner, mode: str) -> Optional[str]:
    """Compare the numbers of classes of heads and of a data set.

    MMDetection decides which heads of a detector must have as many. More outputs than classes are
    allowed: a training may be on a part of the classes.

    Returns:
        str or None: a warning, if heads have more outputs than the data set has classes.

    Raises:
        ConfigError: a head has too few.
    """
    dataset = getattr(runner, f'{mode}_dataloader').dataset
    meta = getattr(dataset, 'metainfo', {})
    classes = meta.get('classes')
    if not classes or isinstance(classes, str) or 'thing_classes' in meta:
        return None  # heads of a panoptic model share the classes
    library = library_of(runner)

    def is_wrong(name: str, module) -> bool:
        large, kind = module.num_classes > len(classes), name.rstrip('.0123456789')
        if library == 'mmseg':  # auxiliary heads may have fewer outputs, such as borders
            return kind.endswith('decode_head') or kind.endswith('auxiliary_head') and large
        if library == 'mmdet':
            return not passes_in_mmdet(runner, (name, module), dataset)
        # MMPretrain's data sets may have names of classes without an image. In other libraries
        # num_classes may be of anything.
        return library == 'mmpretrain' and kind.endswith('head') and large

    numbers = []
    modules = dict(runner.model.named_modules())
    for name, module in modules.items():
        count = getattr(module, 'num_classes', None)
        if isinstance(count, int) and count != len(classes) and is_wrong(name, module):
            numbers.append(f'model.{name}.num_classes = {count}')
            if count < len(classes):
                raise ConfigError(
                    f'{numbers[-1]} is too small for the {len(classes)} classes of the data set, '
                    f'{classes[0]} to {classes[-1]}.'
                )
    if not numbers or any(name.endswith('language_model') for name in modules):
        return None  # text-conditioned models score words, not classes
    return (
        f'{", ".join(numbers)}: more than the {len(classes)} classes of the data set, {classes[0]} '
        f'to {classes[-1]}. The other outputs have no training data and no names: set num_classes '
        'to the number of your classes.'
    )


def library_of(runner) -> Optional[str]:
    """Return the library that a model's class is of or derived from, or else its scope."""
    libraries = ('mmdet', 'mmseg', 'mmpretrain')
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    modules = [kind.__module__.partition('.')[0] for kind in type(model).__mro__]
    scope = getattr(runner.default_scope, 'scope_name', None)
    return next((module for module in modules if module in libraries), scope)


def passes_in_mmdet(runner, part: Tuple[str, Any], dataset) -> bool:
    """Check whether MMDetection's own hook accepts a module with another number of classes."""
    # The hook takes a runner: which heads and modules are exempt is written in it only, and
    # differs between releases.
    hook = HOOKS.get('mmdet.NumClassCheckHook')()
    try:
        hook.before_val_epoch(
            SimpleNamespace(
                model=SimpleNamespace(named_modules=lambda: [part]),
                logger=runner.logger,
                val_dataloader=SimpleNamespace(dataset=dataset),
            )
        )
    except AssertionError:
        return False
    return True


def evaluate_only_named(loop) -> None:
    """Drop detections beyond the data set's classes before metrics, which have no name or category
    for them, see them."""
    # No hook is called between a prediction and the metrics.
    if 'process' not in vars(loop.evaluator):
        count = len(loop.dataloader.dataset.metainfo['classes'])
        loop.evaluator.process = partial(process_named, loop.evaluator.process, count)


def process_named(process, count: int, data_samples, data_batch=None) -> None:
    """Pass the detections of the first ``count`` classes to ``Evaluator.process``."""
    for sample in data_samples:
        drop_unnamed(sample, count)
    process(data_samples=data_samples, data_batch=data_batch)
