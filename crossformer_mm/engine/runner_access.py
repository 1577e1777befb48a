"""Access to parts of MMEngine's runners, some of which have no public name."""

from typing import Optional

from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import find_latest_checkpoint
from mmengine.runner.base_loop import BaseLoop
from torch import nn


def built_loop(runner, mode: str) -> Optional[BaseLoop]:
    """Return a runner's 'train', 'val' or 'test' loop if it is built; ``runner.train_loop`` and its
    like would build it."""
    loop = getattr(runner, f'_{mode}_loop', None)
    return loop if isinstance(loop, BaseLoop) else None


def is_resumed(runner) -> bool:
    """Check whether a runner resumes a training."""
    return bool(runner._resume)


def checkpoint_name(runner) -> str:
    """Return the file that a runner loads; if none is given, the newest in its work folder."""
    given = runner._load_from or runner._resume
    return str(find_latest_checkpoint(runner.work_dir) if given is True else given)


def bare_model(runner) -> nn.Module:
    """Return a runner's model without wrappers."""
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def is_sharded(runner) -> bool:
    """Check whether a strategy shards the model over processes; it then loads by its own rules."""
    name = type(getattr(runner, 'strategy', None)).__name__
    return name not in ('NoneType', 'SingleDeviceStrategy', 'DDPStrategy')
