"""Long-short distance attention: attention inside the groups of a map."""

from typing import Optional

from mmengine.model import BaseModule
from torch import Tensor, nn

from .grouping import AxisRule
from .kernels import check_path, map_attention
from .linear import Linear
from .position_bias import build_position_bias


class GroupAttention(BaseModule):
    """Multi-head attention among the members of each group, with position bias.

    Which groups these are, short or long distance, comes with the call; the
    parameters are the same for both (arXiv 2108.00154, section 3.2).

    Args:
        channels (int): channels of the map, a multiple of ``num_heads``.
        num_heads (int): attention heads.
        qkv_bias (bool): give the projection to queries, keys, values a bias.
        qk_scale (float, optional): factor on the logits. None: head_dim^-0.5.
        attn_drop_rate (float): dropout on attention weights while training.
        proj_drop_rate (float): dropout on the output while training.
        attention_path (str, optional): how to compute, see :mod:`crossformer_mm.kernels`.
            None: the fastest that works.
        position_bias (str): one of :mod:`crossformer_mm.position_bias`.
        group_size (int): G, for a position bias that has a size.

    Raises:
        ValueError: there is no such ``attention_path``.
    """

    attend = staticmethod(map_attention)

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
        check_path(attention_path)
        self.num_heads = num_heads
        self.scale = (channels // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.attn_drop_rate = attn_drop_rate
        self.attention_path = attention_path
        self.pos = build_position_bias(position_bias, channels, num_heads, group_size)
        self.qkv = Linear(channels, channels * 3, bias=qkv_bias)
        self.proj = Linear(channels, channels)
        self.proj_drop = nn.Dropout(proj_drop_rate)

    def forward(self, x: Tensor, rows: AxisRule, columns: AxisRule) -> Tensor:
        """Each position attends within its group.

        Args:
            x (Tensor): (B, H, W, C).
            rows, columns (AxisRule): the groups, by :func:`.grouping.fit_rule`.

        Returns:
            Tensor: (B, H, W, C).
        """
        out = self.attend(
            self.qkv(x),
            self.pos(rows.size, columns.size),
            rows,
            columns,
            self.num_heads,
            self.scale,
            self.attn_drop_rate if self.training else 0.0,
            self.attention_path,
        )
        return self.proj_drop(self.proj(out))
