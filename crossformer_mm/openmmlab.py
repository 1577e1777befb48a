"""The parts of MMEngine that the backbone uses, and replacements where it is not installed.

The backbone alone needs PyTorch and einops. Everything else in the package imports MMEngine itself.
"""

import logging
from contextlib import nullcontext
from typing import Callable

from torch import nn

from .compat import trunc_normal_
from .installed import HAS_MMENGINE, remedy

if HAS_MMENGINE:
    from mmengine.fileio import get_local_path
    from mmengine.logging import HistoryBuffer, print_log
    from mmengine.model import BaseModule, initialize
    from mmengine.registry import MODELS

    register_model: Callable = MODELS.register_module()

    def set_random_weights(model: nn.Module) -> None:
        """Draw weights of linear layers with a standard deviation of 0.02; reset LayerNorms."""
        linear = dict(type='TruncNormal', layer='Linear', std=0.02)
        initialize(model, [linear, dict(type='Constant', layer='LayerNorm', val=1)])

else:
    get_local_path = nullcontext

    def print_log(message: str, logger: str, level: int = logging.INFO) -> None:
        logging.getLogger('crossformer_mm').log(level, message)

    class HistoryBuffer:  # type: ignore[no-redef]
        """The log of a training in a checkpoint of MMEngine's: read as data, and not used."""

        min = max = mean = current = None

    class BaseModule(nn.Module):  # type: ignore[no-redef]
        """A module that takes ``init_cfg``, as MMEngine's does."""

        def __init__(self, init_cfg=None):
            super().__init__()
            self.init_cfg = init_cfg

        def init_weights(self) -> None:
            if self.init_cfg:
                raise ImportError(
                    f'init_cfg={self.init_cfg!r} needs mmengine, which is not installed: '
                    f"{remedy('mmengine')}.",
                    name='mmengine',
                )

    def register_model(model: type) -> type:
        return model

    def set_random_weights(model: nn.Module) -> None:
        """Draw the weights that MMEngine draws."""
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.LayerNorm):
                layer.reset_parameters()


def warn(message: str) -> None:
    """Log a warning."""
    print_log(message, 'current', logging.WARNING)
