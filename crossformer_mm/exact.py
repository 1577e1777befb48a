"""Check that modules are unmodified, so that a shortcut may compute their result without them.

A shortcut bypasses modules: it takes their parameters and computes the same faster. What users
put there, such as a hook, another layer or a quantised weight, would be bypassed with them. Every
shortcut therefore calls :func:`is_exact`, and calls the modules where it returns False.
"""

import functools
from typing import Any, Callable, Iterable, List, Sequence

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .compat import is_compiling, is_exporting

# Results of interception().
CAPTURES = 'export', 'compile'
TRANSFORMS = 'torch.func', 'forward-mode AD'


def is_exact(modules: Iterable[nn.Module], types: Sequence[type], device: torch.device) -> bool:
    """Check that modules compute what their types do on float32 parameters, and nothing else.

    False if a module is of another type or given twice, has a hook (its own or a global one),
    another ``forward`` or a buffer, if a parameter is no plain ``nn.Parameter`` in float32 on the
    device, and inside graph capture, a transform of ``torch.func``, forward-mode AD, or a dispatch
    or function mode.

    The caller checks the options of the modules, such as ``eps``, ``p`` and ``bias=False``.

    Args:
        modules (Iterable[nn.Module]): the modules that a shortcut bypasses.
        types (Sequence[type]): the type of each, in the same order.
        device (torch.device): device of the shortcut's input.
    """
    if interception():
        return False
    modules = list(modules)
    return (
        [*map(type, modules)] == [*types]
        and len({*modules}) == len(modules)
        and all([is_unpatched(cls) for cls in {*types}])
        and all([is_unmodified(module, device) for module in modules])
    )


def submodules(module: nn.Module) -> List[nn.Module]:
    """List a module and all below it in the order of ``module.modules()``, with repetitions."""
    modules, seen, waiting = [], {None}, [module]
    while waiting:
        module = waiting.pop()
        modules.append(module)
        if module not in seen:
            seen.add(module)
            waiting += reversed(vars(module)['_modules'].values())
    return modules


def interception() -> str:
    """Name what follows or changes operators here, or ''.

    ``CAPTURES`` write a graph: an exported one runs where this package's operators may be missing,
    a compiled one in this process. Kernels of this package have no rule for ``TRANSFORMS``. The
    rest is 'modes', all that :func:`is_observed` finds.
    """
    if torch.jit.is_tracing() or is_exporting():
        return 'export'
    if is_compiling():
        return 'compile'
    if torch._C._are_functorch_transforms_active():
        return 'torch.func'
    if forward_ad._current_level >= 0:
        return 'forward-mode AD'
    return 'modes' if is_observed() else ''


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


def is_unpatched(cls: Any) -> bool:
    """Check that calling a module of a class runs the class's own ``forward``."""
    return (
        cls.__call__ is nn.Module._wrapped_call_impl
        and is_own_forward(cls, cls.forward)
        and not hasattr(cls, 'weight')  # a property, which would hide the parameter
        and not hasattr(cls, 'bias')
    )


@functools.cache  # of each function once
def is_own_forward(cls: type, forward: Callable) -> bool:
    """Check that the ``forward`` of its class is the one that the class was defined with."""
    return (
        forward.__module__ == cls.__module__
        and forward.__qualname__ == f'{cls.__qualname__}.forward'
        and not hasattr(forward, '__wrapped__')
    )


def is_unmodified(module: nn.Module, device: torch.device) -> bool:
    """Check that a module's own state is that of its class, with plain parameters on a device."""
    # Read from the dictionary: nn.Module's look-up of a parameter takes longer than all of this.
    state = vars(module)
    if (
        state['_forward_pre_hooks']
        or state['_forward_hooks']
        or state['_backward_pre_hooks']
        or state['_backward_hooks']
        or state['_buffers']
        or 'forward' in state
        # Pruning and functional calls replace parameters by tensors.
        or 'weight' in state
        or 'bias' in state
        or state.get('_compiled_call_impl')  # module.compile(), in PyTorch 2.2
    ):
        return False
    for parameter in state['_parameters'].values():
        if parameter is not None and (
            type(parameter) is not nn.Parameter
            or parameter.dtype != torch.float32
            or parameter.device != device
        ):
            return False
    return True
