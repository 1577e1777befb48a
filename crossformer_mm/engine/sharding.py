"""What training with sharded parameters needs to know about CrossFormer.

A config names it by ``custom_imports = dict(imports=['crossformer_mm',
'crossformer_mm.engine.sharding'])``, see ``configs/mask_rcnn/cfpp_b_1x_fsdp.py``.
"""
from mmengine._strategy import FSDPStrategy
from mmengine.registry import FUNCTIONS, STRATEGIES
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..block import CrossFormerBlock


@FUNCTIONS.register_module()
def is_crossformer_block(module: nn.Module) -> bool:
    """Whether a module is what is recomputed as one: ``activation_checkpointing.check_fn``."""
    return isinstance(module, CrossFormerBlock)


@FUNCTIONS.register_module()
def wrap_crossformer_blocks(module: nn.Module, recurse: bool, nonwrapped_numel: int = 0) -> bool:
    """Shard each block by itself: ``model_wrapper.auto_wrap_policy``.

    Args:
        module (nn.Module): the module in question.
        recurse (bool): whether it is asked to look inside (always), not to wrap.
        nonwrapped_numel (int): parameters inside that are not yet wrapped; not used.
    """
    return recurse or is_crossformer_block(module)


@STRATEGIES.register_module()
class ShardedStrategy(FSDPStrategy):
    """MMEngine's FSDPStrategy, which goes on from a checkpoint with PyTorch 2.1 and newer, too.

    Since then ``optim_state_dict_to_load`` takes its arguments in another order than the one in
    which MMEngine gives them: every ``--resume`` would end in an error.
    """

    def load_optim_state_dict(self, state_dict: dict) -> None:
        self.optim_wrapper.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model, optim=self.optim_wrapper.optimizer, optim_state_dict=state_dict))
