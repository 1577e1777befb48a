"""Self-test of the fused attention, and the fallback to the plain path.

Kernels are compiled on the user's machine, by the versions it has, for its GPU. Before a kind of
kernels is first used, a small case of it is compared with the plain path, on that GPU; a kernel
that fails later is replaced at once, in the middle of a training step. This is for automatic
selection: ``attention_path='fused'`` runs the kernels untested and lets their errors through.

Three operators compute the same and keep the same tensors for the backward pass, so that a block
which is recomputed there may change from one to another: :data:`.fused.attend`, :data:`guarded`
and :data:`substitute`.
"""

import functools
import logging
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Dict, NamedTuple, Sequence, Set, Tuple, Union

import torch
from torch import Tensor

from ..grouping import AxisRule
from ..openmmlab import print_log
from . import fused, plain
from .call import SMALL, Call, largest_group
from .operator import map_operator

# Largest errors, relative to the largest exact value. TF32 may multiply float32.
LIMITS = {torch.float32: 5e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
TRIES = 3  # of a self-test that runs out of memory


class Kind(NamedTuple):
    """Key of the calls that share compiled kernels."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    small: bool  # groups of at most SMALL members


# Of this process: which kernels work. The values that a model computes do not depend on it.
PASSED: Set[Tuple[Kind, bool]] = set()  # with and without the backward pass
BROKEN: Dict[Kind, str] = {}  # and why
FAILURES: Dict[Kind, int] = {}  # out of memory
LOCK = threading.Lock()


def is_trusted(call: Call) -> bool:
    """Test the kernels of a call, or return the cached result.

    A failure is a warning, also in MMEngine's log.
    """
    # A compiler keeps sides symbolic: its graph is for groups of both sizes.
    small = (True, False) if call.members is None else (call.members <= SMALL,)
    return all([passes(call.device, call.dtype, call.head_dim, s, call.trains) for s in small])


def passes(
    device: torch.device, dtype: torch.dtype, head_dim: int, small: bool, trains: bool
) -> bool:
    """Check that the kernels of one kind agree with plain, in both passes if it ``trains``."""
    kind = Kind(device, dtype, head_dim, small)
    if (kind, trains) not in PASSED and kind not in BROKEN:
        if device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
            say(
                f'the fused attention cannot be tested on {device} while a CUDA graph is captured; '
                'the graph gets the plain one. Run the model once before'
            )
            return False
        with LOCK:
            test(kind, trains)
    return (kind, trains) in PASSED and kind not in BROKEN


# Makes torch.compile call it instead of tracing it. `torch.compiler.assume_constant_result` sets
# the same attribute, but importing the compiler takes a second.
vars(passes)['_dynamo_marked_constant'] = True


def test(kind: Kind, trains: bool) -> None:
    """Put a kind into ``PASSED`` or ``BROKEN``; into neither if a failure may be temporary."""
    if (kind, trains) in PASSED or kind in BROKEN:  # by another thread
        return
    try:
        # Another thread has none of the caller's modes, hooks, transforms and autocast.
        with ThreadPoolExecutor(1) as thread:
            fault = thread.submit(find_fault, kind, trains).result()
    except (torch.cuda.OutOfMemoryError, OSError) as error:  # no memory, a full disk
        FAILURES[kind] = FAILURES.get(kind, 0) + 1
        fault = f'{type(error).__name__}: {error}'
        if FAILURES[kind] < TRIES:
            say(
                f'the fused attention could not be tested on {kind.device} ({fault}), the plain '
                'one is used until it can'
            )
            return
    except Exception as error:  # of a compiler, a driver, a launch
        fault = f'{type(error).__name__}: {error}'
    if fault:
        distrust(kind, fault)
    else:
        PASSED.update({(kind, False), (kind, trains)})


def find_fault(kind: Kind, trains: bool) -> str:
    """Compare a small case of the kernels with the plain path in float64.

    Autograd is not used: in a block that is recomputed during a backward pass on a GPU, another
    backward pass would wait for that one, and that one for this test.

    Returns:
        str: what differs, or ''.
    """
    heads, sides = 2, (17, 15)
    rules = (AxisRule(7, 1), AxisRule(6, 1)) if kind.small else (AxisRule(9, 2), AxisRule(8, 2))

    channels = heads * kind.head_dim
    qkv = scattered(0, (1, *sides, 3 * channels), kind.device).to(kind.dtype)
    table_shape = heads, *(2 * rule.size - 1 for rule in rules)
    table = scattered(1000, table_shape, kind.device).float()
    arguments = *rules, heads, kind.head_dim**-0.5
    out, norms = fused.forward(qkv, table, *arguments)
    ours, exact = [out], [plain.attend(qkv.double(), table.double(), *arguments)]
    if trains:
        grad = scattered(5000, (1, *sides, channels), kind.device).to(kind.dtype)
        ours += fused.backward(grad, qkv, table, out, norms, *arguments)
        exact += plain.gradients(grad.double(), qkv.double(), table.double(), *arguments)
    errors = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(ours, exact)]
    if all(error < LIMITS[kind.dtype] for error in errors):  # NaN is not
        return ''
    names = ('output', 'gradient of qkv', 'gradient of the bias')
    return 'wrong by ' + ', '.join(f'{e:.2g} of the {name}' for name, e in zip(names, errors))


def scattered(start: int, shape: Sequence[int], device: Union[str, torch.device]) -> Tensor:
    """Return fixed float64 numbers in [-1, 1]; random ones would change the user's sequence."""
    count = torch.arange(start, start + torch.Size(shape).numel(), device=device)
    return ((count**2 * 7919 % 65521).double() / 32760 - 1).view(shape)


def distrust(kind: Kind, fault: str) -> None:
    """Stop using the kernels of a kind, with a warning that says why."""
    if kind not in BROKEN:
        BROKEN[kind] = fault
        size = f'at most {SMALL}' if kind.small else f'more than {SMALL}'
        say(
            f'the fused attention of groups of {size} positions does not work on {kind.device} in '
            f'{kind.dtype}, the plain one is used ({fault})'
        )


@functools.cache  # each message once
def say(message: str) -> None:
    """Warn, in MMEngine's log too."""
    print_log(f'CrossFormer: {message}.', 'current', logging.WARNING)
    warnings.warn(f'CrossFormer: {message}.')


def why_untrusted(call: Call) -> str:
    """Return the reason why :func:`is_trusted` is False."""
    faults = (fault for kind, fault in BROKEN.items() if kind[:3] == call[:3])
    return next(faults, 'it could not be tested yet')


def with_fallback(kernel: Callable, fallback: Callable, qkv_at: int) -> Callable:
    """Wrap one pass of the kernels to take the plain path where they fail or have failed.

    Args:
        kernel, fallback (Callable): take and return the same.
        qkv_at (int): position of ``qkv`` in the arguments; the last four are rows, columns, heads
            and scale.
    """

    def run(*args):
        qkv, (rows, columns, heads, _) = args[qkv_at], args[-4:]
        small = largest_group(qkv, rows, columns) <= SMALL
        kind = Kind(qkv.device, qkv.dtype, qkv.shape[-1] // 3 // heads, small)
        if kind not in BROKEN:
            try:
                return kernel(*args)
            except (torch.cuda.OutOfMemoryError, ValueError):  # of the size of the input
                raise
            except Exception as error:  # of a launch: resources, a driver
                distrust(kind, f'{type(error).__name__}: {error}')
        return fallback(*args)

    return run


def plain_forward(qkv, table, rows, columns, heads, scale) -> Tuple[Tensor, Tensor]:
    """Compute the output, and norms that :func:`plain_backward` does not read."""
    with torch.no_grad(), torch.autocast(qkv.device.type, enabled=False):
        out = plain.attend(qkv, table, rows, columns, heads, scale)
    return out, qkv.new_zeros(*qkv.shape[:3], heads, dtype=torch.float32)


def plain_backward(grad_out, qkv, table, out, norms, *arguments) -> Tuple[Tensor, Tensor]:
    """Compute the gradients of ``qkv`` and ``table`` from these only."""
    with torch.no_grad(), torch.autocast(qkv.device.type, enabled=False):
        return plain.gradients(grad_out, qkv, table, *arguments)


guarded: Callable[..., Tensor] = map_operator(
    'guarded_attention',
    with_fallback(lambda *args: fused.forward(*args), plain_forward, 0),
    with_fallback(lambda *args: fused.backward(*args), plain_backward, 1),
)
substitute: Callable[..., Tensor] = map_operator(
    'substitute_attention', plain_forward, plain_backward
)
