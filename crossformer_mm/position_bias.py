"""Position bias of attention: dynamic (DPB), and the alternatives that the papers compare.

=================== ==============================================================
position_bias       what tells attention where a token is
=================== ==============================================================
dynamic             an MLP from the offset between two tokens to a bias per head
dynamic_residual    the same with residual connections
relative            a learnt table of biases, one for each offset of a group of G x G members;
                    resized for others
absolute            a learnt map that is added to the first embedding, no bias
none                nothing
=================== ==============================================================

Every bias is called with the sides of a group and returns the bias of each offset. ``any_group``
says that it needs no resizing for groups of any size; ``undecayed`` names the parameters that timm
trains without weight decay, besides norms and biases.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compat import trunc_normal_

POSITION_BIASES = ('dynamic', 'dynamic_residual', 'relative', 'absolute', 'none')


class DynamicPositionBias(nn.Module):
    """Position bias for groups of any size (arXiv 2108.00154, section 3.3).

    Args:
        channels (int): channels of the stage; the MLP is ``channels // 16`` wide.
        num_heads (int): heads of the attention that the bias is added to.
        residual (bool): a residual connection around each of the two middle layers.
    """

    any_group = True

    def __init__(self, channels: int, num_heads: int, residual: bool = False):
        super().__init__()
        self.residual = residual
        width = channels // 16

        def layer(out_features: int) -> nn.Sequential:
            return nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, out_features))

        self.pos_proj = nn.Linear(2, width)
        self.pos1 = layer(width)
        self.pos2 = layer(width)
        self.pos3 = layer(num_heads)

    def forward(self, height: int, width: int, device: Optional[torch.device] = None) -> Tensor:
        """Compute the bias of every offset inside a group of ``height x width`` members.

        Args:
            height, width (int): members of the group.
            device (torch.device, optional): of the map. None: that of the parameters, which are
                elsewhere between two forwards if a tool offloads them.

        Returns:
            Tensor: (heads, 2*height-1, 2*width-1) in float32 whatever autocast
            says (or in the parameters' own type); entry ``[:, i, j]`` is for
            query - key = (i - (height-1), j - (width-1)), in members.
        """
        # By name: FSDP's weights are no parameters during a forward.
        weight: Any = self.pos_proj.weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point():  # quantised
            weight = self.pos1[0].weight
        device = weight.device if device is None else device
        rows = torch.arange(1 - height, height, device=device, dtype=weight.dtype)
        columns = torch.arange(1 - width, width, device=device, dtype=weight.dtype)
        offsets = torch.stack(
            [rows[:, None].expand(-1, columns.numel()), columns[None, :].expand(rows.numel(), -1)],
            dim=-1,
        )
        # Offsets beyond 256 are not distinct in bfloat16: no autocast here. (On the meta device,
        # on which shapes can be followed through a model, there is none.)
        with torch.autocast('cpu' if device.type == 'meta' else device.type, enabled=False):
            bias = self.mlp(offsets)
        return bias.permute(2, 0, 1)

    def mlp(self, offsets: Tensor) -> Tensor:
        """(..., 2) to (..., heads)."""
        x = self.pos_proj(offsets)
        for layer in (self.pos1, self.pos2):
            x = x + layer(x) if self.residual else layer(x)
        return self.pos3(x)


class RelativePositionBias(nn.Module):
    """A learnt bias for each offset inside a group, as Swin has (arXiv 2103.14030, section 3.2).

    Args:
        num_heads (int): heads of the attention that the bias is added to.
        group_size (int): G; the table is of groups of G x G members and resized for others.
    """

    any_group = False
    undecayed = ('relative_position_bias_table',)

    def __init__(self, num_heads: int, group_size: int):
        super().__init__()
        side = 2 * group_size - 1
        self.relative_position_bias_table = nn.Parameter(torch.empty(num_heads, side, side))
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, height: int, width: int, device: Optional[torch.device] = None) -> Tensor:
        """Return the biases that :meth:`DynamicPositionBias.forward` describes."""
        return resize_map(self.relative_position_bias_table, 2 * height - 1, 2 * width - 1)


class NoPositionBias(nn.Module):
    """A bias of 0, for attention that is not told where its tokens are.

    Args:
        num_heads (int): heads of the attention.
    """

    any_group = True

    def __init__(self, num_heads: int):
        super().__init__()
        # No buffer: one that no checkpoint has would stay on the meta device, if built there.
        self.num_heads = num_heads

    def forward(self, height: int, width: int, device: Optional[torch.device] = None) -> Tensor:
        """Return zeros as :meth:`DynamicPositionBias.forward` has biases; ``device`` None: CPU."""
        zero = torch.zeros(self.num_heads, 1, 1, device=device)
        return zero.expand(-1, 2 * height - 1, 2 * width - 1)


class AbsolutePosition(nn.Module):
    """A learnt map that is added to a map of tokens (arXiv 2103.14030, table 4: "abs. pos.").

    Args:
        channels (int): channels of the map.
        side (int): its height and width; resized for maps of other sizes.
    """

    undecayed = ('absolute_pos_embed',)

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.absolute_pos_embed = nn.Parameter(torch.empty(channels, side, side))
        trunc_normal_(self.absolute_pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        return x + resize_map(self.absolute_pos_embed, *x.shape[1:3]).permute(1, 2, 0)


def build_position_bias(name: str, channels: int, num_heads: int, group_size: int) -> nn.Module:
    """Build the bias of one attention in a stage of ``channels`` with groups of ``group_size``."""
    if name == 'relative':
        return RelativePositionBias(num_heads, group_size)
    if name in ('absolute', 'none'):
        return NoPositionBias(num_heads)
    return DynamicPositionBias(channels, num_heads, residual=name == 'dynamic_residual')


def resize_map(x: Tensor, height: int, width: int) -> Tensor:
    """Resize (C, H, W) to (C, height, width), bicubically; the same size changes nothing."""
    return F.interpolate(x[None], (height, width), mode='bicubic', align_corners=False)[0]


def bias_of_pairs(table: Tensor, height: int, width: int) -> Tensor:
    """Look the bias of every (query, key) pair of a group up in a table of offsets.

    Equals, for members (r, c) of the group,
    ``bias[h, (rq, cq), (rk, ck)] = table[h, rq - rk + centre, cq - ck + centre]``.

    Args:
        table (Tensor): (heads, 2*H-1, 2*W-1) of :class:`DynamicPositionBias`,
            for groups of at least this size.
        height, width (int): members of the group.

    Returns:
        Tensor: (heads, height*width, height*width), queries before keys.
    """
    pairs = bias_windows(table, height, width).flip(3, 4)
    return pairs.reshape(len(table), height * width, height * width)


def bias_windows(table: Tensor, height: int, width: int) -> Tensor:
    """View a table as (heads, height, width, height, width), keys in reverse order."""
    _, rows, columns = table.shape
    top, left = rows // 2 - (height - 1), columns // 2 - (width - 1)
    table = table[:, top : top + 2 * height - 1, left : left + 2 * width - 1]
    # Two sliding windows: [h, a, b, c, d] = table[h, a + c, b + d] with a, b the
    # query's row and column; c, d count the key's backwards.
    return table.unfold(1, height, 1).unfold(2, width, 1)
