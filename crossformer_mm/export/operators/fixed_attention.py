"""Attention in the groups of a map of one size, with tokens ordered group by group."""

import hashlib
from typing import List, Sequence

import torch
from torch import Tensor

from ...position_bias import bias_of_pairs


@torch.library.custom_op('crossformer_mm::fixed_attention', mutates_args=())
def fixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    segments: Sequence[int],
    num_heads: int,
    scale: float,
) -> Tensor:
    """Compute attention of tokens that stand group by group.

    Args:
        q, k, v (Tensor): (tokens, C).
        table (Tensor): (heads, 2*R-1, 2*S-1), the bias of each offset in groups of R x S.
        segments: of each size of group, one after the other, how many groups there are, and of how
            many rows and columns.
        num_heads, scale: as of :func:`crossformer_mm.kernels.map_attention`.

    Returns:
        Tensor: (tokens, C).
    """
    start, outs = 0, []
    for groups, rows, columns in triples(segments):
        stop = start + groups * rows * columns
        queries, keys, values = (
            one[start:stop].view(groups, rows * columns, num_heads, -1).transpose(1, 2)
            for one in (q, k, v)
        )
        start = stop
        logits = queries * scale @ keys.transpose(-1, -2) + bias_of_pairs(table, rows, columns)
        outs.append((logits.softmax(-1) @ values).transpose(1, 2).flatten(0, 1).flatten(1))
    return torch.cat(outs)


@fixed_attention.register_fake
def _(q, k, v, table, segments, num_heads, scale):
    return torch.empty_like(q)


def triples(numbers: Sequence[int]) -> List[Sequence[int]]:
    return [numbers[at : at + 3] for at in range(0, len(numbers), 3)]


CHUNK = 96e6  # bytes of attention weights computed at a time


def fixed_attention_text(
    channels: int, table: Sequence[int], segments: Sequence[int], heads: int, scale: float
) -> str:
    """Write :func:`fixed_attention` as ONNX, with all sizes as constants."""
    constants: dict = {}
    lines: List[str] = []

    def ints(*values: int, kind: str = 'int64') -> str:
        """Return the name of a constant."""
        text = f'{kind}[{len(values)}] {{{", ".join(map(str, values))}}}'
        return constants.setdefault(text, f'constant{len(constants)}')

    def add(name: str, operator: str, *inputs: str, **attributes) -> str:
        given = ', '.join(f'{key} = {value}' for key, value in attributes.items())
        given = f'<{given}>' if given else ''
        lines.append(f'{name} = {operator} {given} ({", ".join(inputs)})')
        return name

    def offsets(size: int, most: int) -> str:
        """Return the rows or columns of the table for all pairs."""
        pairs = (most - 1 + query - key for query in range(size) for key in range(size))
        return ints(*pairs, kind='int32')

    factor = constants.setdefault(f'float[1] {{{scale!r}}}', 'factor')
    start, outs = 0, []
    for number, (groups, rows, columns) in enumerate(triples(segments)):
        members = rows * columns
        most_rows, most_columns = ((int(side) + 1) // 2 for side in table[1:])
        x = f'x{number}'
        add(f'{x}r', 'Gather', 'table', offsets(rows, most_rows), axis=1)
        add(f'{x}c', 'Gather', f'{x}r', offsets(columns, most_columns), axis=2)
        add(f'{x}p', 'Reshape', f'{x}c', ints(heads, rows, rows, columns, columns))
        add(f'{x}q', 'Transpose', f'{x}p', perm=[0, 1, 3, 2, 4])
        bias = add(f'{x}bias', 'Reshape', f'{x}q', ints(heads, members, members))
        chunks = max(1, round(groups * heads * members**2 * 4 / CHUNK))
        bounds = [groups * chunk // chunks for chunk in range(chunks + 1)]
        for begin, end in zip(bounds, bounds[1:]):
            count = end - begin
            if not count:
                continue
            y = f'{x}g{begin}'
            stop = start + count * members
            apart = ints(count, members, heads, channels // heads)
            for one in 'qkv':
                add(f'{y}{one}0', 'Slice', one, ints(start), ints(stop), ints(0))
                add(f'{y}{one}1', 'Reshape', f'{y}{one}0', apart)
            start = stop
            add(f'{y}q2', 'Transpose', f'{y}q1', perm=[0, 2, 1, 3])
            add(f'{y}k2', 'Transpose', f'{y}k1', perm=[0, 2, 3, 1])
            add(f'{y}v2', 'Transpose', f'{y}v1', perm=[0, 2, 1, 3])
            add(f'{y}q3', 'Mul', f'{y}q2', factor)
            add(f'{y}products', 'MatMul', f'{y}q3', f'{y}k2')
            add(f'{y}logits', 'Add', f'{y}products', bias)
            add(f'{y}weights', 'Softmax', f'{y}logits', axis=-1)
            add(f'{y}mixed', 'MatMul', f'{y}weights', f'{y}v2')
            add(f'{y}turned', 'Transpose', f'{y}mixed', perm=[0, 2, 1, 3])
            outs.append(add(f'{y}out', 'Reshape', f'{y}turned', ints(-1, channels)))
    add('out', 'Concat', *outs, axis=0)
    known = [f'{name} = Constant <value = {text}> ()' for text, name in constants.items()]
    body = '\n'.join(known + lines)
    name = f'FixedAttention_{hashlib.sha256(body.encode()).hexdigest()[:12]}'
    return f'{name} (q, k, v, table) => (out) {{\n{body}\n}}'


def to_onnx(call, q, k, v, table, segments, num_heads, scale):
    text = fixed_attention_text(q.shape[1], list(table.shape), segments, num_heads, scale)
    return call(text, [q, k, v, table])
