"""The neck between the backbone and a linear classifier."""

from typing import Sequence, Tuple

from torch import Tensor, nn

from .openmmlab import BaseModule, register_model


@register_model
class NormedGlobalAveragePooling(BaseModule):
    """LayerNorm at each position, then the mean over all positions.

    The authors' classifier has both before its linear layer. The norm is no part of the backbone:
    detectors and segmentors take features that are not normalised.

    Args:
        in_channels (int): channels of the last feature.
        init_cfg (dict, optional): see mmengine's BaseModule. None: norm weight 1, bias 0.
    """

    def __init__(self, in_channels: int, init_cfg=None):
        super().__init__(init_cfg)
        self.norm = nn.LayerNorm(in_channels)

    def forward(self, features: Sequence[Tensor]) -> Tuple[Tensor]:
        """Pool the last of some features, (B, C, H, W), to (B, C) in a tuple."""
        return (self.norm(features[-1].permute(0, 2, 3, 1)).mean(dim=(1, 2)),)
