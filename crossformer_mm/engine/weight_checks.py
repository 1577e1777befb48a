"""Weights are read as plain data, under any of their names, and none stay random unsaid."""

import logging
from typing import Optional

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, find_latest_checkpoint
from mmengine.runner.base_loop import BaseLoop
from torch import nn

from ..checkpoint import CheckpointError, fit_checkpoint, model_weights, use_safe_loading
from ..errors import UserError


def checkpoint_name(runner) -> str:
    """The file that a runner loads; without a name, the newest in its work folder."""
    given = runner._load_from or runner._resume
    return str(find_latest_checkpoint(runner.work_dir) if given is True else given)


def bare_model(runner) -> nn.Module:
    """A runner's model without wrappers."""
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def is_sharded(runner) -> bool:
    """Whether a strategy keeps parts of the model in each process: it loads by its own rules."""
    name = type(getattr(runner, 'strategy', None)).__name__
    return name not in ('NoneType', 'SingleDeviceStrategy', 'DDPStrategy')


@HOOKS.register_module()
class SafeLoadingHook(Hook):
    """Let MMEngine read every checkpoint as plain data, see
    :func:`crossformer_mm.checkpoint.use_safe_loading`, and know weights under any of their names.
    """

    priority = 'VERY_HIGH'  # other hooks, such as those of averaged weights, find state_dict

    def __init__(self):
        use_safe_loading()  # now, for a strategy loads weights before hooks are called

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if isinstance(checkpoint.get('meta'), dict):
            checkpoint['meta'].pop('config', None)  # MMEngine would run it as a program
        if not is_sharded(runner):
            checkpoint['state_dict'] = model_weights(
                bare_model(runner), checkpoint, checkpoint_name(runner)
            )


@HOOKS.register_module()
class CheckWeightsHook(Hook):
    """Refuse a checkpoint that does not fit; MMEngine would warn and leave weights random.

    All of a model must be there to resume a training or to test. To start a training, the backbone
    must: other heads are for other classes, and of another backbone nothing is of use. MMEngine's
    ``activation_checkpointing`` is refused, because it leaves weights without gradients.

    Args:
        allow_partial (bool): test even if weights are missing, unexpected or of another shape.
    """

    priority = 'VERY_LOW'  # other hooks, such as those of averaged weights, choose weights first

    def __init__(self, allow_partial: bool = False):
        self.allow_partial = allow_partial

    def before_run(self, runner) -> None:
        modules = runner.cfg.get('activation_checkpointing')
        if modules and isinstance(runner._train_loop, BaseLoop):
            raise UserError(
                f'activation_checkpointing = {modules!r} is refused, because a module whose input '
                'is an image, a tuple or a list gets no gradient. Use model.backbone.with_cp=True.'
            )

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        name, training = checkpoint_name(runner), isinstance(runner._train_loop, BaseLoop)
        advice = 'Give the config that it was trained with' + (
            '.' if training else ', or evaluate a partly random model with --allow-partial.'
        )
        required: Optional[str] = ''
        if self.allow_partial and not training:
            required = None
        elif training and not runner._resume:
            required = 'backbone.'
        if not is_sharded(runner):
            try:
                fit_checkpoint(bare_model(runner), checkpoint, name, required)
            except CheckpointError as error:
                raise CheckpointError(f'{error} {advice}') from None
        if training and runner._resume:
            absent = [key for key in ('optimizer', 'message_hub', 'meta') if key not in checkpoint]
            if absent:
                raise CheckpointError(
                    f"Checkpoint '{name}' holds no state of a training ({', '.join(absent)}): "
                    'start a new one from its weights with --cfg-options load_from=FILE.'
                )
            if isinstance(runner.train_loop, EpochBasedTrainLoop):
                go_on_after_whole_epoch(runner, checkpoint, name)
        compare_classes(runner, checkpoint)


def epoch_of(checkpoint: dict, length: int) -> Optional[int]:
    """The epochs that a checkpoint has done in a loop of epochs; None: it is amid one.

    Args:
        checkpoint: with the log of a training.
        length: iterations in an epoch, where the log does not say how many there were.
    """
    log = checkpoint['message_hub'].get('runtime_info') or {}
    if log.get('max_iters') and log.get('max_epochs'):
        length = log['max_iters'] // log['max_epochs']
    epoch, done = checkpoint['meta']['epoch'], checkpoint['meta']['iter']
    if done == (epoch + 1) * length:  # written after its last iteration, before it was counted
        return epoch + 1
    return None if epoch * length < done < (epoch + 1) * length else epoch


def go_on_after_whole_epoch(runner, checkpoint: dict, name: str) -> None:
    """Let a resumed loop of epochs begin at the beginning of one; MMEngine would do the epoch of a
    checkpoint that was written by iterations once more, and count on from there."""
    length, meta = len(runner.train_dataloader), checkpoint['meta']
    epoch = epoch_of(checkpoint, length)
    if epoch is None:
        raise CheckpointError(
            f"Checkpoint '{name}' was written amid epoch {meta['epoch'] + 1}, after iteration "
            f"{meta['iter']}, where a loop of epochs cannot go on: resume from one that was "
            'written at the end of an epoch.'
        )
    if epoch and epoch * length != meta['iter']:
        print_log(
            f"Checkpoint '{name}' was written when an epoch had {meta['iter'] / epoch:g} "
            f'iterations, now it has {length}: with other processes or another batch the '
            'learning rate, whose schedule counts iterations, is not what it would have '
            'been.',
            'current',
            logging.WARNING,
        )
    meta.update(epoch=epoch, iter=epoch * length)


def compare_classes(runner, checkpoint: dict) -> None:
    """Warn if a checkpoint names other classes than the dataset, by which results are read."""
    meta = checkpoint['meta'] if isinstance(checkpoint.get('meta'), dict) else {}
    said = (meta.get('dataset_meta') or {}).get('classes') or meta.get('CLASSES')
    loop = getattr(runner, '_test_loop', None)
    dataset = getattr(getattr(loop, 'dataloader', None), 'dataset', None)
    classes = getattr(dataset, 'metainfo', {}).get('classes')
    if said and classes and list(said) != list(classes):
        print_log(
            'The checkpoint names other classes than the dataset, whose names are used: '
            f'{list(said)[:3]}... and {list(classes)[:3]}...',
            'current',
            logging.WARNING,
        )
