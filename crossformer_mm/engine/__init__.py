"""What a training and a test add to MMEngine's, registered: for the tools here and any other.

``runner_type = 'CarefulRunner'`` in a config gives a tool of MMDetection, MMSegmentation or
MMPretrain all of it. For single pieces, name in ``custom_hooks``:

- ``SafeLoadingHook``: checkpoints are read as plain data, nothing in them is run;
- ``WholeFilesHook``: checkpoints are whole or not there;
- ``CheckWeightsHook``: a checkpoint must fit, and resuming begins where an epoch does;
- ``CheckDataHook``: what is wrong with data is said in a sentence that names the file;
- ``ResumeHook``: what hooks and modules count is kept in checkpoints, and settings that those of a
  checkpoint replace are named;
- ``SeedHook``: what is random is a function of seed and iteration, with ``CountedSampler`` or
  ``CountedInfiniteSampler`` in place of MMEngine's samplers to cover images, too.
"""

from ..errors import ConfigError, DataError, UserError
from .atomic_checkpoints import WholeFilesHook
from .data_checks import CheckDataHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .mixed_precision import BFloat16OptimWrapper
from .randomness import CountedInfiniteSampler, CountedSampler, SeedHook
from .resuming import ResumeHook
from .runner import CarefulFlexibleRunner, CarefulRunner
from .weight_checks import CheckWeightsHook, SafeLoadingHook

__all__ = [
    'BFloat16OptimWrapper',
    'CarefulFlexibleRunner',
    'CarefulRunner',
    'CheckDataHook',
    'CheckWeightsHook',
    'ConfigError',
    'CountedInfiniteSampler',
    'CountedSampler',
    'DataError',
    'LayerDecayOptimWrapperConstructor',
    'ResumeHook',
    'SafeLoadingHook',
    'SeedHook',
    'UserError',
    'WholeFilesHook',
]
