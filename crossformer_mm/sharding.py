"""Units of sharding and of recomputation in a CrossFormer: its blocks.

Configs such as ``configs/mask_rcnn/cfpp_b_1x_fsdp.py`` name these functions.
"""

from mmengine.registry import FUNCTIONS
from torch import nn

from .block import CrossFormerBlock


@FUNCTIONS.register_module()
def is_crossformer_block(module: nn.Module) -> bool:
    """Check whether a module is recomputed as one: ``activation_checkpointing.check_fn``."""
    return isinstance(module, CrossFormerBlock)


@FUNCTIONS.register_module()
def wrap_crossformer_blocks(module: nn.Module, recurse: bool, nonwrapped_numel: int = 0) -> bool:
    """Shard each block by itself: ``model_wrapper.auto_wrap_policy``.

    Args:
        module (nn.Module): the module in question.
        recurse (bool): asks whether to look inside (always), not whether to wrap.
        nonwrapped_numel (int): parameters inside that are not yet wrapped; not used.
    """
    return recurse or is_crossformer_block(module)
