"""The same function with the image's size left open, for exporters.

The groups of a map depend on its sides, down to how many kinds of ragged groups there are, so an
exporter that writes down what one image does would write down groups for that one size. Here a
grouping is arithmetic on sizes that an exported graph repeats for every image: each axis is one
rectangular table of positions, filled up at its ragged end with positions that attention masks.
That is more work than :mod:`.grouping` and :mod:`.kernels` do, and the same result.

    model = exportable(backbone)                    # or a whole detector or segmentor
    program = export_any_size(model, channels=3)    # torch.export.ExportedProgram
    torch.onnx.export(program, f='backbone.onnx')
"""
import copy
from typing import Mapping, NamedTuple, Tuple, Type

import torch
from einops import rearrange
from torch import Tensor, nn

from .attention import GroupAttention
from .backbone import CrossFormerStage
from .compat import missing_torch
from .grouping import half_lead

if missing_torch('2.6'):
    raise ImportError(f'Export of a CrossFormer: {missing_torch("2.6")}.')

import torch.fx.experimental._config as symbolic_shapes  # noqa: E402
from torch.export import Dim, ExportedProgram  # noqa: E402


class PaddedAxis(NamedTuple):
    """The groups of one axis as one table; see :func:`crossformer_mm.grouping.group_axis`.

    Args:
        positions (Tensor): (groups, members), each of ``range(length)``.
        real (Tensor): (groups, members), False where a position is mere filling.
        group, member (Tensor): (length,) where in the table each position stands.
    """
    positions: Tensor
    real: Tensor
    group: Tensor
    member: Tensor


def padded_axis(length: int, size: Tensor, interval: Tensor, lead: Tensor, device) -> PaddedAxis:
    """Cut an axis into groups of ``size`` members that are ``interval`` apart (0-d tensors), the
    first tile of which begins ``lead`` positions before the axis."""
    # As grouping.fit_rule: a learnt table of biases is resized to what a group really has.
    interval = interval.clamp(max=length)
    size = torch.minimum(size, (length + interval - 1) // interval)
    tile = size * interval
    tiles = (length + lead + tile - 1) // tile
    # item() makes a size of its own, of which an exporter assumes nothing; one that it could
    # compute from the image's sides it would compare with 1, and remember the answer.
    groups, members = (tiles * interval).item(), size.item()
    group = torch.arange(groups, device=device)
    first = group // interval * tile + group % interval
    table = first[:, None] + torch.arange(members, device=device) * interval - lead
    position = torch.arange(length, device=device) + lead
    place = position % tile
    return PaddedAxis(table.clamp(0, length - 1), (table >= 0) & (table < length),
                      position // tile * interval + place % interval, place // interval)


class PaddedGrouping(NamedTuple):
    """Equally large groups of a map, some members of which may be filling.

    Args:
        order (Tensor): (groups, N) positions of the members, row-major in group and map.
        inverse (Tensor): (H*W,) where in the flat ``order`` each position stands.
        real (Tensor): (groups, 1, 1, N), False at filling.
        height, width (int): members of a group, N = height * width.
        offset (Tensor): (N, N) index of query - key in a flat table of biases.
    """
    order: Tensor
    inverse: Tensor
    real: Tensor
    height: int
    width: int
    offset: Tensor


def padded_grouping(rows: PaddedAxis, columns: PaddedAxis) -> PaddedGrouping:
    """The groups of a map, one for each pair of a row group and a column group."""
    (column_groups, width), height = columns.real.shape, rows.real.shape[1]
    map_width = columns.group.shape[0]

    def pairs(row: Tensor, column: Tensor, combine) -> Tensor:
        """All pairs of two tables: (a, b) and (c, d) to (a*c, b*d)."""
        return rearrange(combine(row[:, None, :, None], column[:, None]), 'a c b d -> (a c) (b d)')

    order = pairs(rows.positions, columns.positions, lambda r, c: r * map_width + c)
    real = pairs(rows.real, columns.real, torch.logical_and)
    group = rows.group[:, None] * column_groups + columns.group
    inverse = (group * height + rows.member[:, None]) * width + columns.member
    row, column = (torch.arange(side, device=order.device) for side in (height, width))
    offset = pairs(row[:, None] - row + height - 1, column[:, None] - column + width - 1,
                   lambda down, right: down * (2 * width - 1) + right)
    return PaddedGrouping(order, inverse.flatten(), real[:, None, None], height, width, offset)


def padded_groupings(height: int, width: int, group_size: int, interval: int, lda: str,
                     device) -> Tuple[PaddedGrouping, PaddedGrouping]:
    """Short and long distance; the rules of :mod:`crossformer_mm.grouping` without an ``if``."""
    sides = [torch.scalar_tensor(side, dtype=torch.int64) for side in (height, width)]
    shorter, longer = torch.minimum(*sides), torch.maximum(*sides)
    small = shorter <= group_size
    size = torch.where(small, longer if lda == 'block' else shorter, group_size)
    interval = torch.where(small, 1, interval)
    one, zero = torch.ones_like(interval), torch.zeros_like(interval)

    def grouping(sizes, interval, lead) -> PaddedGrouping:
        return padded_grouping(*(padded_axis(side, size, interval, lead, device)
                                 for side, size in zip((height, width), sizes)))

    near = grouping([size, size], one, zero)
    if lda == 'none':
        return near, near
    if lda == 'shifted':
        return near, grouping([size, size], one, torch.where(small, 0, half_lead(group_size)))
    far = [size, size]
    if lda == 'interval':
        far = [torch.where(small, size, (side + interval - 1) // interval) for side in sides]
    return near, grouping(far, interval, zero)


class AnySizeStage(CrossFormerStage):
    """Its blocks get a :class:`PaddedGrouping` in place of a Grouping."""

    def forward(self, x: Tensor) -> Tensor:
        near, far = padded_groupings(*x.shape[1:3], self.group_size, self.interval, self.lda,
                                     x.device)
        for index, block in enumerate(self.blocks):
            x = block(x, far if index % 2 else near)
        return x


class AnySizeAttention(GroupAttention):
    """Attention as the papers write it, with a mask; stores the weights of all groups."""

    def forward(self, x: Tensor, grouping: PaddedGrouping) -> Tensor:
        qkv = take(self.qkv(x.flatten(1, 2)), 1, grouping.order)
        q, k, v = rearrange(qkv, 'b g n (three h d) -> three b g h n d', three=3, h=self.num_heads)
        table = self.pos(grouping.height, grouping.width).flatten(1)
        logits = q * self.scale @ k.transpose(-1, -2) + take(table, 1, grouping.offset)
        # Not -inf: a group may be nothing but filling, and is thrown away, but not as NaN.
        logits = logits.masked_fill(~grouping.real, torch.finfo(logits.dtype).min)
        out = rearrange(logits.softmax(-1) @ v, 'b g h n d -> b (g n) (h d)')
        return self.proj(out.index_select(1, grouping.inverse)).view_as(x)


def take(x: Tensor, dim: int, table: Tensor) -> Tensor:
    """Replace a dimension by the two of a table of its indices."""
    return x.index_select(dim, table.flatten()).unflatten(dim, table.shape)


class AnySizePool(nn.AdaptiveAvgPool2d):
    """Average pooling to a given size as two products with matrices; of pyramid pooling heads."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = nn.modules.utils._pair(self.output_size)
        rows, columns = (self.weights(out, side, x)
                         for out, side in zip((height, width), x.shape[-2:]))
        maps = x.flatten(0, 1)
        # Not @, which asks each side whether it is 1 and makes the answer hold for ever.
        rows, columns = (weights.expand(maps.shape[0], -1, -1) for weights in (rows, columns.T))
        return rows.bmm(maps).bmm(columns).unflatten(0, x.shape[:2])

    @staticmethod
    def weights(out: int, side: int, like: Tensor) -> Tensor:
        """(out, side): row i averages positions from floor(i*side/out) to ceil((i+1)*side/out)."""
        cell = torch.arange(out, device=like.device)[:, None]
        position = torch.arange(side, device=like.device)
        start, end = cell * side, (cell + 1) * side  # both times out
        inside = ((position + 1) * out > start) & (position * out < end)
        inside = inside.to(like.dtype)
        return inside / inside.sum(1, keepdim=True)


ANY_SIZE = {GroupAttention: AnySizeAttention, CrossFormerStage: AnySizeStage,
            nn.AdaptiveAvgPool2d: AnySizePool}


def exportable(model: nn.Module, more: Mapping[Type, Type] = {}) -> nn.Module:
    """A copy in evaluation mode that computes the same in a way that keeps sizes symbolic.

    Args:
        model (nn.Module): a CrossFormer, or a model around one.
        more (Mapping[type, type]): classes of modules in the model whose forward fixes sizes, and
            what takes the place of each: a subclass with another forward.
    """
    classes = {**ANY_SIZE, **more}
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    return model


def export_any_size(model: nn.Module, channels: int = 3) -> ExportedProgram:
    """``torch.export`` of a module that takes one batch of images, of any batch and sides."""
    image = torch.randn(2, channels, 170, 203)
    # Or the program would refuse images of few pixels: those with a side that is 1 in some stage.
    with symbolic_shapes.patch(backed_size_oblivious=True), torch.no_grad():
        return torch.export.export(
            model, (image,), dynamic_shapes=({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},))
