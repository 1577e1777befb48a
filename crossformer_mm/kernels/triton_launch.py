"""Tiles and launches of the Triton kernels of fused attention.

Imports triton.
"""

import functools
from typing import Dict, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import triton
from torch import Tensor

from ..grouping import AxisRule, count_groups, fit_rule
from .call import SMALL
from .triton_blocks import multiply

# With TRITON_INTERPRET=1 Triton runs kernels in Python, on the CPU.
INTERPRETED = not isinstance(multiply, triton.JITFunction)


class Tile(NamedTuple):
    """Queries and keys of a block, warps of a program, stages of its pipeline of loads."""

    queries: int
    keys: int
    warps: int
    stages: int


# For groups of more than SMALL members, by kernel and bytes of a number. Chosen by the
# instructions, registers and shared memory that `python benchmarks/compile_kernels.py` prints;
# not yet measured. `python benchmarks/gpu.py` times these and others and prints a table for here.
TILES = {
    ('forward', 2): Tile(64, 64, 4, 2),
    ('forward', 4): Tile(64, 64, 8, 1),
    ('backward_queries', 2): Tile(64, 64, 4, 1),
    ('backward_queries', 4): Tile(64, 32, 4, 1),
    ('backward_keys', 2): Tile(64, 64, 4, 2),
    ('backward_keys', 4): Tile(32, 64, 8, 1),
    ('backward_pairs', 2): Tile(128, 64, 8, 1),
    ('backward_pairs', 4): Tile(64, 64, 8, 1),
}
# The same for heads of more than WIDE channels, and groups of any size.
WIDE_TILES = {
    ('forward', 2): Tile(64, 64, 4, 2),
    ('forward', 4): Tile(64, 32, 8, 1),
    ('backward_queries', 2): Tile(64, 64, 4, 1),
    ('backward_queries', 4): Tile(32, 32, 8, 1),
    ('backward_keys', 2): Tile(32, 64, 4, 2),
    ('backward_keys', 4): Tile(32, 64, 8, 1),
    ('backward_pairs', 2): Tile(64, 32, 4, 1),
    ('backward_pairs', 4): Tile(32, 64, 8, 1),
}
WIDE = 32
# Warps and stages for those, where the block has that many members; smaller ones take fewer warps.
SMALL_TILES = {
    ('forward_groups', 2): (4, 2),
    ('forward_groups', 4): (8, 1),
    ('backward_groups', 2): (4, 1),
    ('backward_groups', 4): (8, 1),
}
# Older releases cannot pipeline the loads of a loop with a branch.
PIPELINES_BRANCHES = tuple(map(int, triton.__version__.split('.')[:2])) >= (3, 3)
MEMBERS_LIMIT = 2**20  # of a group, see split_number
PROGRAMS = 1024  # that should share the work where a program loops over groups
PAIR_BYTES = 2**26  # of gradients of pairs to hold at a time, if one block of queries allows
STRIP_BYTES = 2**26  # of strips to hold at a time, if one head allows


def choose_tile(kernel: str, members: int, dtype: torch.dtype, head_dim: int) -> Tile:
    """Return the tile of a kernel for groups of at most so many members."""
    if members <= SMALL and head_dim <= WIDE:
        side = block_size(members)
        warps, stages = SMALL_TILES[kernel, dtype.itemsize]
        tile = Tile(side, side, max(1, warps * side // SMALL), stages)
    else:
        tile = (TILES if head_dim <= WIDE else WIDE_TILES)[kernel, dtype.itemsize]
    return tile if PIPELINES_BRANCHES else tile._replace(stages=1)


@functools.lru_cache
def block_size(number: int) -> int:
    """Return the least side of a block that holds so many and that tensor cores take."""
    return max(16, triton.next_power_of_2(number))


class Groups(NamedTuple):
    """The groups of a batch of maps, in the kernels' order of arguments.

    Rows and columns are those of the groups (:mod:`.triton_blocks`): ``height`` is the side of the
    map along a group's rows, ``row_stride`` the positions from one to the next.
    """

    groups: int
    height: int
    width: int
    row_stride: int
    column_stride: int
    row_groups: int
    column_groups: int
    row_size: int
    row_interval: int
    column_size: int
    column_interval: int

    @classmethod
    def of(cls, qkv: Tensor, rows: AxisRule, columns: AxisRule) -> 'Groups':
        batch, height, width, _ = qkv.shape
        return find_groups(batch, height, width, rows, columns)

    @property
    def members(self) -> int:
        """Members of the largest groups."""
        return self.row_size * self.column_size

    def is_small(self, head_dim: int) -> bool:
        """Check whether a group is one block; wide heads would not fit in a program's registers."""
        return self.members <= SMALL and head_dim <= WIDE

    def count_shares(self, programs: int) -> int:
        """Count the shares into which groups are divided, each share having so many programs."""
        return min(self.groups, -(-PROGRAMS // programs))

    def view(self, table: Tensor) -> Tuple[int, int, int, int]:
        """Return the strides of a table (heads, rows, columns) and its first needed offset.

        Raises:
            ValueError: the table is too small for the groups.
        """
        _, rows, columns = table.shape
        head_stride, row_stride, column_stride = table.stride()
        if self.column_stride > 1:
            rows, columns, row_stride, column_stride = columns, rows, column_stride, row_stride
        top, left = rows // 2 - (self.row_size - 1), columns // 2 - (self.column_size - 1)
        if top < 0 or left < 0:
            raise ValueError(
                f'a table of {table.shape[1]} x {table.shape[2]} offsets is too small for groups '
                f'of {self.members} members'
            )
        return head_stride, row_stride, column_stride, top * row_stride + left * column_stride


@functools.lru_cache(1024)
def find_groups(batch: int, height: int, width: int, rows: AxisRule, columns: AxisRule) -> Groups:
    """Build the :class:`Groups` of a batch of maps.

    Raises:
        ValueError: a group has too many members.
    """
    axes = [
        (length, stride, count_groups(length, rule), *rule[:2])
        for length, stride, rule in (
            (height, width, fit_rule(height, rows)),
            (width, 1, fit_rule(width, columns)),
        )
    ]
    if axes[0][3] < axes[1][3]:  # columns are the shorter side of a group
        axes.reverse()
    sides, strides, counts, *_ = zip(*axes)
    row_rule, column_rule = (axis[3:] for axis in axes)
    total = batch * counts[0] * counts[1]
    groups = Groups._make([total, *sides, *strides, *counts, *row_rule, *column_rule])
    if groups.members > MEMBERS_LIMIT:
        raise ValueError(
            'CrossFormer: fused attention takes groups of at most '
            f'{MEMBERS_LIMIT} positions, got {groups.members}: choose a larger '
            'interval.'
        )
    return groups


# Compiled kernels by all that Triton specialises them for, each with the constants that its launch
# takes. Triton's own look-up takes longer than many a kernel.
COMPILED: Dict[tuple, Optional[tuple]] = {}


def launch(
    kernel, programs: int, tensors: Sequence[Tensor], numbers: tuple, constants: tuple, tile: Tile
) -> None:
    """Run a kernel.

    Args:
        kernel: whose arguments are the following three, in this order.
        programs (int): how many.
        tensors (Sequence[Tensor]): on one device.
        numbers (tuple): a float and integers, all of the latter in the kernel's
            ``do_not_specialize``.
        constants (tuple): what is a ``constexpr``.
        tile (Tile): of which warps and stages are taken.
    """
    device = tensors[0].device.index
    if device is not None and device != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device
            return launch(kernel, programs, tensors, numbers, constants, tile)
    key: tuple = (kernel.__name__, device, constants, tile[2:])
    key += tuple([(tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors])
    fits = max(numbers) < 2**31  # Triton compiles another kernel for integers of 64 bits
    found = COMPILED.get(key) if fits else None
    if found:
        compiled, rest = found
        compiled[programs, 1, 1](*tensors, *numbers, *rest)
        return
    compiled = kernel[(programs,)](
        *tensors,
        *numbers,
        *constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    if fits and key not in COMPILED:
        COMPILED[key] = take_apart(compiled, len(tensors) + len(numbers), constants)


def take_apart(compiled, arguments: int, constants: tuple) -> Optional[tuple]:
    """Return a compiled kernel and the constants that its launch takes, or None.

    Since Triton 3.3 a launch takes all arguments; before, it took none of the constants. None: this
    Triton does it in yet another way, or its interpreter ran the kernel.
    """
    signature = getattr(getattr(compiled, 'src', None), 'signature', ())
    for rest in ((), constants):
        if len(signature) == arguments + len(rest) and hasattr(compiled, '__getitem__'):
            return compiled, rest
    return None


def plan(
    kernel: str, groups: Groups, dtype: torch.dtype, head_dim: int
) -> Tuple[Tuple[Union[int, str], ...], Tile]:
    """Return the constants of a kernel, D, BLOCK_D, sides of the tile, PRECISION, and its tile."""
    tile = choose_tile(kernel, groups.members, dtype, head_dim)
    sides = tile[:1] if groups.is_small(head_dim) else tile[:2]
    precision = choose_precision(dtype, head_dim)
    return (head_dim, block_size(head_dim), *sides, precision), tile


def choose_precision(dtype: torch.dtype, head_dim: int) -> str:
    """Return the precision of products: that of PyTorch for float32."""
    if INTERPRETED:
        return 'interpreter'
    # Blocks of wide heads in TF32 would take more shared memory than some GPUs have.
    if dtype != torch.float32 or head_dim > WIDE:
        return 'ieee'
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, 'fp32_precision'):  # since PyTorch 2.9; then allow_tf32 may raise
        return 'tf32' if matmul.fp32_precision == 'tf32' else 'ieee'
    return 'tf32' if matmul.allow_tf32 else 'ieee'
