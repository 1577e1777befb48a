"""The dynamic position bias in one kernel.

:class:`~crossformer_mm.position_bias.DynamicPositionBias` is the definition: 13 operators on few
numbers, whose time is that of calling them. In eager mode the kernels of :mod:`.bias_triton`, next
to the fused attention, and of :mod:`.bias_native`, next to the compiled one, compute the same in
one call, and the gradients in another. Those in Triton are compared with the definition on the
user's GPU before they are used.
"""

import functools
import importlib
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..compat import TRITON, missing_torch
from ..exact import interception, is_exact, submodules
from ..position_bias import DynamicPositionBias
from . import bias_native, fused, native
from .operator import is_intercepted
from .self_test import describe_errors, passes, run, scattered

LAYER = (nn.Sequential, nn.LayerNorm, nn.ReLU, nn.Linear)
TYPES = (DynamicPositionBias, nn.Linear, *LAYER, *LAYER, *LAYER)  # of a bias and its parts
SELECTED_ON = 'cuda'  # type of the devices on which Triton's are selected automatically
WIDTH, HEADS = 64, 32  # at most: wider networks do not fit in the registers of a program


class Kind(NamedTuple):
    """Key of the biases that share compiled kernels.

    Args:
        module (str): of the kernels, here.
    """

    module: str
    device: torch.device
    width: int
    heads: int
    residual: bool
    eps: float
    dtype: torch.dtype = torch.float32
    kernels: str = 'the kernel of the position bias'
    substitute: str = "PyTorch's operators are"

    def find_fault(self, trains: bool) -> str:
        """Compare both passes of a small case with the modules.

        These run in float64 on the CPU, where a backward pass does not wait for one on the GPU.
        """
        with torch.device('meta'):  # draws no random numbers: the user's sequence stays the same
            pos = DynamicPositionBias(16 * self.width, self.heads, self.residual).double()
        pos.to_empty(device='cpu')
        for norm in (pos.pos1[0], pos.pos2[0], pos.pos3[0]):
            norm.eps = self.eps
        names, parameters = zip(*pos.named_parameters())
        with torch.no_grad():
            for index, parameter in enumerate(parameters):
                parameter.copy_(scattered(5000 * index, parameter.shape, 'cpu'))
        table = pos(6, 9)
        grad = scattered(777, table.shape, 'cpu')
        exact = table.detach(), *torch.autograd.grad(table, parameters, grad)
        copies = [one.detach().to(self.device, self.dtype) for one in parameters]
        options = copies, self.residual, self.eps
        ours = [kernels_of(self).forward(6, 9, *options)]
        ours += kernels_of(self).backward(grad.to(self.device, self.dtype), *options)
        names = 'the table', *(f'the gradient of {name}' for name in names)
        return describe_errors(ours, exact, names, 1e-4)


def position_table(
    pos: nn.Module, height: int, width: int, device: torch.device, path: Optional[str] = None
) -> Tensor:
    """Compute ``pos(height, width, device)``, in one kernel where that is possible.

    Args:
        pos (nn.Module): a position bias of :mod:`crossformer_mm.position_bias`.
        height, width (int): members of a group.
        device (torch.device): of the map.
        path (str, optional): path of :func:`.map_attention`. ``fused``: Triton's kernels are used
            without a self-test.
    """
    kind, parameters = find_kind(pos, device, path)
    if kind is None:
        return pos(height, width, device)
    guarded = path is None and kind.module == 'bias_triton'
    arguments = pos, (height, width), kind, guarded, *parameters
    if torch.is_grad_enabled():
        return FusedBias.apply(*arguments)
    return compute(*arguments)


def find_kind(
    pos: nn.Module, device: torch.device, path: Optional[str] = None
) -> Tuple[Optional[Kind], List[nn.Parameter]]:
    """Return the kind of a bias that kernels can compute instead of its modules, or None.

    Args:
        pos, device, path: as of :func:`position_table`.

    Returns:
        tuple[Kind | None, list[nn.Parameter]]: with the parameters, if there is one.
    """
    if path == 'fused' or path is None and device.type == SELECTED_ON:
        module, missing = 'bias_triton', missing_torch(TRITON) or fused.why_no_triton(device)
    elif path in (None, 'native') and device.type == 'cpu':
        module, missing = 'bias_native', native.MISSING
    else:
        return None, []
    if missing or interception():  # before what the compiler of PyTorch 2.1 cannot follow
        return None, []
    modules: List[Any] = submodules(pos)
    if not is_exact(modules, TYPES, device):
        return None, []
    # ``pos.parameters()``, in a fraction of the time.
    parameters = [
        parameter
        for module in modules
        for parameter in vars(module)['_parameters'].values()
        if parameter is not None
    ]
    norms = [module for module in modules if type(module) is nn.LayerNorm]
    (heads, width), eps = modules[-1].weight.shape, norms[0].eps
    if (
        width <= WIDTH
        and heads <= HEADS
        and norms[1].eps == norms[2].eps == eps
        and [parameter.shape for parameter in parameters] == shapes_of(width, heads)
        and all([parameter.is_contiguous() for parameter in parameters])
    ):
        return Kind(module, device, width, heads, pos.residual, eps), parameters
    return None, []


@functools.cache
def shapes_of(width: int, heads: int) -> List[Tuple[int, ...]]:
    """Return the shapes of the parameters of a bias, in their order."""
    layer = [(width,), (width,), (width, width), (width,)]
    return [(width, 2), (width,), *layer, *layer, *layer[:2], (heads, width), (heads,)]


class FusedBias(torch.autograd.Function):
    """Implement :func:`position_table`.

    Both passes save the same, by the kernels or by the modules, so that a block that is recomputed
    may change from one to the other.
    """

    @staticmethod
    def forward(ctx, pos, sides, kind: Kind, guarded: bool, *parameters: Tensor) -> Tensor:
        ctx.arguments = pos, sides, kind, guarded
        ctx.save_for_backward(*parameters)
        return compute(pos, sides, kind, guarded, *parameters)

    @staticmethod
    def backward(ctx, grad_table: Tensor):
        pos, sides, kind, guarded = ctx.arguments
        parameters, needed = ctx.saved_tensors, ctx.needs_input_grad[4:]

        def kernel():
            return kernels_of(kind).backward(grad_table, parameters, kind.residual, kind.eps)

        def modules():
            return gradients(pos, sides, parameters, needed, grad_table)

        if torch.is_grad_enabled() or is_intercepted(grad_table):  # create_graph=True, a batch
            grads = modules()
        else:
            grads = choose(kind, guarded, kernel, modules)
        return (None, None, None, None, *grads)


def compute(pos: nn.Module, sides, kind: Kind, guarded: bool, *parameters: Tensor) -> Tensor:
    """Compute the table by the kernel, or by the modules where it does not work."""

    def kernel():
        return kernels_of(kind).forward(*sides, parameters, kind.residual, kind.eps)

    return choose(kind, guarded, kernel, lambda: pos(*sides, kind.device))


def gradients(
    pos: nn.Module, sides, parameters: Sequence[Tensor], needed: Sequence[bool], grad_table: Tensor
) -> List[Optional[Tensor]]:
    """Compute the gradients of the parameters that need one by the modules.

    They can be differentiated again, if gradients are enabled.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not create_graph:
            pairs = zip(parameters, needed)
            parameters = [parameter.detach().requires_grad_(need) for parameter, need in pairs]
        names = [name for name, _ in pos.named_parameters()]
        table = functional_call(pos, dict(zip(names, parameters)), (*sides, grad_table.device))
        leaves = [parameter for parameter, need in zip(parameters, needed) if need]
        grads = iter(torch.autograd.grad(table, leaves, grad_table, create_graph=create_graph))
    return [next(grads) if need else None for need in needed]


def choose(kind: Kind, guarded: bool, kernel: Callable, modules: Callable) -> Any:
    """Call the kernel; if ``guarded``, the modules where it has not passed its self-test."""
    if not guarded:
        return kernel()
    return run(kind, kernel, modules) if passes(kind, True) else modules()


def kernels_of(kind: Kind) -> Any:
    """Return the module of the kernels; Triton's, which imports Triton, is imported here."""
    if kind.module == 'bias_native':
        return bias_native
    return importlib.import_module('.bias_triton', __package__)
