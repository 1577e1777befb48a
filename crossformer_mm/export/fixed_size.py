"""The same function for images of one size: no masks and no arithmetic on sizes.

The groups are those of :mod:`crossformer_mm.grouping`, written down: one table of where each token
goes, one back, and the biases of all offsets computed once, from which a runtime makes those of
pairs when it loads the file.
"""

import copy
from typing import List, Mapping, NamedTuple, Sequence, Tuple, Type

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..attention import GroupAttention
from ..backbone import CrossFormerStage
from ..grouping import AxisRule, group_map
from . import operators


class FixedGroups(NamedTuple):
    """The groups of a map of one size.

    Args:
        order (Tensor): (H*W,) int32, the positions group by group.
        inverse (Tensor): (H*W,) int32, where in ``order`` each position stands.
        segments: of each size of group the number of groups, of rows and of columns.
        size: rows and columns of the largest.
    """

    order: Tensor
    inverse: Tensor
    segments: List[int]
    size: Tuple[int, int]


class FixedSizeStage(CrossFormerStage):
    """Its blocks get :class:`FixedGroups` in place of two AxisRules."""

    def fix(self, x: Tensor) -> None:
        """Write down the groups of a map (1, H, W, C), and the biases of its blocks."""
        height, width = x.shape[1:3]
        for name, rules in zip(('short', 'long'), CrossFormerStage.rules(self, x)):
            tables = group_map(height, width, *rules)
            order = torch.cat([table.flatten() for table in tables])
            self.register_buffer(f'{name}_order', order.int())
            self.register_buffer(f'{name}_inverse', order.argsort().int())
            segments = [number for table in tables for number in table.shape]
            setattr(self, f'{name}_rest', (segments, tuple(rule.size for rule in rules)))
        for index, block in enumerate(self.blocks):
            _, size = self.long_rest if index % 2 else self.short_rest
            block.attn.fix(*size)

    def rules(self, x: Tensor):
        return [
            (
                FixedGroups(
                    getattr(self, f'{name}_order'),
                    getattr(self, f'{name}_inverse'),
                    *getattr(self, f'{name}_rest'),
                ),
                None,
            )
            for name in ('short', 'long')
        ]


class FixedSizeAttention(GroupAttention):
    """See :func:`.operators.fixed_attention`."""

    def fix(self, height: int, width: int) -> None:
        """Compute the biases of the offsets in groups of this size."""
        self.register_buffer('table', self.pos(height, width).contiguous())
        self.pos = nn.Identity()

    def forward(  # type: ignore[override]
        self, x: Tensor, groups: FixedGroups, _: AxisRule
    ) -> Tensor:
        out = operators.fixed_attention(
            self.qkv(x),
            self.table,
            groups.order,
            groups.inverse,
            groups.segments,
            self.num_heads,
            float(self.scale),
        )
        return self.proj(out)


def exportable_for(
    model: nn.Module, inputs: Sequence[Tensor], more: Mapping[Type, Type] = {}
) -> nn.Module:
    """A copy in evaluation mode for images of one size, by operators of :mod:`.operators`.

    Args:
        model (nn.Module): a CrossFormer, or a model around one.
        inputs (Sequence[Tensor]): what the model takes, of this size; one image.
        more (Mapping[type, type]): as of :func:`.any_size.exportable`.
    """
    classes = {GroupAttention: FixedSizeAttention, CrossFormerStage: FixedSizeStage, **more}
    model = copy.deepcopy(model)
    model.eval()  # which returns nothing in backbones of MMDetection
    stages = [module for module in model.modules() if type(module) is CrossFormerStage]
    maps = {}
    hooks = [
        stage.register_forward_pre_hook(lambda stage, args: maps.update({stage: args[0]}))
        for stage in stages
    ]
    model(*inputs)
    for hook in hooks:
        hook.remove()
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    for stage in stages:
        stage.fix(maps[stage])
    return model


def export_fixed_size(model: nn.Module, inputs: Sequence[Tensor]) -> ExportedProgram:
    """``torch.export`` of a module of :func:`exportable_for`, for these inputs' shapes."""
    with torch.no_grad():
        return torch.export.export(model, tuple(inputs))
