"""Kernels that compute attention inside the groups of a map, and the table that selects one.

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

All map a map to a map, with the same values and gradients. The ``why_not`` of each module gives
the reason why a call is unsupported. The fused path is selected only where its kernels pass
:mod:`.self_test`. A new path gets a line in ``PATHS``; ``tests/kernels/test_paths.py`` compares it
with the definition.

Next to fused attention, the dynamic position bias is computed by :mod:`.bias`. Linear layers on the
CPU may take :mod:`.onednn`, convolutions :mod:`.convolution`, MLPs :mod:`.mlp`.
"""

from typing import Callable, NamedTuple, Optional, Tuple

from torch import Tensor

from ..grouping import AxisRule
from . import fused, native, plain, self_test
from .call import Call

__all__ = ['PATHS', 'Call', 'choose_path', 'describe_path', 'map_attention']


class Path(NamedTuple):
    """A way to compute attention.

    Args:
        attend (Callable): as :func:`map_attention` without ``path``.
        why_not (Callable[[Call], str]): reason why a call is unsupported, or ''.
        device (str): type of the devices that it is for; '': of several types.
        select (Callable[[Call], Tuple[str, Callable]], optional): self-test, used in automatic
            selection only; returns the name of the path to take, and what to call as ``attend``.
    """

    attend: Callable
    why_not: Callable[[Call], str] = lambda call: ''
    device: str = ''
    select: Optional[Callable[[Call], Tuple[str, Callable]]] = None


PATHS = {  # the best first
    'native': Path(native.attend, native.why_not, 'cpu'),
    'fused': Path(fused.attend, fused.why_not, select=self_test.select),
    'plain': Path(plain.attend),
}


def select(call: Call, path: Optional[str] = None) -> Tuple[str, Callable]:
    """Return the name and the function of the path that a call takes.

    It is the forced path, or else the best one that supports the call.

    Args:
        call (Call): the call.
        path (str, optional): name of a path, to force it.

    Raises:
        ValueError: there is no such path, or it does not support the call; the message says why.
    """
    if path is None:
        best = next(name for name, kernel in PATHS.items() if not kernel.why_not(call))
        kernel = PATHS[best]
        return kernel.select(call) if kernel.select else (best, kernel.attend)
    reason = PATHS[path].why_not(call) if path in PATHS else 'there is no such path'
    if reason:
        raise ValueError(
            f"CrossFormer: attention_path={path!r} cannot work here: {reason}. Leave "
            "attention_path out, or choose 'plain'."
        )
    return path, PATHS[path].attend


def choose_path(call: Call, path: Optional[str] = None) -> str:
    """Return the name of the path of :func:`select`."""
    return select(call, path)[0]


def describe_path(call: Call, path: Optional[str] = None) -> str:
    """Describe the path of a call in a line for a log, with the reason if it is the plain one.

    Arguments and errors are those of :func:`select`.
    """
    chosen = choose_path(call, path)
    line = f"{chosen} on {call.device} ({str(call.dtype).partition('.')[2]})"
    if path or chosen != 'plain':
        return line
    best = next(name for name, one in PATHS.items() if one.device in ('', call.device.type))
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
    """Attention inside the groups of a batch of maps; each position keeps its place.

    :func:`.plain.attend` is the definition.

    Args:
        qkv (Tensor): (B, H, W, 3*heads*d), queries, keys and values of each position.
        table (Tensor): (heads, 2*h-1, 2*w-1), the bias of every offset, query - key, for
            groups of at least the members that the rules give, offset 0 in its middle.
        rows, columns (AxisRule): which positions form a group.
        num_heads (int): heads.
        scale (float): factor on ``q @ k``.
        dropout (float): dropout of the attention weights.
        path (str, optional): one of ``PATHS``, to force it. None: the fastest that supports the
            call.

    Returns:
        Tensor: (B, H, W, heads*d) in the type of ``qkv``.

    Raises:
        ValueError: there is no such path, or it does not support the call, or the bias is on
            another device than the map.
    """
    if table.device != qkv.device:  # PyTorch computes with meta tensors: uninitialised memory
        raise ValueError(
            f'CrossFormer: the position bias is on {table.device}, the map on {qkv.device}. '
            'Move or load all parameters of the model.'
        )
    _, attend = select(Call.of(qkv, rows, columns, num_heads, dropout), path)
    return attend(qkv, table, rows, columns, num_heads, scale, dropout)
