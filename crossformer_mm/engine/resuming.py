"""Resume a training exactly: save state that MMEngine does not, warn of settings without effect."""

import copy
import types
from collections import Counter
from numbers import Number
from typing import Any, Dict, Iterator, List, Optional, Tuple

from mmengine.dist import all_reduce, get_world_size, is_main_process
from mmengine.hooks import (
    CheckpointHook,
    EMAHook,
    Hook,
    IterTimerHook,
    LoggerHook,
    ParamSchedulerHook,
    RuntimeInfoHook,
)
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop
from torch import Size, Tensor, nn

from ..checkpoint import CheckpointError
from ..openmmlab import warn
from .epoch_loop import iterations_in_epoch
from .preemption import PreemptionHook
from .runner_access import bare_model, built_loop, checkpoint_name, is_resumed, is_sharded
from .total_batch import compare_batches, record_batch

# Their counters concern one process only; MMEngine saves the rest of their state.
WITHOUT_STATE = (
    CheckpointHook,
    EMAHook,
    IterTimerHook,
    LoggerHook,
    ParamSchedulerHook,
    PreemptionHook,
    RuntimeInfoHook,
)
# Attributes of schedulers that change from step to step.
PROGRESS = {
    'last_step',
    '_global_step',
    '_last_value',
    'base_values',
    'best',
    'num_bad_epochs',
    'cooldown_counter',
    'verbose',
}
ADVICE = 'start a new training from its weights with --cfg-options load_from={}'


@HOOKS.register_module()
class ResumeHook(Hook):
    """Make a resumed training equal to an uninterrupted one, and warn where it cannot be.

    The hook saves and restores attributes of hooks and of the model's modules that are numbers, or
    lists, tuples and dicts of numbers, and that have changed since the training began. Examples are
    the wait count of EarlyStoppingHook and the size that BatchSyncRandomResize has drawn. Flags and
    names are not saved: they concern one process. Between two updates the gradients that have been
    accumulated are saved, too: their mean over all processes, if the runner calls
    :meth:`gather_gradients`.

    MMEngine writes checkpoints before the validation that follows. The hook repeats that validation
    before a resumed training continues, if something depends on its result: ``save_best``,
    EarlyStoppingHook, a scheduler such as ReduceOnPlateauLR, or a hook with ``after_val_epoch``.

    A warning lists settings of the optimizer and of schedulers that differ from the checkpoint's,
    because those of the checkpoint are used.

    Raises:
        CheckpointError: the optimizer's state is for other parameters.
    """

    priority = 'LOWEST'  # the validation needs all other hooks to be ready

    def __init__(self):
        self._resumed = ''
        self._restored: Optional[dict] = None
        self._initial: Dict[str, dict] = {}
        self._before_val: Optional[dict] = None
        self._gradients: Optional[Dict[str, Tensor]] = None
        self._at_start: Dict[str, dict] = {}

    def gather_gradients(self, runner) -> None:
        """Take the mean of accumulated gradients over all processes, for the next checkpoint."""
        gradients = {}
        # Such as wait for those of further iterations.
        waiting = any(
            isinstance(wrapper, OptimWrapper) and not wrapper.should_update()
            for _, wrapper in optimizers_of(runner).values()
        )
        if waiting and not is_sharded(runner):
            for name, parameter in bare_model(runner).named_parameters():
                if parameter.grad is not None:
                    gradients[name] = parameter.grad.clone()
                    all_reduce(gradients[name], 'mean')
        self._gradients = gradients if is_main_process() else {}

    def before_val(self, runner) -> None:
        if built_loop(runner, 'train') is not None:
            self._before_val = dict(
                changed=self.changed(runner),
                settings={
                    where: settings_of(wrapper.param_groups)
                    for where, (_, wrapper) in optimizers_of(runner).items()
                },
                schedulers=copy.deepcopy(states_of(runner.param_schedulers)),
            )

    def after_val(self, runner) -> None:
        self._before_val = None

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        # CheckpointHook rewrites the last checkpoint during a validation that is the best so far,
        # when some hooks have seen its result and others have not.
        record_batch(runner, checkpoint)
        if self._gradients is None and get_world_size() == 1:
            self.gather_gradients(runner)
        if self._gradients and 'optimizer' in checkpoint:
            checkpoint['gradients'] = {name: one.cpu() for name, one in self._gradients.items()}
        self._gradients = None
        before = self._before_val
        checkpoint['resume_state'] = before['changed'] if before else self.changed(runner)
        if not before:
            return
        if 'param_schedulers' in checkpoint:
            checkpoint['param_schedulers'] = before['schedulers']
        for where, (name, _) in optimizers_of(runner).items():
            state, settings = optimizer_state(checkpoint, name), list(before['settings'][where])
            if 'base_param_settings' in state:
                state['base_param_settings'] = {**state['base_param_settings'], **settings.pop()}
            if 'param_groups' in state:
                state['param_groups'] = [
                    {**group, **old} for group, old in zip(state['param_groups'], settings)
                ]

    def changed(self, runner) -> Dict[str, dict]:
        """Return the numbers that have changed since the training began, by owner."""
        found: Dict[str, dict] = {}
        for name, owner in owners(runner):
            first = self._initial.get(name, {})
            for key, value in numbers_in(owner).items():
                if key not in first or first[key] != value:
                    found.setdefault(name, {})[key] = copy.deepcopy(value)
        return found

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if built_loop(runner, 'train') is not None and is_resumed(runner):
            self._resumed = checkpoint_name(runner)
            self._restored = checkpoint.get('resume_state')
            self._gradients = checkpoint.get('gradients')
            if not is_sharded(runner):
                check_optimizer(runner, checkpoint, self._resumed)
            warn_of_unused_settings(runner, checkpoint, self._resumed)
            compare_batches(runner, checkpoint, self._resumed)

    def before_train(self, runner) -> None:
        self._initial = {name: copy.deepcopy(numbers_in(owner)) for name, owner in owners(runner)}
        if not self._resumed:
            return
        restore_numbers(runner, self._restored or {})
        gradients = self._gradients or {}
        for name, parameter in bare_model(runner).named_parameters():
            if name in gradients:
                parameter.grad = gradients[name].to(parameter)
        if gradients:
            runner.logger.info('Gradients accumulated before the checkpoint are restored.')
        self._gradients = None
        hooks = hooks_that_read_validation(runner)
        if hooks and self._restored is None:
            runner.logger.warning(
                f"Checkpoint '{self._resumed}' was written without ResumeHook: "
                f"{', '.join(hooks)} may start to count anew."
            )
        users = [*hooks, *others_that_read_validation(runner)]
        if users and validation_is_due(runner):
            runner.logger.info(
                f"The validation that followed checkpoint '{self._resumed}' is done first: "
                f"its result counts for {', '.join(users)}."
            )
            validate_as_before(runner)
        self._at_start = self.changed(runner)

    def before_train_epoch(self, runner) -> None:
        loop = runner.train_loop
        if not isinstance(loop, EpochBasedTrainLoop) or iterations_in_epoch(loop):
            restore_numbers(runner, self._at_start)  # hooks have counted the epoch before
        self._at_start = {}


def restore_numbers(runner, numbers: Dict[str, dict]) -> None:
    """Set the attributes that :meth:`ResumeHook.changed` returned."""
    for name, owner in owners(runner):
        for key, value in numbers.get(name, {}).items():
            if is_numbers(vars(owner).get(key)):  # not replaced by an object
                vars(owner)[key] = copy.deepcopy(value)


def numbers_in(owner) -> Dict[str, Any]:
    """Return the attributes that are numbers or containers of numbers."""
    return {name: value for name, value in vars(owner).items() if is_numbers(value)}


def is_numbers(value) -> bool:
    """Check for a number that is no flag, None, or a container of these."""
    if type(value) in (list, tuple, Size):
        return all(map(is_numbers, value))
    if type(value) is dict:
        return all(isinstance(key, (str, int)) for key in value) and all(
            map(is_numbers, value.values())
        )
    return value is None or isinstance(value, Number) and not isinstance(value, bool)


def owners(runner) -> Iterator[Tuple[str, Any]]:
    """Yield hooks, modules of the model and their helper objects, with stable names."""
    counts: Counter = Counter()
    for hook in runner.hooks:
        if not isinstance(hook, (*WITHOUT_STATE, ResumeHook)):
            name = type(hook).__name__
            yield f'hook.{name}.{counts[name]}', hook
            counts[name] += 1
    for name, module in bare_model(runner).named_modules():
        yield f'model.{name}', module
        yield from helpers(module, f'model.{name}')


def helpers(owner, name: str, depth: int = 2) -> Iterator[Tuple[str, Any]]:
    """Yield objects in attributes of a module that are no modules, such as assigners."""
    for key, value in list(vars(owner).items()) if depth else ():
        parts = value if type(value) in (list, tuple) else [value]
        for index, part in enumerate(parts):
            if hasattr(part, '__dict__') and not isinstance(
                part, (nn.Module, Tensor, dict, type, types.ModuleType, types.FunctionType)
            ):
                yield f'{name}.{key}.{index}', part
                yield from helpers(part, f'{name}.{key}.{index}', depth - 1)


# The validation that follows a checkpoint


def hooks_that_read_validation(runner) -> List[str]:
    """Return the names of hooks that read results of validation, except those that only log."""
    return [
        type(hook).__name__
        for hook in runner.hooks
        if not isinstance(hook, WITHOUT_STATE)
        and type(hook).after_val_epoch is not Hook.after_val_epoch
    ]


def others_that_read_validation(runner) -> List[str]:
    """Return the names of schedulers that read results of validation, and ``save_best`` if set."""
    names = [
        type(scheduler).__name__
        for scheduler in schedulers_of(runner.param_schedulers).values()
        if getattr(scheduler, 'need_val_args', False)
    ]
    best = any(isinstance(hook, CheckpointHook) and hook.save_best for hook in runner.hooks)
    return names + ['save_best'] * best


def validation_is_due(runner) -> bool:
    """Check whether MMEngine's loops validate at the current epoch or iteration."""
    loop = runner.train_loop
    if runner.val_loop is None or not hasattr(loop, 'val_interval'):
        return False
    if isinstance(loop, EpochBasedTrainLoop) and iterations_in_epoch(loop):
        return False  # it follows when the epoch is done
    done, last = (
        (loop.epoch, loop.max_epochs)
        if isinstance(loop, EpochBasedTrainLoop)
        else (loop.iter, loop.max_iters)
    )
    loop._decide_current_val_interval()  # val_interval is out of date until the loop has run
    return done >= loop.val_begin and (done % loop.val_interval == 0 or done == last)


def validate_as_before(runner) -> None:
    """Validate with the epoch and iteration that hooks and metrics saw at the checkpoint."""
    now = {name: runner.message_hub.get_info(name) for name in ('epoch', 'iter')}
    runner.message_hub.update_info('iter', runner.iter - 1)
    if isinstance(runner.train_loop, EpochBasedTrainLoop):
        runner.message_hub.update_info('epoch', runner.epoch - 1)
    runner.val_loop.run()
    runner.message_hub.update_info_dict(now)


# Settings of the config that those of the checkpoint replace


def schedulers_of(schedulers) -> Dict[str, Any]:
    """Return schedulers, or their states in a checkpoint, by their keys in a config."""
    named = schedulers if isinstance(schedulers, dict) else {'': schedulers or []}
    return {
        f"param_scheduler.{f'{name}.' if name else ''}{index}": one
        for name, several in named.items()
        for index, one in enumerate(several)
    }


def states_of(schedulers):
    """Return states of schedulers in the format of MMEngine's checkpoints."""
    if isinstance(schedulers, dict):
        return {name: states_of(several) for name, several in schedulers.items()}
    return [scheduler.state_dict() for scheduler in schedulers or []]


def optimizers_of(runner) -> Dict[str, Tuple[str, OptimWrapper]]:
    """Return (name among several, wrapper) of each optimizer, by its key in a config."""
    wrapper = runner.optim_wrapper
    if isinstance(wrapper, OptimWrapperDict):
        return {f'optim_wrapper.{name}.optimizer': (name, one) for name, one in wrapper.items()}
    return {'optim_wrapper.optimizer': ('', wrapper)}


def optimizer_state(checkpoint: dict, name: str) -> dict:
    """Return the state of an optimizer in a checkpoint, empty if there is none."""
    state = checkpoint.get('optimizer') or {}
    return (state.get(name) or {}) if name else state


def settings_of(groups: List[dict]) -> List[dict]:
    """Copy the parameter groups of an optimizer without parameters."""
    return [
        {key: copy.deepcopy(value) for key, value in group.items() if key != 'params'}
        for group in groups
    ]


def check_optimizer(runner, checkpoint: dict, name: str) -> None:
    """Raise a CheckpointError for the state of another optimizer or for other parameters, which
    PyTorch cannot use."""
    for where, (key, wrapper) in optimizers_of(runner).items():
        groups = wrapper.optimizer.param_groups
        theirs = optimizer_state(checkpoint, key).get('param_groups', groups)
        keys, their_keys = (
            {key for group in part for key in group if not key.startswith(('initial_', 'param'))}
            for part in (groups, theirs)
        )
        if keys - their_keys and their_keys - keys:  # versions of PyTorch only add some
            raise CheckpointError(
                f"Checkpoint '{name}' cannot be resumed: its {where} is another one, with "
                f"{', '.join(sorted(their_keys - keys))}, than the config's "
                f'{type(wrapper.optimizer).__name__} with {", ".join(sorted(keys - their_keys))}. '
                f'Leave the optimizer as it was, or {ADVICE.format(name)}.'
            )
        sizes, their_sizes = ([len(group['params']) for group in part] for part in (groups, theirs))
        if sizes != their_sizes:
            raise CheckpointError(
                f"Checkpoint '{name}' cannot be resumed: its {where} has {sum(their_sizes)} "
                f'parameters in {len(theirs)} groups, that of the config {sum(sizes)} in '
                f'{len(groups)}. Leave frozen_stages and paramwise_cfg as they were, or '
                f'{ADVICE.format(name)}.'
            )


def warn_of_unused_settings(runner, checkpoint: dict, name: str) -> None:
    """Warn of settings that differ from the checkpoint's, which replace them."""
    found: Dict[str, List[str]] = {}

    def compare(where: str, old, new) -> None:
        old, new = plain(old), plain(new)
        if old != new:
            pairs = found.setdefault(where, [])
            pair = f'{old} (config: {new})'
            if pair not in pairs:
                pairs.append(pair)

    for where, (name_in_state, wrapper) in optimizers_of(runner).items():
        theirs = optimizer_state(checkpoint, name_in_state).get('param_groups') or []
        for group, their in zip(wrapper.optimizer.param_groups, theirs):
            for key in group.keys() & their.keys():
                first = f'initial_{key}'  # which schedulers leave as it is
                if not key.startswith('initial_') and key not in ('params', 'param_names'):
                    compare(
                        f'{where}.{key}', their.get(first, their[key]), group.get(first, group[key])
                    )
    saved = schedulers_of(checkpoint.get('param_schedulers'))
    for where, scheduler in schedulers_of(runner.param_schedulers).items():
        state, their = scheduler.state_dict(), saved.pop(where, None)
        if their is None:
            found[where] = [f'none (config: {type(scheduler).__name__}, which starts now)']
        elif state.keys() != their.keys():
            found[where] = [f'one of another type (config: {type(scheduler).__name__})']
        else:
            for key in sorted(state.keys() - PROGRESS):
                compare(f'{where}.{key}', their[key], state[key])
    for where in saved:
        found[where] = ['one more (config: none, so it ends)']
    if found:
        listed = '; '.join(
            f"{where}: {pairs[0]}" + (f' and {len(pairs) - 1} more' if pairs[1:] else '')
            for where, pairs in found.items()
        )
        warn(
            f"Checkpoint '{name}' was written with other settings, and those that it holds are "
            f'used: {listed}. For those of the config, {ADVICE.format(name)}.'
        )


def plain(value):
    """Convert a setting to the form in which it is compared and printed."""
    if isinstance(value, Counter):
        return sorted(value.elements())
    return list(value) if isinstance(value, tuple) else value
