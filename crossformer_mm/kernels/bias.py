"""The dynamic position bias in one kernel, where attention is fused.

:class:`~crossformer_mm.position_bias.DynamicPositionBias` is the definition: 13 operators on few
numbers, whose time is that of launching 13 kernels. In eager mode on a GPU the
kernels of :mod:`.bias_triton` compute the same in one launch, and the gradients in two. They are
compared with the definition on the user's GPU before they are used.
"""

import importlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..compat import missing_torch
from ..exact import is_exact
from ..position_bias import DynamicPositionBias
from . import fused
from .self_test import say, scattered

LAYER = (nn.Sequential, nn.LayerNorm, nn.ReLU, nn.Linear)
TYPES = (DynamicPositionBias, nn.Linear, *LAYER, *LAYER, *LAYER)  # of a bias and its parts
WIDTH, HEADS = 64, 32  # at most: wider networks do not fit in the registers of a program


class Kind(NamedTuple):
    """Key of the biases that share compiled kernels."""

    device: torch.device
    width: int
    heads: int
    residual: bool
    eps: float


TRUSTED: Dict[Kind, bool] = {}  # of this process: whether the kernels of a kind work
LOCK = threading.Lock()


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
    kind = find_kind(pos, device, path)
    if kind is None:
        return pos(height, width, device)
    return FusedBias.apply(pos, (height, width), kind, path is None, *pos.parameters())


def find_kind(pos: nn.Module, device: torch.device, path: Optional[str]) -> Optional[Kind]:
    """Return the kind of a bias that the kernels can compute instead of its modules, or None."""
    if path not in (None, 'fused') or path is None and device.type != 'cuda':
        return None
    if not is_exact(pos.modules(), TYPES, device):
        return None
    if missing_torch('2.4') or fused.why_no_triton(device):
        return None
    (heads, width), eps = pos.pos3[2].weight.shape, pos.pos1[0].eps
    suits = (
        width <= WIDTH
        and heads <= HEADS
        and pos.pos2[0].eps == pos.pos3[0].eps == eps
        and [parameter.shape for parameter in pos.parameters()] == shapes_of(width, heads)
        and all(parameter.is_contiguous() for parameter in pos.parameters())
    )
    return Kind(device, width, heads, pos.residual, eps) if suits else None


def shapes_of(width: int, heads: int) -> list:
    """Return the shapes of the parameters of a bias, in their order."""
    return [
        (width, 2),
        (width,),
        *((width,), (width,), (width, width), (width,)) * 2,
        *((width,), (width,), (heads, width), (heads,)),
    ]


class FusedBias(torch.autograd.Function):
    """Implement :func:`position_table`. Differentiable once.

    Both passes save the same, by the kernels or by the modules, so that a block that is recomputed
    may change from one to the other.
    """

    @staticmethod
    def forward(ctx, pos, sides, kind: Kind, guarded: bool, *parameters: Tensor) -> Tensor:
        ctx.arguments = pos, sides, kind, guarded
        ctx.save_for_backward(*parameters)

        def kernels():
            return triton_kernels().forward(parameters, *sides, kind.residual, kind.eps)

        return run(kernels, lambda: pos(*sides, kind.device), kind, guarded)

    @staticmethod
    def backward(ctx, grad_table: Tensor):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                'CrossFormer: the kernel of the position bias is differentiable once. Build the '
                "model with attention_path='plain'."
            )
        pos, sides, kind, guarded = ctx.arguments
        parameters = ctx.saved_tensors

        def kernels():
            return triton_kernels().backward(grad_table, parameters, kind.residual, kind.eps)

        def modules():
            with torch.enable_grad():
                leaves = [parameter.detach().requires_grad_() for parameter in parameters]
                names = [name for name, _ in pos.named_parameters()]
                table = functional_call(pos, dict(zip(names, leaves)), (*sides, kind.device))
                return torch.autograd.grad(table, leaves, grad_table)

        return (None, None, None, None, *run(kernels, modules, kind, guarded))


def run(kernels: Callable, modules: Callable, kind: Kind, guarded: bool) -> Any:
    """Call the kernels; if ``guarded``, the modules where the kernels fail now or have failed."""
    if guarded and not is_trusted(kind):
        return modules()
    try:
        return kernels()
    except (torch.cuda.OutOfMemoryError, ValueError):  # of the size of the input
        raise
    except Exception as error:  # of a launch: resources, a driver
        if not guarded:
            raise
        distrust(kind, f'{type(error).__name__}: {error}')
    return modules()


def triton_kernels() -> Any:
    """:mod:`.bias_triton`, which is imported, and Triton with it, at the first call."""
    return importlib.import_module('.bias_triton', __package__)


def is_trusted(kind: Kind) -> bool:
    """Run the self-test of a kind's kernels once; a failure is a warning, in MMEngine's log too."""
    if kind not in TRUSTED:
        if kind.device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
            return False
        with LOCK:
            if kind not in TRUSTED:
                test(kind)
    return TRUSTED.get(kind, False)


def test(kind: Kind) -> None:
    """Put a kind into ``TRUSTED``, unless there is no memory now."""
    try:
        # Another thread has none of the caller's modes, hooks, transforms and autocast.
        with ThreadPoolExecutor(1) as thread:
            error = thread.submit(largest_error, kind).result()
        fault = '' if error < 1e-4 else f'it is wrong by {error:.2g} of the largest value'
    except torch.cuda.OutOfMemoryError:
        return
    except Exception as error:  # of a compiler, a driver, a launch
        fault = f'{type(error).__name__}: {error}'
    if fault:
        distrust(kind, fault)
    else:
        TRUSTED[kind] = True


def distrust(kind: Kind, fault: str) -> None:
    """Stop using the kernels of a kind, with a warning that says why."""
    TRUSTED[kind] = False
    say(
        f'the kernel of the position bias does not work on {kind.device}, '
        f"PyTorch's operators are used ({fault})"
    )


def largest_error(kind: Kind) -> float:
    """Return the largest error of a small case's table and gradients; NaN if any is NaN.

    Errors are relative to the largest values. The reference is in float64 on the CPU, where a
    backward pass does not wait for one on the GPU.
    """
    with torch.device('meta'):  # draws no random numbers: the user's sequence stays the same
        pos = DynamicPositionBias(16 * kind.width, kind.heads, kind.residual).double()
    pos.to_empty(device='cpu')
    for norm in (pos.pos1[0], pos.pos2[0], pos.pos3[0]):
        norm.eps = kind.eps

    parameters = list(pos.parameters())
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            parameter.copy_(scattered(5000 * index, parameter.shape, 'cpu'))
    height, width = 6, 9
    table = pos(height, width)
    grad = scattered(777, table.shape, 'cpu')
    exact = [table.detach(), *torch.autograd.grad(table, parameters, grad)]
    copies = [one.detach().to(kind.device, torch.float32) for one in parameters]
    kernels = triton_kernels()
    ours = [kernels.forward(copies, height, width, kind.residual, kind.eps)]
    ours += kernels.backward(grad.to(kind.device, torch.float32), copies, kind.residual, kind.eps)
    errors = [(a.cpu() - b).abs().max() / b.abs().max() for a, b in zip(ours, exact)]
    return float(torch.stack(errors).max())
