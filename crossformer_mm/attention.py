"""Long-short distance attention: attention inside the groups of a map."""

from typing import Optional, Tuple

from einops import rearrange
from torch import Tensor, nn

from .grouping import AxisRule
from .kernels import map_attention
from .kernels.bias import position_table
from .layers import linear
from .position_bias import bias_windows, build_position_bias


class GroupAttention(nn.Module):
    """Multi-head attention among the members of each group, with position bias.

    The groups, short or long distance, are arguments of the call; the parameters are the same for
    both (arXiv 2108.00154, section 3.2).

    Args:
        channels (int): channels of the map, a multiple of ``num_heads``.
        num_heads (int): attention heads.
        proj_drop_rate (float): dropout on the output while training.
        qkv_bias, qk_scale, attn_drop_rate, attention_path, position_bias: see
            :class:`~crossformer_mm.backbone.CrossFormer`.
        group_size (int): G, for a position bias that has a size.
    """

    attend = staticmethod(map_attention)  # classes for export override it

    def __init__(
        self,
        channels: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: Optional[float] = None,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attention_path: Optional[str] = None,
        position_bias: str = 'dynamic',
        group_size: int = 7,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (channels // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.attn_drop_rate = attn_drop_rate
        self.attention_path = attention_path
        self.pos = build_position_bias(position_bias, channels, num_heads, group_size)
        self.qkv = nn.Linear(channels, channels * 3, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(proj_drop_rate)

    def forward(self, x: Tensor, rows: AxisRule, columns: AxisRule) -> Tensor:
        """Attend within groups.

        Args:
            x (Tensor): (B, H, W, C).
            rows, columns (AxisRule): the groups, by :func:`.grouping.fit_rule`.

        Returns:
            Tensor: (B, H, W, C).
        """
        out = self.attend(
            linear(self.qkv, x),
            position_table(self.pos, rows.size, columns.size, x.device, self.attention_path),
            rows,
            columns,
            self.num_heads,
            self.scale,
            self.attn_drop_rate if self.training else 0.0,
            self.attention_path,
        )
        return self.proj_drop(linear(self.proj, out))

    # For hooks and figures: the kernels keep logits and weights out of memory.

    def project(self, x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of tokens (..., N, C), each (..., heads, N, d)."""
        q, k, v = rearrange(
            self.qkv(x), '... n (three h d) -> three ... h n d', three=3, h=self.num_heads
        )
        return q, k, v

    def position_bias(
        self, queries: Tensor, height: int, width: int, rows: AxisRule, columns: AxisRule
    ) -> Tensor:
        """Return the position bias of some queries of a group.

        Args:
            queries (Tensor): indices of members.
            height, width (int): members of the group: if it is ragged, fewer than the rules give.
            rows, columns (AxisRule): as of :meth:`forward`.

        Returns:
            Tensor: (heads, queries, height*width).
        """
        windows = bias_windows(self.pos(rows.size, columns.size), height, width)
        return windows[:, queries // width, queries % width].flip(2, 3).flatten(2)

    def logits(self, q: Tensor, k: Tensor, queries: Tensor, bias: Tensor) -> Tensor:
        """Return the attention logits of some queries of groups, (..., heads, queries, keys).

        Args:
            q, k (Tensor): of all members, as of :meth:`project`.
            queries, bias (Tensor): as of :meth:`position_bias`.
        """
        return self.scale * (k @ q.mT[..., queries]).mT + bias
