"""The model's function for images of one size: no masks and no arithmetic on sizes.

The groups are those of :mod:`crossformer_mm.grouping`, written down: where each token goes, and the
biases of all offsets, of which a runtime makes those of pairs when it loads the file.
"""

import copy
from typing import Sequence

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..attention import GroupAttention
from ..backbone import CrossFormerStage
from ..grouping import group_map
from .any_size import exchange_classes
from .operators.fixed_size_attention import fixed_size_attention

MAP, SHORT, LONG = range(3)  # orders of the tokens: row by row, or group by group


class FixedSizeStage(CrossFormerStage):
    """Its tokens are a matrix (H*W, C), group by group: all that a block does but attention and the
    cooling layer takes them in any order, so that they are moved once a block. (And OpenVINO takes
    any tensor of four axes for channels first, and turns (1, H, W, C) round before each sum.)"""

    def fix(self, x: Tensor) -> None:
        """Write down the groups of a map (1, H, W, C), and the biases of its blocks."""
        height, width = x.shape[1:3]
        rules = CrossFormerStage.rules(self, x)
        tables = [group_map(height, width, *pair) for pair in rules]
        orders = [torch.arange(height * width)]
        orders += [torch.cat([part.flatten() for part in table]) for table in tables]
        self.segments = [[number for part in table for number in part.shape] for table in tables]
        for before in (MAP, SHORT, LONG):
            for after in (MAP, SHORT, LONG):
                move = orders[before].argsort()[orders[after]]
                if not torch.equal(move, orders[MAP]):
                    self.register_buffer(f'move_{before}_{after}', move.int())
        for block, axes in self.schedule(*rules):
            block.attn.fix(*(axis.size for axis in axes))

    def move(self, tokens: Tensor, before: int, after: int) -> Tensor:
        """Reorder tokens."""
        move = getattr(self, f'move_{before}_{after}', None)
        return tokens if move is None else tokens.index_select(0, move)

    def forward(self, x: Tensor) -> Tensor:
        tokens, order = x.flatten(0, 2), MAP
        for block, (after, segments) in self.schedule(*zip((SHORT, LONG), self.segments)):
            tokens = block.mix(self.move(tokens, order, after), segments)
            order = after
            if block.cooling:
                tokens = block.cool(self.move(tokens, order, MAP).view(x.shape)).flatten(0, 2)
                order = MAP
        return self.move(tokens, order, MAP).view(x.shape)


class FixedSizeAttention(GroupAttention):
    """Attention by :func:`.operators.fixed_size_attention.fixed_size_attention`.

    Queries, keys and values have a linear layer each: slicing one matrix would copy it.
    """

    def fix(self, height: int, width: int) -> None:
        """Compute the biases of the offsets in groups of this size."""
        self.register_buffer('table', self.pos(height, width).contiguous())
        self.pos = nn.Identity()
        channels, weights = self.qkv.in_features, self.qkv.state_dict()
        self.qkv = nn.ModuleList(
            nn.Linear(channels, channels, bias='bias' in weights) for _ in range(3)
        )
        for index, linear in enumerate(self.qkv):
            linear.load_state_dict({name: one.chunk(3)[index] for name, one in weights.items()})

    def forward(  # type: ignore[override]
        self, tokens: Tensor, segments: Sequence[int]
    ) -> Tensor:
        q, k, v = (linear(tokens) for linear in self.qkv)
        return self.proj(
            fixed_size_attention(q, k, v, self.table, segments, self.num_heads, float(self.scale))
        )


def exportable_for(model: nn.Module, inputs: Sequence[Tensor]) -> nn.Module:
    """Copy a model in eval mode for images of one size, by operators of :mod:`.operators`.

    Args:
        model (nn.Module): a CrossFormer, or a model around one.
        inputs (Sequence[Tensor]): what the model takes, of this size; one image.
    """
    classes = {GroupAttention: FixedSizeAttention, CrossFormerStage: FixedSizeStage}
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
    exchange_classes(model, classes)
    for stage in stages:
        stage.fix(maps[stage])
    return model


def export_fixed_size(model: nn.Module, inputs: Sequence[Tensor]) -> ExportedProgram:
    """Export a module of :func:`exportable_for` for these inputs' shapes, by ``torch.export``."""
    with torch.no_grad():
        return torch.export.export(model, tuple(inputs))
