"""Self-test of Triton kernels, and the fallback to PyTorch's operators.

Kernels are compiled on the user's machine, by the versions it has, for its GPU. Before a kind of
kernels is first used, a small case of it is compared with its definition, on that GPU; a kernel
that fails later is replaced at once, in the middle of a training step. This is for automatic
selection: ``attention_path='fused'`` runs the kernels untested and lets their errors through.

Two sets of kernels are tested: those of :mod:`.fused` and of :mod:`.bias`.

Three operators compute the same attention and keep the same tensors for the backward pass, so that
a block which is recomputed there may change from one to another: :data:`.fused.attend`,
:data:`guarded` and :data:`substitute`.
"""

import functools
import logging
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Sequence, Set, Tuple, Union

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


# Key of the calls that share compiled kernels: hashable, with `device` and `dtype` of their inputs,
# `kernels` and `substitute`, the names of the kernels and of what takes their place, and the method
# `find_fault(trains)`. That one returns what differs between a small case and its definition, in
# both passes if it `trains`, or ''. It uses no autograd on the device: in a block that is
# recomputed during a backward pass on a GPU, another backward pass would wait for that one, and
# that one for the test.
Tested = Any


class Kind(NamedTuple):
    """Key of the attentions that share compiled kernels."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    small: bool  # groups of at most SMALL members

    @property
    def substitute(self) -> str:
        return 'the plain one is'

    @property
    def kernels(self) -> str:
        size = f'at most {SMALL}' if self.small else f'more than {SMALL}'
        return f'the fused attention of groups of {size} positions'

    def find_fault(self, trains: bool) -> str:
        heads, sides = 2, (17, 15)
        rules = (AxisRule(7, 1), AxisRule(6, 1)) if self.small else (AxisRule(9, 2), AxisRule(8, 2))

        channels = heads * self.head_dim
        qkv = scattered(0, (1, *sides, 3 * channels), self.device).to(self.dtype)
        table_shape = heads, *(2 * rule.size - 1 for rule in rules)
        table = scattered(1000, table_shape, self.device).float()
        arguments = *rules, heads, self.head_dim**-0.5
        out, norms = fused.forward(qkv, table, *arguments)
        ours, exact = [out], [plain.attend(qkv.double(), table.double(), *arguments)]
        if trains:
            grad = scattered(5000, (1, *sides, channels), self.device).to(self.dtype)
            ours += fused.backward(grad, qkv, table, out, norms, *arguments)
            exact += plain.gradients(grad.double(), qkv.double(), table.double(), *arguments)
        names = 'the output', 'the gradient of qkv', 'the gradient of the bias'
        return describe_errors(ours, exact, names, LIMITS[self.dtype])


# Of this process: which kernels work. The values that a model computes do not depend on it.
PASSED: Set[Tuple[Tested, bool]] = set()  # with and without the backward pass
BROKEN: Dict[Tested, str] = {}  # and why
FAILURES: Dict[Tested, List[str]] = {}  # of memory or a disk, which may be temporary
LOCK = threading.Lock()


def passes(kind: Tested, trains: bool) -> bool:
    """Test a kind of kernels, in both passes if it ``trains``, or return the cached result.

    A failure is a warning, also in MMEngine's log.
    """
    if (kind, trains) not in PASSED and kind not in BROKEN:
        if kind.device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
            say(
                f'{kind.kernels} cannot be tested on {kind.device} while a CUDA graph is captured; '
                f'{kind.substitute} captured. Run the model once before'
            )
            return False
        with LOCK:
            test(kind, trains)
    return (kind, trains) in PASSED and kind not in BROKEN


def test(kind: Tested, trains: bool) -> None:
    """Put a kind into ``PASSED`` or ``BROKEN``; into neither if a failure may be temporary."""
    if (kind, trains) in PASSED or kind in BROKEN:  # by another thread
        return
    try:
        # Another thread has none of the caller's modes, hooks, transforms and autocast.
        with ThreadPoolExecutor(1) as thread:
            fault = thread.submit(kind.find_fault, trains).result()
    except (torch.cuda.OutOfMemoryError, OSError) as error:  # no memory, a full disk
        fault = f'{type(error).__name__}: {error}'
        failures = FAILURES.setdefault(kind, [])
        failures.append(fault)
        if len(failures) < TRIES:
            say(
                f'{kind.kernels} could not be tested on {kind.device} ({fault}), '
                f'{kind.substitute} used until it can'
            )
            return
    except Exception as error:  # of a compiler, a driver, a launch
        fault = f'{type(error).__name__}: {error}'
    if fault:
        distrust(kind, fault)
    else:
        PASSED.update({(kind, False), (kind, trains)})


def describe_errors(
    ours: Iterable[Tensor], exact: Iterable[Tensor], names: Iterable[str], limit: float
) -> str:
    """Describe the errors above a limit, relative to the largest exact values; '' if none is."""
    errors = [float((a.to(b) - b).abs().max() / b.abs().max()) for a, b in zip(ours, exact)]
    wrong = [f'{error:.2g} of {name}' for error, name in zip(errors, names) if not error < limit]
    return 'wrong by ' + ', '.join(wrong) if wrong else ''  # NaN is not below a limit


def scattered(start: int, shape: Sequence[int], device: Union[str, torch.device]) -> Tensor:
    """Return fixed float64 numbers in [-1, 1]; random ones would change the user's sequence."""
    count = torch.arange(start, start + torch.Size(shape).numel(), device=device)
    return ((count**2 * 7919 % 65521).double() / 32760 - 1).view(shape)


def distrust(kind: Tested, fault: str) -> None:
    """Stop using the kernels of a kind, with a warning that says why."""
    if kind not in BROKEN:
        BROKEN[kind] = fault
        say(
            f'{kind.kernels} does not work on {kind.device} in {kind.dtype}, '
            f'{kind.substitute} used ({fault})'
        )


def run(kind: Tested, kernel: Callable, fallback: Callable) -> Any:
    """Call a kernel, or what takes its place where it fails or has failed."""
    if kind not in BROKEN:
        try:
            return kernel()
        except (torch.cuda.OutOfMemoryError, ValueError):  # of the size of the input
            raise
        except Exception as error:  # of a launch: resources, a driver
            distrust(kind, f'{type(error).__name__}: {error}')
    return fallback()


@functools.cache  # each message once
def say(message: str) -> None:
    """Warn, in MMEngine's log too."""
    print_log(f'CrossFormer: {message}.', 'current', logging.WARNING)
    warnings.warn(f'CrossFormer: {message}.')


def is_trusted(call: Call) -> bool:
    """Test the kernels of a call, or return the cached result."""
    # A compiler keeps sides symbolic: its graph is for groups of both sizes.
    small = (True, False) if call.members is None else (call.members <= SMALL,)
    return all([attends(call.device, call.dtype, call.head_dim, s, call.trains) for s in small])


def attends(
    device: torch.device, dtype: torch.dtype, head_dim: int, small: bool, trains: bool
) -> bool:
    """Return :func:`passes` of a kind of attention."""
    return passes(Kind(device, dtype, head_dim, small), trains)


# Makes torch.compile call it instead of tracing it. `torch.compiler.assume_constant_result` sets
# the same attribute, but importing the compiler takes a second.
vars(attends)['_dynamo_marked_constant'] = True


def why_untrusted(call: Call) -> str:
    """Return the reason why :func:`is_trusted` is False."""
    faults = {**{kind: faults[-1] for kind, faults in FAILURES.items()}, **BROKEN}
    found = (fault for kind, fault in faults.items() if kind[:3] == call[:3])
    return next(found, 'it could not be tested yet')


def with_fallback(kernel: Callable, fallback: Callable, qkv_at: int) -> Callable:
    """Wrap one pass of the kernels to take the plain path where they fail or have failed.

    Args:
        kernel, fallback (Callable): take and return the same.
        qkv_at (int): position of ``qkv`` in the arguments; the last four are rows, columns, heads
            and scale.
    """

    def run_pass(*args):
        qkv, (rows, columns, heads, _) = args[qkv_at], args[-4:]
        small = largest_group(qkv, rows, columns) <= SMALL
        kind = Kind(qkv.device, qkv.dtype, qkv.shape[-1] // 3 // heads, small)
        return run(kind, lambda: kernel(*args), lambda: fallback(*args))

    return run_pass


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


def select(call: Call) -> Tuple[str, Callable[..., Tensor]]:
    """Return the path of a call and its function: guarded kernels, or their substitute if not
    trusted."""
    return ('fused', guarded) if is_trusted(call) else ('plain', substitute)
