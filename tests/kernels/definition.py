"""Inputs of attention, and the definition once more, group by group and position by position."""

import numpy as np
import torch

from crossformer_mm.grouping import fit_rule, group_axis
from crossformer_mm.kernels import map_attention
from crossformer_mm.position_bias import bias_of_pairs

GPU = torch.device('cuda' if torch.cuda.is_available() else 'cpu')  # or Triton's interpreter


def random_inputs(
    shape, rows, columns, heads, dim, dtype=torch.float32, spare=0, device='cpu'
) -> tuple:
    """A map of queries, keys and values; biases for ``spare`` members more than there are."""
    batch, height, width = shape
    generator = torch.Generator().manual_seed(0)
    sides = [2 * (fit_rule(n, rule).size + spare) - 1 for n, rule in ((height, rows), (width, columns))]  # fmt: skip
    qkv = torch.randn(batch, height, width, 3 * heads * dim, generator=generator)
    table = torch.randn(heads, *sides, generator=generator)
    return qkv.to(device, dtype), table.to(device)


def values_and_gradients(path, qkv, table, *arguments, grad=None) -> tuple:
    """Output and the gradients of qkv and table, by default for a random gradient of the output."""
    qkv, table = qkv.detach().requires_grad_(), table.detach().requires_grad_()
    out = map_attention(qkv, table, *arguments, path=path)
    if grad is None:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return out.detach(), *torch.autograd.grad(out, (qkv, table), grad.to(out))


def by_groups(qkv, table, rows, columns, heads, scale) -> tuple:
    """Output and log-sum-exp of (B, H, W, 3*heads*d)."""
    batch, height, width, channels = qkv.shape
    outs, norms, order = [], [], []
    positions = torch.arange(height * width).view(height, width)
    for r in group_axis(height, fit_rule(height, rows)):
        for c in group_axis(width, fit_rule(width, columns)):
            for group_rows in r:
                for group_columns in c:
                    index = positions[group_rows][:, group_columns].flatten()
                    members = qkv.flatten(1, 2)[:, index].unflatten(2, (3, heads, -1))
                    q, k, v = members.permute(2, 0, 3, 1, 4)
                    bias = bias_of_pairs(table, len(group_rows), len(group_columns))
                    logits = scale * q @ k.transpose(2, 3) + bias
                    outs.append((logits.softmax(3) @ v).transpose(1, 2).flatten(2))
                    norms.append(logits.logsumexp(3).transpose(1, 2))
                    order.append(index)
    inverse = torch.cat(order).argsort()
    assert len(inverse) == height * width
    return tuple(torch.cat(x, 1)[:, inverse].unflatten(1, (height, width)) for x in (outs, norms))


def by_loops(qkv, table, rows, columns, heads, scale) -> torch.Tensor:
    """One query at a time, with nothing of the package."""
    batch, height, width, channels = qkv.shape
    q, k, v = np.split(qkv.numpy().reshape(batch, height, width, 3, heads, -1), 3, 3)
    out = np.zeros((batch, height, width, heads, q.shape[-1]))

    def group(position, rule):
        tile = (position + rule.lead) // (rule.size * rule.interval)
        return tile, (position + rule.lead) % rule.interval

    centre = table.shape[1] // 2, table.shape[2] // 2
    for r, c in np.ndindex(height, width):
        members = [
            (y, x)
            for y, x in np.ndindex(height, width)
            if group(y, rows) == group(r, rows) and group(x, columns) == group(c, columns)
        ]
        offsets = [
            (centre[0] + (r - y) // rows.interval, centre[1] + (c - x) // columns.interval)
            for y, x in members
        ]
        for image, head in np.ndindex(batch, heads):
            keys = np.array([k[image, y, x, 0, head] for y, x in members])
            values = np.array([v[image, y, x, 0, head] for y, x in members])
            bias = np.array([float(table[(head, *offset)]) for offset in offsets])
            logits = scale * keys @ q[image, r, c, 0, head] + bias
            weights = np.exp(logits - logits.max())
            out[image, r, c, head] = weights @ values / weights.sum()
    return torch.from_numpy(out.reshape(batch, height, width, -1))


def assert_equals_definition(path, inputs, *arguments, tolerance):
    """In value and gradients, up to rounding in the type; float64 is the judge."""
    ours = values_and_gradients(path, *inputs, *arguments)
    exact = values_and_gradients('plain', *(x.double() for x in inputs), *arguments)
    assert [x.dtype for x in ours] == [inputs[0].dtype] * 2 + [torch.float32]
    # A gradient of the table is a sum over all positions, in which rounding adds up.
    sums = inputs[0][0, ..., 0].numel() ** 0.5
    for one, other, least in zip(ours, exact, (1, 1, sums)):
        assert one.isfinite().all()
        assert (one - other).abs().max() <= tolerance * max(other.abs().max(), least)


def small_tiles(triton_launch) -> dict:
    """Blocks in which even small groups take several, the two ways differing."""
    return {
        key: triton_launch.Tile(*((32, 16) if 'keys' in key[0] else (16, 32)), 1, 1)
        for key in triton_launch.TILES
    }
