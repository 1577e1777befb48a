"""The model's function with the image's size left open, for exporters.

The groups of a map depend on its sides, down to how many kinds of ragged groups there are, so an
exporter that writes down what one image does would write down groups for that one size. Here the
rule of an axis is arithmetic on sizes that an exported graph repeats for every image: one
rectangular table of positions, filled up at its ragged end with positions that attention masks.
That is more work than :mod:`crossformer_mm.grouping` and :mod:`crossformer_mm.kernels` do, and the
same result.
"""

import copy
from typing import Callable, Mapping, Sequence, Tuple, Type

import torch
import torch.fx.experimental._config as symbolic_shapes
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..attention import GroupAttention
from ..backbone import CrossFormerStage
from ..grouping import half_lead
from ..position_bias import DynamicPositionBias
from .operators.any_size_attention import any_size_attention, padded_attention
from .operators.offsets import offsets
from .padded_axis import PaddedAxis, fit_rule, padded_axis

PaddedRules = Tuple[PaddedAxis, PaddedAxis]  # of rows and columns


def padded_rules(
    height: int, width: int, group_size: int, interval: int, lda: str, device, cut: Callable
) -> Tuple[PaddedRules, PaddedRules]:
    """Repeat the rules of :mod:`crossformer_mm.grouping`, short and long, without an ``if``."""
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
    """Stage whose blocks get a :class:`PaddedAxis` instead of an AxisRule."""

    cut: Callable = staticmethod(padded_axis)

    def rules(self, x: Tensor) -> Tuple[PaddedRules, PaddedRules]:  # type: ignore[override]
        height, width = x.shape[1:3]
        rule = (self.group_size, self.interval, self.lda)
        return padded_rules(height, width, *rule, x.device, self.cut)


class AnySizeAttention(GroupAttention):
    """Attention by :func:`padded_attention`."""

    @staticmethod
    def attend(  # type: ignore[override]
        qkv: Tensor, table: Tensor, rows: PaddedAxis, columns: PaddedAxis, *settings
    ) -> Tensor:
        # Dropout does nothing in evaluation mode, and there is one path for exporters.
        return padded_attention(qkv, table, rows, columns, *settings[:2])


class OperatorStage(AnySizeStage):
    """Stage for ONNX: its blocks get the rules that operators take, as tensors."""

    @staticmethod
    def cut(length: int, *rule: Tensor, device) -> Tensor:
        return torch.stack([number.to(device) for number in rule])


class OperatorAttention(GroupAttention):
    """Attention for ONNX, by the operators of :mod:`.operators`."""

    def forward(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        qkv = self.qkv(x)
        if isinstance(self.pos, DynamicPositionBias):
            table = self.pos.mlp(offsets(qkv, rows, columns))
        else:
            sizes = (
                fit_rule(side, *rule.unbind()[:2])[0].item()
                for side, rule in zip(x.shape[1:3], (rows, columns))
            )
            table = self.pos(*sizes, x.device).flatten(1).t()
        out = any_size_attention(qkv, table, rows, columns, self.num_heads, float(self.scale))
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
    """Copy a model in eval mode, so that it computes the same and keeps sizes symbolic.

    Args:
        model (nn.Module): a CrossFormer, or a model around one.
        more (Mapping[type, type]): classes of modules in the model whose forward fixes sizes, and
            their replacements: subclasses with another forward.
        by_operators (bool): compute attention by the operators of :mod:`.operators`, for
            :func:`.onnx_file.to_onnx`, instead of PyTorch's own.
    """
    classes = {**ANY_SIZE, **more}
    if by_operators:
        classes.update({GroupAttention: OperatorAttention, CrossFormerStage: OperatorStage})
    model = copy.deepcopy(model)
    model.eval()  # which returns nothing in backbones of MMDetection
    exchange_classes(model, classes)
    return model


def exchange_classes(model: nn.Module, classes: Mapping[Type, Type]) -> None:
    """Give modules of some classes another forward: that of a subclass, by its class."""
    # Nothing public does: the subclass would have to be built, with arguments that modules do not
    # keep.
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))


def export_any_size(
    model: nn.Module, any_batch: bool = True, inputs: Sequence[Tensor] = ()
) -> ExportedProgram:
    """Export a module that takes images of any sides, by ``torch.export``.

    Args:
        model (nn.Module): of :func:`exportable`.
        any_batch (bool): take batches of any size; otherwise of one image.
        inputs (Sequence[Tensor]): example inputs: images, and the module's other inputs, whose
            shapes are fixed (default: random images of 3 channels).
    """
    image, *rest = inputs or [torch.randn(2 if any_batch else 1, 3, 170, 203)]
    open_sides = {axis: Dim.DYNAMIC for axis in ((0, 2, 3) if any_batch else (2, 3))}
    # Or the program would refuse images of few pixels: those with a side that is 1 in some stage.
    with symbolic_shapes.patch(backed_size_oblivious=True), torch.no_grad():
        return torch.export.export(
            model, (image, *rest), dynamic_shapes=(open_sides, *({} for _ in rest))
        )
