"""The dynamic position bias in one kernel, where attention is fused.

:class:`~crossformer_mm.position_bias.DynamicPositionBias` is the definition: 13 operators on few
numbers, whose time is that of launching 13 kernels. In eager mode on a GPU the
kernels of :mod:`.bias_triton` compute the same in one launch, and the gradients in two. They are
compared with the definition on the user's GPU before they are used.
"""

import functools
import importlib
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..compat import TRITON, missing_torch
from ..exact import is_exact, submodules
from ..position_bias import DynamicPositionBias
from . import fused
from .self_test import describe_errors, passes, run, scattered

LAYER = (nn.Sequential, nn.LayerNorm, nn.ReLU, nn.Linear)
TYPES = (DynamicPositionBias, nn.Linear, *LAYER, *LAYER, *LAYER)  # of a bias and its parts
SELECTED_ON = 'cuda'  # type of the devices on which the kernels are selected automatically
WIDTH, HEADS = 64, 32  # at most: wider networks do not fit in the registers of a program


class Kind(NamedTuple):
    """Key of the biases that share compiled kernels."""

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
        ours = [triton_kernels().forward(6, 9, *options)]
        ours += triton_kernels().backward(grad.to(self.device, self.dtype), *options)
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
        path (str, optional): path of :func:`.map_attention`. ``fused``: the kernels are used
            without a self-test.
    """
    if path == 'fused' or path is None and device.type == SELECTED_ON:
        kind = find_kind(pos, device)
        if kind is not None:
            return FusedBias.apply(pos, (height, width), kind, path is None, *parameters_of(pos))
    return pos(height, width, device)


def find_kind(pos: nn.Module, device: torch.device) -> Optional[Kind]:
    """Return the kind of a bias that the kernels can compute instead of its modules, or None."""
    if not is_exact(submodules(pos), TYPES, device):
        return None
    if missing_torch(TRITON) or fused.why_no_triton(device):
        return None
    parameters, eps = parameters_of(pos), pos.pos1[0].eps
    heads, width = pos.pos3[2].weight.shape
    suits = (
        width <= WIDTH
        and heads <= HEADS
        and pos.pos2[0].eps == pos.pos3[0].eps == eps
        and [parameter.shape for parameter in parameters] == shapes_of(width, heads)
        and all([parameter.is_contiguous() for parameter in parameters])
    )
    return Kind(device, width, heads, pos.residual, eps) if suits else None


def parameters_of(pos: nn.Module) -> List[nn.Parameter]:
    """List ``pos.parameters()`` of modules that are exact, in a fraction of the time."""
    return [
        parameter
        for module in submodules(pos)
        for parameter in vars(module)['_parameters'].values()
        if parameter is not None
    ]


@functools.cache
def shapes_of(width: int, heads: int) -> List[Tuple[int, ...]]:
    """Return the shapes of the parameters of a bias, in their order."""
    layer = [(width,), (width,), (width, width), (width,)]
    return [(width, 2), (width,), *layer, *layer, *layer[:2], (heads, width), (heads,)]


class FusedBias(torch.autograd.Function):
    """Implement :func:`position_table`. Differentiable once.

    Both passes save the same, by the kernels or by the modules, so that a block that is recomputed
    may change from one to the other.
    """

    @staticmethod
    def forward(ctx, pos, sides, kind: Kind, guarded: bool, *parameters: Tensor) -> Tensor:
        ctx.arguments = pos, sides, kind, guarded
        ctx.save_for_backward(*parameters)

        def kernel():
            return triton_kernels().forward(*sides, parameters, kind.residual, kind.eps)

        return choose(kind, guarded, kernel, lambda: pos(*sides, kind.device))

    @staticmethod
    def backward(ctx, grad_table: Tensor):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                'CrossFormer: the kernel of the position bias is differentiable once. Build the '
                "model with attention_path='plain'."
            )
        pos, sides, kind, guarded = ctx.arguments
        parameters = ctx.saved_tensors

        def kernel():
            return triton_kernels().backward(grad_table, parameters, kind.residual, kind.eps)

        def modules():
            with torch.enable_grad():
                leaves = [parameter.detach().requires_grad_() for parameter in parameters]
                names = [name for name, _ in pos.named_parameters()]
                table = functional_call(pos, dict(zip(names, leaves)), (*sides, kind.device))
                return torch.autograd.grad(table, leaves, grad_table)

        return (None, None, None, None, *choose(kind, guarded, kernel, modules))


def choose(kind: Kind, guarded: bool, kernel: Callable, modules: Callable) -> Any:
    """Call the kernel; if ``guarded``, the modules where it has not passed its self-test."""
    if not guarded:
        return kernel()
    return run(kind, kernel, modules) if passes(kind, True) else modules()


def triton_kernels() -> Any:
    """:mod:`.bias_triton`, which is imported, and Triton with it, at the first call."""
    return importlib.import_module('.bias_triton', __package__)
