"""Training in mixed precision: float16 on GPUs, bfloat16 on GPUs and CPUs."""

import functools
from contextlib import contextmanager
from typing import Callable

import torch
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.utils import apply_to
from torch import Tensor, nn

from ..compat import multiplies_bfloat16
from ..errors import UserError
from .config import import_package

PRECISIONS = ('float16', 'bfloat16')


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """MMEngine's OptimWrapper, with the forward pass and the losses under autocast to bfloat16.

    MMEngine's AmpOptimWrapper does not support CPUs, and scales losses, which bfloat16 with
    float32's range does not need. Weights, gradients and optimizer stay in float32. MMCV's
    operators are not compiled for bfloat16: its modules, such as RoIAlign, compute in float32, and
    heads return their predictions in float32, for NMS among proposals. Validation and test are in
    float32, as with AmpOptimWrapper. The arguments are those of OptimWrapper.

    Raises:
        UserError: bfloat16 is slower than float32 on this CPU.
    """

    def __init__(self, *args, **kwargs):
        check_bfloat16("optim_wrapper.type='BFloat16OptimWrapper'", get_device())
        super().__init__(*args, **kwargs)

    @contextmanager
    def optim_context(self, model: nn.Module):
        for module in model.modules():
            if 'forward' in vars(module):
                continue  # wrapped already
            if type(module).__module__.startswith('mmcv.ops.'):
                module.forward = in_float32(module.forward)
            elif type(module).__name__.endswith('Head'):
                module.forward = to_float32(module.forward)
        with super().optim_context(model), torch.autocast(get_device(), torch.bfloat16):
            yield


def widened(value):
    """Convert tensors in bfloat16, also inside lists, tuples and dicts, to float32."""
    return apply_to(
        value, lambda one: isinstance(one, Tensor) and one.dtype == torch.bfloat16, Tensor.float
    )


def in_float32(forward: Callable) -> Callable:
    """Wrap a module's forward to compute in float32, outside autocast.

    A result that is a single tensor gets the type of the first floating point argument.
    """

    @functools.wraps(forward)
    def wide(*args, **kwargs):
        with torch.autocast(get_device(), enabled=False):
            out = forward(*widened(args), **widened(kwargs))
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        given = next(filter(Tensor.is_floating_point, tensors), None)
        return out.to(given.dtype) if isinstance(out, Tensor) and given is not None else out

    return wide


def to_float32(forward: Callable) -> Callable:
    """Wrap a module's forward to return float32."""

    @functools.wraps(forward)
    def wide(*args, **kwargs):
        return widened(forward(*args, **kwargs))

    return wide


def check_bfloat16(option: str, device_type: str) -> None:
    """Raise a UserError for a CPU on which bfloat16 is slower than float32."""
    if device_type == 'cpu' and not multiplies_bfloat16():
        raise UserError(
            f'{option}: this processor has no instructions for bfloat16 (AVX512_BF16 or AMX), and '
            'PyTorch is slower without them than in float32; leave it out to compute in float32.'
        )


def use_mixed_precision(cfg, precision: str) -> None:
    """Make a config train in mixed precision, or raise a UserError if this machine cannot."""
    if precision == 'float16':
        if get_device() in ('cpu', 'mps'):
            raise UserError(
                '--amp needs a GPU, and PyTorch sees none: leave it out to train in float32, or '
                'train in bfloat16 with --amp bfloat16.'
            )
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
        return
    check_bfloat16('--amp bfloat16', get_device())
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UserError(
            '--amp bfloat16: this GPU cannot compute in bfloat16, leave the word out for float16.'
        )
    for name in ('loss_scale', 'dtype'):  # of a config that trains in float16
        cfg.optim_wrapper.pop(name, None)
    cfg.optim_wrapper.type = 'BFloat16OptimWrapper'
    import_package(cfg)
