"""Stop a training at the first loss or gradient that is not finite."""

from typing import Dict, List

import torch
from mmengine.dist import all_gather_object, all_reduce
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..errors import UserError
from .resuming import optimizers_of
from .runner_access import bare_model, built_loop

# GradScaler begins at 2^16 and halves the scale at each: at 2^-4 float16 has no gradients left.
MAX_SKIPS = 20


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Stop at the first iteration whose loss or gradient norm is not finite, in all processes.

    The error names the iteration, the losses and the image files. The checkpoints stay as they are:
    none is written of this iteration, and none whose weights are not finite. (CheckpointHook
    removes old ones before it writes. Use WholeFilesHook, too, which puts that off.)

    With a loss scaler (float16), iterations whose update the scaler skips are tolerated.

    Args:
        max_skips (int): number of such iterations in a row at which the training stops.

    Raises:
        UserError: a loss, a gradient or a weight is not finite.
    """

    priority = 'HIGH'  # before weights are averaged and checkpoints written

    def __init__(self, max_skips: int = MAX_SKIPS):
        self.max_skips = max_skips
        self.skips = 0  # in a row; ResumeHook keeps it
        self._norms: Dict[str, torch.Tensor] = {}  # of the gradients of this iteration's updates

    def before_train(self, runner) -> None:
        for where, (_, wrapper) in optimizers_of(runner).items():
            optimizer = getattr(wrapper, 'optimizer', None)
            if isinstance(optimizer, torch.optim.Optimizer):

                def note(optimizer, args, kwargs, where=where) -> None:
                    self._norms[where] = gradient_norm(optimizer)

                optimizer.register_step_pre_hook(note)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        norms, self._norms = self._norms, {}
        values = {
            **{
                name: value.detach().float().mean() if value.ndim else value.detach().float()
                for name, value in (outputs or {}).items()
                if isinstance(value, torch.Tensor)
            },
            **{where.replace('optimizer', 'gradient norm'): norm for where, norm in norms.items()},
        }
        # One read from the device; MMEngine has waited for it already, to log the losses.
        numbers = torch.stack(list(values.values())).tolist() if values else []
        finite = torch.tensor(numbers).isfinite()
        scalers = {
            where: wrapper
            for where, (_, wrapper) in optimizers_of(runner).items()
            if hasattr(wrapper, 'loss_scaler')
        }
        skipped = any(one.should_update() and where not in norms for where, one in scalers.items())
        bad = torch.tensor(int(skipped or not finite.all()))
        all_reduce(bad, 'max')
        if not bad:
            self.skips = 0 if norms else self.skips  # amid an accumulation nothing is updated
            return
        self.skips += 1
        if not scalers or self.skips >= self.max_skips:
            texts = {name: f'{number:.6g}' for name, number in zip(values, numbers)}
            losses_are_finite = bool(finite[: len(values) - len(norms)].all())
            self.stop(runner, texts, losses_are_finite, files_of(data_batch), bool(scalers))

    def stop(self, runner, texts: Dict[str, str], finite: bool, files: List[str], scaled: bool):
        """Raise the same error in all processes, of those whose losses are not finite."""
        listed = ', '.join(f'{name} {text}' for name, text in texts.items())
        listed += f" ({', '.join(files) or 'images without names'})"
        found = all_gather_object((finite, listed))
        where = [text for fine, text in found if not fine] or [text for _, text in found]
        raise UserError(
            f'Iteration {runner.iter + 1}: a loss or a gradient is not finite'
            + (f', for the {self.skips}th time in a row, so that no update was done' * scaled)
            + f": {'; '.join(where)}. The checkpoints stay as they are. Look at these images, "
            'lower the learning rate, or clip gradients with optim_wrapper.clip_grad.'
        )

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        if built_loop(runner, 'train') is None:
            return
        weights = checkpoint.get('state_dict') or {}
        for name, _ in bare_model(runner).named_parameters():
            if name in weights and not torch.isfinite(weights[name]).all():
                raise UserError(
                    f'The weights {name} are not finite after iteration '
                    f"{checkpoint['meta']['iter']}: this checkpoint is not written, the others "
                    'stay as they are. Lower the learning rate, or clip gradients with '
                    'optim_wrapper.clip_grad.'
                )


def gradient_norm(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Return the norm of all gradients, without waiting for the device."""
    gradients = [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group['params']
        if parameter.grad is not None
    ]
    norms = torch._foreach_norm(gradients) if gradients else [torch.zeros(())]
    return torch.stack([norm.float().to(norms[0].device) for norm in norms]).norm()


def files_of(data_batch) -> List[str]:
    """Return the names of the image files of a batch, as far as its samples have them."""
    samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
    names = [getattr(one, 'img_path', None) for one in samples or ()]
    return [str(name) for name in names if name]
