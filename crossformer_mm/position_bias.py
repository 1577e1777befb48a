"""Dynamic position bias (DPB): an MLP from an offset to a bias for each head."""
import torch
from mmengine.model import BaseModule
from torch import Tensor, nn


class DynamicPositionBias(BaseModule):
    """Position bias for groups of any size (arXiv 2108.00154, section 3.3).

    Args:
        channels (int): channels of the stage; the MLP is ``channels // 16`` wide.
        num_heads (int): heads of the attention that the bias is added to.
    """

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        width = channels // 16

        def layer(out_features: int) -> nn.Sequential:
            return nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, out_features))

        self.pos_proj = nn.Linear(2, width)
        self.pos1 = layer(width)
        self.pos2 = layer(width)
        self.pos3 = layer(num_heads)

    def forward(self, height: int, width: int) -> Tensor:
        """Bias of every offset inside a group of ``height x width`` members.

        Returns:
            Tensor: (heads, 2*height-1, 2*width-1) in float32 whatever autocast
            says (or in the parameters' own type); entry ``[:, i, j]`` is for
            query - key = (i - (height-1), j - (width-1)), in members.
        """
        weight = self.pos_proj.weight
        rows = torch.arange(1 - height, height, device=weight.device, dtype=weight.dtype)
        columns = torch.arange(1 - width, width, device=weight.device, dtype=weight.dtype)
        offsets = torch.stack([rows[:, None].expand(-1, columns.numel()),
                               columns[None, :].expand(rows.numel(), -1)], dim=-1)
        # Offsets beyond 256 are not distinct in bfloat16: no autocast here. (On the meta device,
        # on which shapes can be followed through a model, there is none.)
        device = 'cpu' if weight.is_meta else weight.device.type
        with torch.autocast(device, enabled=False):
            bias = self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))
        return bias.permute(2, 0, 1)


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
    """The same as a view (heads, height, width, height, width) that counts keys backwards."""
    _, rows, columns = table.shape
    top, left = rows // 2 - (height - 1), columns // 2 - (width - 1)
    table = table[:, top:top + 2 * height - 1, left:left + 2 * width - 1]
    # Two sliding windows: [h, a, b, c, d] = table[h, a + c, b + d] with a, b the
    # query's row and column; c, d count the key's backwards.
    return table.unfold(1, height, 1).unfold(2, width, 1)
