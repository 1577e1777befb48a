"""Inputs of attention, results compared with the definition, and what is observed on the way."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crossformer_mm.grouping import fit_rule
from crossformer_mm.kernels import map_attention

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


class Operations(TorchDispatchMode):
    """Notes the names of all operations, and the most elements that one returned."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                elements = x.untyped_storage().nbytes() // x.element_size()
                self.largest = max(self.largest, elements)
        return out


@contextmanager
def default_of_float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
