"""Layer-wise learning rate decay, for fine-tuning transformers."""

import re
from typing import Any, Dict, List, Tuple

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ..errors import ConfigError

PREFIX = 'backbone.'


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Build an optimizer whose learning rate is lower for earlier layers of the backbone.

    A parameter of depth d of n has the learning rate ``lr * layer_decay_rate ** (n - 1 - d)``. The
    depth is that of the backbone's ``get_layer_depth``, which CrossFormer and the backbones of
    MMPretrain have. Necks and heads have the full learning rate. It works for detectors, segmentors
    and classifiers.

    Options in ``paramwise_cfg``, in addition to those of MMEngine's DefaultOptimWrapperConstructor,
    such as ``norm_decay_mult`` and ``custom_keys``, whose ``lr_mult`` multiplies, too:

    - ``layer_decay_rate`` (float): factor from one layer to the layer before it, more than 0 and at
      most 1.
    - ``decay_type`` (str): ``layer_wise`` (default) counts blocks, ``stage_wise`` counts stages.

    Raises:
        ConfigError: an option is wrong, or the backbone has no ``get_layer_depth``.

    Examples:
        >>> optim_wrapper = dict(
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        ...     constructor='LayerDecayOptimWrapperConstructor',
        ...     paramwise_cfg=dict(layer_decay_rate=0.8, norm_decay_mult=0.0))
    """

    def _validate_cfg(self) -> None:  # called by the constructor of the base class
        super()._validate_cfg()
        rate = self.paramwise_cfg.get('layer_decay_rate')
        kind = self.paramwise_cfg.get('decay_type', 'layer_wise')
        unread = {'decay_rate', 'num_layers'} & self.paramwise_cfg.keys()
        if unread:
            raise ConfigError(
                f"optim_wrapper.paramwise_cfg: '{min(unread)}' is no option of "
                "LayerDecayOptimWrapperConstructor: give 'layer_decay_rate'; layers are counted "
                'in the backbone.'
            )
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ConfigError(
                'optim_wrapper.paramwise_cfg.layer_decay_rate must be a number over 0 and at most '
                f'1, got {rate!r}.'
            )
        if kind not in ('layer_wise', 'stage_wise'):
            raise ConfigError(
                "optim_wrapper.paramwise_cfg.decay_type must be 'layer_wise' or 'stage_wise', got "
                f'{kind!r}.'
            )

    def add_params(self, params: List[dict], module: nn.Module, prefix: str = '', **kwargs) -> None:
        """Add the parameters of a module, and if it is the full model, scale learning rates."""
        super().add_params(params, module, prefix=prefix, **kwargs)
        if prefix:
            return
        rate = self.paramwise_cfg['layer_decay_rate']
        by_stage = self.paramwise_cfg.get('decay_type') == 'stage_wise'
        depths, count = depths_of(module, by_stage)
        for group in params:
            (parameter,) = group['params']
            scale = rate ** (count - 1 - depths[parameter])
            group['lr'] = group.get('lr', self.base_lr) * scale
        factors = ', '.join(f'{rate ** (count - 1 - depth):.3g}' for depth in range(count))
        print_log(f'Learning rates by depth are multiplied by {factors}', 'current')


def depths_of(model: nn.Module, by_stage: bool) -> Tuple[Dict[nn.Parameter, int], int]:
    """Return the depth of each parameter of a model, and the number of depths. Raise a ConfigError
    if the backbone has no ``get_layer_depth``."""
    backbone: Any = getattr(model, 'backbone', None)
    if not hasattr(backbone, 'get_layer_depth'):
        raise ConfigError(
            'optim_wrapper.constructor: LayerDecayOptimWrapperConstructor needs a backbone with '
            f'get_layer_depth, such as CrossFormer, got {type(backbone).__name__}.'
        )
    depths, stages = {}, {}
    for name, parameter in model.named_parameters():
        name = name.replace('_fsdp_wrapped_module.', '')
        if '_flat_param' in name:
            raise ConfigError(
                'optim_wrapper.constructor: LayerDecayOptimWrapperConstructor needs '
                'strategy.model_wrapper.use_orig_params=True.'
            )
        depths[parameter], count = backbone.get_layer_depth(name, PREFIX)
        if 0 < depths[parameter] < count - 1:
            stages[parameter] = int(re.findall(r'\d+', name)[0]) + 1
    if not by_stage:
        return depths, count
    last = max(stages.values()) + 1
    return {
        parameter: stages.get(parameter, last if depth else 0)
        for parameter, depth in depths.items()
    }, last + 1
