"""Check that modules are unmodified, so that a shortcut may compute their result without them.

A shortcut bypasses modules: it takes their parameters and computes the same faster. What users
put there, such as a hook, another layer or a quantised weight, would be bypassed with them. Every
shortcut therefore calls :func:`is_exact`, and calls the modules where it returns False.
"""

from typing import Iterable, Sequence

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .compat import is_compiling


def is_exact(modules: Iterable[nn.Module], types: Sequence[type], device: torch.device) -> bool:
    """Check that modules compute what their types do on float32 parameters, and nothing else.

    False if a module is of another type, has a hook (its own or a global one) or another
    ``forward``, if a parameter is no plain ``nn.Parameter`` in float32 on the device, and inside
    graph capture, a transform of ``torch.func``, forward-mode AD, or a dispatch or function mode.

    The caller checks the options of the modules, such as ``eps``, ``p`` and ``bias=False``.

    Args:
        modules (Iterable[nn.Module]): the modules that a shortcut bypasses.
        types (Sequence[type]): the type of each, in the same order.
        device (torch.device): device of the shortcut's input.
    """
    if torch.jit.is_tracing() or is_compiling() or active_transform() or is_observed():
        return False
    modules = list(modules)
    return [*map(type, modules)] == [*types] and all(
        is_unmodified(module) and has_plain_parameters(module, device) for module in modules
    )


def active_transform() -> str:
    """Name of the active transform, 'torch.func' or 'forward-mode AD', or ''.

    A kernel of this package has no rule for them.
    """
    if torch._C._are_functorch_transforms_active():
        return 'torch.func'
    return 'forward-mode AD' if forward_ad._current_level >= 0 else ''


def is_observed() -> bool:
    """Check for global hooks of modules and modes that see every operator or function."""
    return bool(
        hooks._global_forward_pre_hooks
        or hooks._global_forward_hooks
        or hooks._global_backward_pre_hooks
        or hooks._global_backward_hooks
        or torch._C._len_torch_dispatch_stack()
        # torch.set_default_device is one that changes no call of a layer.
        or any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
    )


def is_unmodified(module: nn.Module) -> bool:
    """Check that calling a module runs its class's own ``forward`` and nothing else."""
    cls = type(module)
    return not (
        'forward' in vars(module)
        or module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or vars(module).get('_compiled_call_impl')  # module.compile(), in PyTorch 2.2
        or cls.__call__ is not nn.Module._wrapped_call_impl
        # A forward that somebody else assigned to the class.
        or cls.forward.__module__ != cls.__module__
        or cls.forward.__qualname__ != f'{cls.__qualname__}.forward'
        or hasattr(cls.forward, '__wrapped__')
    )


def has_plain_parameters(module: nn.Module, device: torch.device) -> bool:
    """Check that a module's own parameters are plain, in float32 and on a device."""
    # By attribute, too: pruning and functional calls replace parameters by tensors.
    return all(
        parameter is None
        or type(parameter) is nn.Parameter
        and parameter.dtype == torch.float32
        and parameter.device == device
        for name in ('weight', 'bias', *module._parameters)
        for parameter in (getattr(module, name, None),)
    )
