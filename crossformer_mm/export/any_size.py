"""The same function with the image's size left open, for exporters.

The groups of a map depend on its sides, down to how many kinds of ragged groups there are, so an
exporter that writes down what one image does would write down groups for that one size. Here the
rule of an axis is arithmetic on sizes that an exported graph repeats for every image: one
rectangular table of positions, filled up at its ragged end with positions that attention masks.
That is more work than :mod:`crossformer_mm.grouping` and :mod:`crossformer_mm.kernels` do, and the
same result.
"""

import copy
from typing import Callable, Mapping, NamedTuple, Optional, Sequence, Tuple, Type

import torch
import torch.fx.experimental._config as symbolic_shapes
from einops import rearrange
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..attention import GroupAttention
from ..backbone import CrossFormerStage
from ..grouping import half_lead
from ..position_bias import DynamicPositionBias
from . import operators


class PaddedAxis(NamedTuple):
    """The groups of one axis as one table, in place of an :class:`.grouping.AxisRule`.

    Args:
        positions (Tensor): (groups, members), each of ``range(length)``.
        real (Tensor): (groups, members), False where a position is mere filling.
        inverse (Tensor): (length,) where in the flat ``positions`` each position stands.
        offset (Tensor): (members * members,) query - key of each pair, counted from the smallest.
    """

    positions: Tensor
    real: Tensor
    inverse: Tensor
    offset: Tensor

    @property
    def size(self) -> int:
        """Members of a group."""
        return self.positions.shape[1]


def fit_rule(length: int, size: Tensor, interval: Tensor, lead=None) -> Tuple[Tensor, Tensor]:
    """As :func:`crossformer_mm.grouping.fit_rule`, size and interval, without an ``if``: a learnt
    table of biases is resized to what a group really has."""
    interval = interval.clamp(max=length)
    return torch.minimum(size, (length + interval - 1) // interval), interval


def padded_axis(length: int, size: Tensor, interval: Tensor, lead: Tensor, device) -> PaddedAxis:
    """Cut an axis into groups of ``size`` members that are ``interval`` apart (0-d tensors), the
    first tile of which begins ``lead`` positions before the axis."""
    size, interval = fit_rule(length, size, interval)
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
    inverse = (position // tile * interval + place % interval) * members + place // interval
    member = torch.arange(members, device=device)
    offset = (member[:, None] - member + members - 1).flatten()
    return PaddedAxis(table.clamp(0, length - 1), (table >= 0) & (table < length), inverse, offset)


PaddedRules = Tuple[PaddedAxis, PaddedAxis]  # of rows and columns


def padded_rules(
    height: int,
    width: int,
    group_size: int,
    interval: int,
    lda: str,
    device,
    cut: Callable = padded_axis,
) -> Tuple[PaddedRules, PaddedRules]:
    """Short and long distance; the rules of :mod:`crossformer_mm.grouping` without an ``if``."""
    sides = [torch.scalar_tensor(side, dtype=torch.int64) for side in (height, width)]
    shorter, longer = torch.minimum(*sides), torch.maximum(*sides)
    small = shorter <= group_size
    size = torch.where(small, longer if lda == 'block' else shorter, group_size)
    interval = torch.where(small, 1, interval)
    one, zero = torch.ones_like(interval), torch.zeros_like(interval)

    def rules(sizes, interval, lead) -> PaddedRules:
        return tuple(
            cut(side, size, interval, lead, device=device)
            for side, size in zip((height, width), sizes)
        )

    short = rules([size, size], one, zero)
    if lda == 'none':
        return short, short
    if lda == 'shifted':
        return short, rules([size, size], one, torch.where(small, 0, half_lead(group_size)))
    long = [size, size]
    if lda == 'interval':
        long = [torch.where(small, size, (side + interval - 1) // interval) for side in sides]
    return short, rules(long, interval, zero)


class AnySizeStage(CrossFormerStage):
    """Its blocks get a :class:`PaddedAxis` in place of an AxisRule."""

    cut: Callable = staticmethod(padded_axis)

    def rules(self, x: Tensor) -> Tuple[PaddedRules, PaddedRules]:  # type: ignore[override]
        height, width = x.shape[1:3]
        rule = (self.group_size, self.interval, self.lda)
        return padded_rules(height, width, *rule, x.device, self.cut)


def padded_attention(
    qkv: Tensor,
    table: Tensor,
    rows: PaddedAxis,
    columns: PaddedAxis,
    num_heads: int,
    scale: float,
    dropout: float = 0.0,
    path: Optional[str] = None,
) -> Tensor:
    """As the papers write it, with a mask; stores the weights of all groups.

    Args:
        rows, columns (PaddedAxis): the groups.
        dropout: not looked at; an exported model is in evaluation mode.
        path: not looked at; this is the only way to export.
        others: as of :func:`crossformer_mm.kernels.map_attention`.
    """
    height, width = rows.size, columns.size
    members = select(qkv, rows.positions.flatten(), columns.positions.flatten())
    q, k, v = rearrange(
        members,
        'b (gr r) (gc c) (three h d) -> three b (gr gc) h (r c) d',
        r=height,
        c=width,
        three=3,
        h=num_heads,
    )
    bias = rearrange(
        select(table, rows.offset, columns.offset),
        'h (rq rk) (cq ck) -> h (rq cq) (rk ck)',
        rq=height,
        cq=width,
    )
    real = rearrange(
        rows.real[:, None, :, None] & columns.real[:, None], 'gr gc r c -> (gr gc) 1 1 (r c)'
    )
    logits = q * scale @ k.transpose(-1, -2) + bias
    # Not -inf: a group may be nothing but filling, and is thrown away, but not as NaN.
    logits = logits.masked_fill(~real, torch.finfo(logits.dtype).min)
    out = rearrange(
        logits.softmax(-1) @ v,
        'b (gr gc) h (r c) d -> b (gr r) (gc c) (h d)',
        gc=columns.positions.shape[0],
        r=height,
    )
    return select(out, rows.inverse, columns.inverse)


def select(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Take and order the rows and columns, dimensions 1 and 2, of a map."""
    return x.index_select(1, rows).index_select(2, columns)


class AnySizeAttention(GroupAttention):
    """See :func:`padded_attention`."""

    attend = staticmethod(padded_attention)  # type: ignore[assignment]


# The same by operators of ours, for ONNX


class OperatorStage(AnySizeStage):
    """Its blocks get what :func:`.operators.offsets` takes."""

    @staticmethod
    def cut(length: int, *rule: Tensor, device) -> Tensor:
        return torch.stack([number.to(device) for number in rule])


class OperatorAttention(GroupAttention):
    """See :func:`.operators.map_attention`."""

    def forward(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        qkv = self.qkv(x)
        if isinstance(self.pos, DynamicPositionBias):
            table = self.pos.mlp(operators.offsets(qkv, rows, columns))
        else:
            sizes = (
                fit_rule(side, *rule.unbind())[0].item()
                for side, rule in zip(x.shape[1:3], (rows, columns))
            )
            table = self.pos(*sizes, x.device).flatten(1).t()
        out = operators.map_attention(qkv, table, rows, columns, self.num_heads, float(self.scale))
        return self.proj(out)


class AnySizePool(nn.AdaptiveAvgPool2d):
    """Average pooling to a given size as two products with matrices; of pyramid pooling heads."""

    def forward(self, x: Tensor) -> Tensor:
        sizes = zip(nn.modules.utils._pair(self.output_size), x.shape[-2:])
        rows, columns = (self.weights(out, side, x) for out, side in sizes)
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
        inside = (((position + 1) * out > start) & (position * out < end)).to(like.dtype)
        return inside / inside.sum(1, keepdim=True)


ANY_SIZE = {
    GroupAttention: AnySizeAttention,
    CrossFormerStage: AnySizeStage,
    nn.AdaptiveAvgPool2d: AnySizePool,
}


def exportable(
    model: nn.Module, more: Mapping[Type, Type] = {}, by_operators: bool = False
) -> nn.Module:
    """A copy in evaluation mode that computes the same in a way that keeps sizes symbolic.

    Args:
        model (nn.Module): a CrossFormer, or a model around one.
        more (Mapping[type, type]): classes of modules in the model whose forward fixes sizes, and
            what takes the place of each: a subclass with another forward.
        by_operators (bool): compute attention by those of :mod:`.operators`, for
            :func:`.onnx_file.to_onnx`, in place of PyTorch's own.
    """
    classes = {**ANY_SIZE, **more}
    if by_operators:
        classes.update({GroupAttention: OperatorAttention, CrossFormerStage: OperatorStage})
    model = copy.deepcopy(model)
    model.eval()  # which returns nothing in backbones of MMDetection
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    return model


def export_any_size(
    model: nn.Module, channels: int = 3, any_batch: bool = True, inputs: Sequence[Tensor] = ()
) -> ExportedProgram:
    """``torch.export`` of a module that takes images of any sides.

    Args:
        model (nn.Module): of :func:`exportable`.
        channels (int): of an image.
        any_batch (bool): take batches of any size; otherwise of one image.
        inputs (Sequence[Tensor]): what to trace with in place of normalised images: images, and
            what else the module takes, whose shapes are fixed.
    """
    image, *rest = inputs or [torch.randn(2 if any_batch else 1, channels, 170, 203)]
    open_sides = {axis: Dim.DYNAMIC for axis in ((0, 2, 3) if any_batch else (2, 3))}
    # Or the program would refuse images of few pixels: those with a side that is 1 in some stage.
    with symbolic_shapes.patch(backed_size_oblivious=True), torch.no_grad():
        return torch.export.export(
            model, (image, *rest), dynamic_shapes=(open_sides, *({} for _ in rest))
        )
