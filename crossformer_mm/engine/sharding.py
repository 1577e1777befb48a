"""Sharded training: MMEngine's FSDPStrategy, repaired.

A config imports it by ``custom_imports = dict(imports=['crossformer_mm',
'crossformer_mm.engine.sharding'])``, see ``configs/mask_rcnn/cfpp_b_1x_fsdp.py``.
"""

import inspect
from typing import Any

import torch
from mmengine._strategy import FSDPStrategy  # its only place
from mmengine.device import get_device
from mmengine.registry import STRATEGIES
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..errors import UserError


@STRATEGIES.register_module()
class ShardedStrategy(FSDPStrategy):
    """MMEngine's FSDPStrategy, with two repairs; its arguments are the same.

    - Since PyTorch 2.1 ``optim_state_dict_to_load`` takes its arguments in another order than the
      one in which MMEngine gives them: every resumed training would end in an error.
    - Without a GPU (gloo) FSDP gets the device that it requires, and full parameters are not moved
      to the device on which they are, which would read freed memory.

    Raises:
        UserError: there is no GPU, and this PyTorch shards on GPUs only.
    """

    # Nothing public stands between the strategy's arguments and FSDP's: hence private methods.
    model_wrapper: Any  # of the base class

    def _init_state_dict_cfg(self, state_dict_cfg) -> None:
        super()._init_state_dict_cfg(state_dict_cfg)
        if get_device() == 'cpu':
            for config in (self.state_dict_config, self.optim_state_dict_config):
                config.offload_to_cpu = False

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        if get_device() == 'cpu':
            if not inspect.signature(torch.cpu.Stream).parameters:  # FSDP gives it a priority
                raise UserError(
                    'Sharded training without a GPU needs a PyTorch whose '
                    f'torch.cpu.Stream takes a priority, this is {torch.__version__}.'
                )
            self.model_wrapper = dict(self.model_wrapper or dict(type='MMFullyShardedDataParallel'))
            if self.model_wrapper.get('device_id') is None:
                self.model_wrapper['device_id'] = 'cpu'
        return super()._wrap_model(model)

    def load_optim_state_dict(self, state_dict: dict) -> None:
        self.optim_wrapper.load_state_dict(
            FullyShardedDataParallel.optim_state_dict_to_load(
                model=self.model, optim=self.optim_wrapper.optimizer, optim_state_dict=state_dict
            )
        )
