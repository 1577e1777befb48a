"""Ways to compute attention inside the groups of a map, and the one table that chooses.

======= =============== ====================================================================
path    where           what
======= =============== ====================================================================
native  CPU             :mod:`.native`: one compiled kernel that leaves tokens where they are;
                        memory linear in the image's area
fused   CUDA, Triton    :mod:`.fused`: the same in Triton
plain   anywhere        :mod:`.plain`: the definition, in PyTorch; stores all weights in training
======= =============== ====================================================================

All take a map and give a map, and have the same values and gradients. Each module says in
``why_not`` what it cannot do. A new one gets a line in ``PATHS``, and ``tests/test_kernels.py``
holds it to the definition.

Next to fused attention, the dynamic position bias is computed by :mod:`.bias`. Linear layers in
float32 on the CPU are those of :mod:`.onednn`, MLPs of :mod:`.mlp`.
"""

from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor

from ..grouping import AxisRule
from . import fused, native, plain
from .call import Call, watcher

__all__ = ['PATHS', 'Call', 'choose_path', 'map_attention', 'watcher']


class Path(NamedTuple):
    """A way to compute attention.

    Args:
        attend (Callable): as :func:`map_attention` without ``path``.
        why_not (Callable[[Call], str]): a clause about what is in the way, or nothing.
        is_trusted (Callable[[torch.device], bool]): asked before it is chosen, not where it is
            asked for by name.
    """

    attend: Callable
    why_not: Callable[[Call], str] = lambda call: ''
    is_trusted: Callable[[torch.device], bool] = lambda device: True


PATHS = {  # the best first
    'native': Path(native.attend, native.why_not),
    'fused': Path(fused.attend, fused.why_not, fused.agrees_with_plain),
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
            if not kernel.why_not(call) and kernel.is_trusted(call.device)
        )
    reason = PATHS[path].why_not(call) if path in PATHS else 'there is no such path'
    if reason:
        raise ValueError(
            f"CrossFormer: attention_path={path!r} cannot work here: {reason}. Leave "
            "attention_path out, or choose 'plain'."
        )
    return path


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
        ValueError: there is no such path, or it cannot serve the call.
    """
    path = choose_path(Call.of(qkv, rows, columns, num_heads, dropout), path)
    return PATHS[path].attend(qkv, table, rows, columns, num_heads, scale, dropout)
