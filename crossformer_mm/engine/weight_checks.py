"""Strict loading: weights are read as plain data and must fit, none stay random silently."""

from typing import Optional

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop

from ..checkpoint import CheckpointError, fit_checkpoint, model_weights, use_safe_loading
from ..class_names import recorded
from ..errors import UserError
from ..openmmlab import warn
from .epoch_loop import ResumableTrainLoop
from .runner_access import bare_model, built_loop, checkpoint_name, is_resumed, is_sharded
from .total_batch import batch_advice


@HOOKS.register_module()
class SafeLoadingHook(Hook):
    """Make MMEngine read every checkpoint as plain data and find weights under any of their names.

    See :func:`crossformer_mm.checkpoint.use_safe_loading`.
    """

    priority = 'VERY_HIGH'  # before hooks such as EMAHook, which read state_dict

    def __init__(self):
        use_safe_loading()  # here: a strategy loads weights before it calls hooks

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

    To resume a training or to test, all weights must fit. To start a training, those of the
    backbone must: heads may be for other classes. MMEngine's ``activation_checkpointing`` is
    refused, because it leaves weights without gradients.

    Args:
        allow_partial (bool): test even if weights are missing, unexpected or of another shape.
    """

    priority = 'VERY_LOW'  # after hooks such as EMAHook, which choose weights

    def __init__(self, allow_partial: bool = False):
        self.allow_partial = allow_partial

    def before_run(self, runner) -> None:
        modules = runner.cfg.get('activation_checkpointing')
        if modules and built_loop(runner, 'train') is not None:
            raise UserError(
                f'activation_checkpointing = {modules!r} is refused, because a module whose input '
                'is an image, a tuple or a list gets no gradient. Use model.backbone.with_cp=True.'
            )

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        name, training = checkpoint_name(runner), built_loop(runner, 'train') is not None
        advice = 'Give the config that it was trained with' + (
            '.' if training else ', or evaluate a partly random model with --allow-partial.'
        )
        required: Optional[str] = ''
        if self.allow_partial and not training:
            required = None
        elif training and not is_resumed(runner):
            required = 'backbone.'
        if not is_sharded(runner):
            try:
                fit_checkpoint(bare_model(runner), checkpoint, name, required)
            except CheckpointError as error:
                raise CheckpointError(f'{error} {advice}') from None
        if training and is_resumed(runner):
            absent = [key for key in ('optimizer', 'message_hub', 'meta') if key not in checkpoint]
            if absent:
                raise CheckpointError(
                    f"Checkpoint '{name}' holds no state of a training ({', '.join(absent)}): "
                    'start a new one from its weights with --cfg-options load_from=FILE.'
                )
            if isinstance(runner.train_loop, EpochBasedTrainLoop):
                resume_at_epoch(runner, checkpoint, name)
        compare_classes(runner, checkpoint)


def epoch_of(checkpoint: dict, length: int) -> Optional[int]:
    """Return the number of finished epochs of a checkpoint; None: it was written mid-epoch.
    ``length`` is the number of iterations in an epoch, for a log that does not have it."""
    length = epoch_length(checkpoint, length)
    epoch, done = checkpoint['meta']['epoch'], checkpoint['meta']['iter']
    if done == (epoch + 1) * length:  # written after its last iteration, before it was counted
        return epoch + 1
    return None if epoch * length < done < (epoch + 1) * length else epoch


def epoch_length(checkpoint: dict, length: int) -> int:
    """Return the iterations in an epoch when a checkpoint was written, ``length`` if unknown."""
    log = checkpoint['message_hub'].get('runtime_info') or {}
    if log.get('max_iters') and log.get('max_epochs'):
        return log['max_iters'] // log['max_epochs']
    return length


def is_resumable(loop: EpochBasedTrainLoop, checkpoint: dict) -> bool:
    """Check whether a loop of epochs can resume from a checkpoint.

    MMEngine's own loop can do so only from the end of an epoch, and none where an epoch had another
    number of iterations.
    """
    return epoch_of(checkpoint, len(loop.dataloader)) is not None or resumes_mid_epoch(
        loop, checkpoint
    )


def resumes_mid_epoch(loop: EpochBasedTrainLoop, checkpoint: dict) -> bool:
    """Check that a loop can resume amid an epoch, which had as many iterations."""
    length = len(loop.dataloader)
    return isinstance(loop, ResumableTrainLoop) and epoch_length(checkpoint, length) == length


def resume_at_epoch(runner, checkpoint: dict, name: str) -> None:
    """Make a resumed loop of epochs begin where the checkpoint was written. MMEngine would repeat
    the epoch of a checkpoint that was written by iterations, and count on. Raise a CheckpointError
    for a checkpoint from mid-epoch, if the loop cannot resume there."""
    loop, meta = runner.train_loop, checkpoint['meta']
    length = len(loop.dataloader)
    if not is_resumable(loop, checkpoint):
        raise CheckpointError(
            f"Checkpoint '{name}' was written in the middle of epoch {meta['epoch'] + 1}, after "
            f"iteration {meta['iter']}, where {type(loop).__name__} cannot resume"
            + (
                f', because an epoch had {epoch_length(checkpoint, length)} iterations and now has '
                f'{length}: set {batch_advice(checkpoint)}, or use'
                if isinstance(loop, ResumableTrainLoop)
                else ": give train_cfg the type 'ResumableTrainLoop', or use"
            )
            + ' a checkpoint that was written at the end of an epoch.'
        )
    epoch = epoch_of(checkpoint, length)
    if epoch is None or (resumes_mid_epoch(loop, checkpoint) and epoch != meta['epoch']):
        return  # mid-epoch, or before what hooks do after the last iteration of an epoch
    if epoch and epoch * length != meta['iter'] and not meta.get('batch_size'):
        warn(
            f"Checkpoint '{name}' was written when an epoch had {meta['iter'] / epoch:g} "
            f'iterations, now it has {length}: with other processes or another batch the '
            'learning rate, whose schedule counts iterations, is not what it would have '
            'been.'
        )
    meta.update(epoch=epoch, iter=epoch * length)


def compare_classes(runner, checkpoint: dict) -> None:
    """Warn if a checkpoint has other class names than the data set, whose names results get."""
    theirs = recorded(checkpoint).get('classes')
    loader = getattr(built_loop(runner, 'test'), 'dataloader', None)
    dataset = getattr(loader, 'dataset', None)
    classes = getattr(dataset, 'metainfo', {}).get('classes')
    if theirs and classes and list(theirs) != list(classes):
        warn(
            'The checkpoint names other classes than the dataset, whose names are used: '
            f'{list(theirs)[:3]}... and {list(classes)[:3]}...'
        )
