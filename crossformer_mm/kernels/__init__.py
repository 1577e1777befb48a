"""Ways to compute attention inside the groups of a map, and the one table that chooses.

======= =============== ====================================================================
path    where           what
======= =============== ====================================================================
native  CPU             :mod:`.native`: one compiled kernel that leaves tokens where they are;
                        memory linear in the image's area
fused   CUDA, Triton    :mod:`.fused`: the same in Triton
plain   anywhere        :mod:`.plain`: the definition, in PyTorch; in training it stores all
                        weights on the CPU, and on CUDA it holds a matrix of all pairs of all
                        groups for a moment, the gradient of the bias
======= =============== ====================================================================

All take a map and give a map, and have the same values and gradients. Each module says in
``why_not`` what it cannot do. The fused path is chosen only where its kernels pass
:mod:`.self_test`. A new one gets a line in ``PATHS``, and ``tests/test_kernels.py``
holds it to the definition.

Next to fused attention, the dynamic position bias is computed by :mod:`.bias`. Linear layers on the
CPU may take :mod:`.onednn`, MLPs :mod:`.mlp`.
"""

from contextlib import nullcontext
from typing import Callable, NamedTuple, Optional

from torch import Tensor

from ..compat import math_attention
from ..grouping import AxisRule
from . import fused, native, plain, self_test
from .call import Call, watcher

__all__ = ['PATHS', 'Call', 'choose_path', 'describe_path', 'map_attention', 'watcher']


class Path(NamedTuple):
    """A way to compute attention.

    Args:
        attend (Callable): as :func:`map_attention` without ``path``.
        why_not (Callable[[Call], str]): a clause about what is in the way, or nothing.
        is_trusted (Callable[[Call], bool]): self-test, used in automatic selection only.
        guarded, substitute (Callable, optional): what takes the place of ``attend`` in automatic
            selection, where the path is trusted and where it is not.
    """

    attend: Callable
    why_not: Callable[[Call], str] = lambda call: ''
    is_trusted: Callable[[Call], bool] = lambda call: True
    guarded: Optional[Callable] = None
    substitute: Optional[Callable] = None


PATHS = {  # the best first
    'native': Path(native.attend, native.why_not),
    'fused': Path(
        fused.attend, fused.why_not, self_test.is_trusted, self_test.guarded, self_test.substitute
    ),
    'plain': Path(plain.attend),
}


def choose_path(call: Call, path: Optional[str] = None) -> str:
    """The path that is asked for, or else the best one that can serve a call.

    Args:
        call (Call): what is to be computed.
        path (str, optional): a path's name.

    Raises:
        ValueError: there is no such path, or it cannot serve the call; says why.
    """
    if path is None:
        return next(
            name
            for name, kernel in PATHS.items()
            if not kernel.why_not(call) and kernel.is_trusted(call)
        )
    reason = PATHS[path].why_not(call) if path in PATHS else 'there is no such path'
    if reason:
        raise ValueError(
            f"CrossFormer: attention_path={path!r} cannot work here: {reason}. Leave "
            "attention_path out, or choose 'plain'."
        )
    return path


def describe_path(call: Call, path: Optional[str] = None) -> str:
    """Which path a call takes and where, and why it is the plain one: a line for a log.

    Args, errors raised: as of :func:`choose_path`.
    """
    chosen = choose_path(call, path)
    line = f"{chosen} on {call.device} ({str(call.dtype).partition('.')[2]})"
    if path or chosen != 'plain':
        return line
    best = 'native' if call.device.type == 'cpu' else 'fused'
    return f'{line}, not {best}: {PATHS[best].why_not(call) or self_test.why_untrusted(call)}'


def map_attention(
    qkv: Tensor,
    table: Tensor,
    rows: AxisRule,
    columns: AxisRule,
    num_heads: int,
    scale: float,
    dropout: float = 0.0,
    path: Optional[str] = None,
) -> Tensor:
    """Attention inside the groups of a batch of maps, each position staying where it is.

    :func:`.plain.attend` says what is computed.

    Args:
        qkv (Tensor): (B, H, W, 3*heads*d), queries, keys and values of each position.
        table (Tensor): (heads, 2*h-1, 2*w-1), the bias of every offset, query - key, for
            groups of at least the members that the rules give, offset 0 in its middle.
        rows, columns (AxisRule): which positions form a group.
        num_heads (int): heads.
        scale (float): factor on ``q @ k``.
        dropout (float): dropout of the attention weights.
        path (str, optional): how to compute, one of ``PATHS``. None: the fastest that can serve.

    Returns:
        Tensor: (B, H, W, heads*d) in the type of ``qkv``.

    Raises:
        ValueError: there is no such path, or it cannot serve the call, or the bias is on another
            device than the map.
    """
    if table.device != qkv.device:  # PyTorch computes with meta tensors: uninitialised memory
        raise ValueError(
            f'CrossFormer: the position bias is on {table.device}, the map on {qkv.device}. '
            'Move or load all parameters of the model.'
        )
    call = Call.of(qkv, rows, columns, num_heads, dropout)
    if path is None:
        kernel = next(kernel for kernel in PATHS.values() if not kernel.why_not(call))
        attend = kernel.guarded if kernel.is_trusted(call) else kernel.substitute
    else:
        kernel, attend = PATHS[choose_path(call, path)], None
    # PyTorch's fused attention has no rule for a transform of the bias.
    with math_attention() if call.transform else nullcontext():
        return (attend or kernel.attend)(qkv, table, rows, columns, num_heads, scale, dropout)
