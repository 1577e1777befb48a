"""Robust training and testing for MMEngine, registered for the tools here and any other.

``runner_type = 'CarefulRunner'`` in a config gives a tool of MMDetection, MMSegmentation or
MMPretrain all of it. Single hooks for ``custom_hooks``:

- ``SafeLoadingHook``: checkpoints are read as plain data, no code in them is run;
- ``WholeFilesHook``: checkpoints are written atomically;
- ``CheckWeightsHook``: a checkpoint must fit, and no epoch is done twice;
- ``CheckDataHook``: an error in data names the file in one line;
- ``ResumeHook``: counters of hooks and modules are saved in checkpoints, and a warning lists
  settings that a checkpoint replaces;
- ``PreemptionHook``: a signal ends a training with a checkpoint of the iteration under way;
- ``NonFiniteHook``: a loss or gradient that is not finite ends a training;
- ``SeedHook``: random numbers depend only on seed and iteration; with ``CountedSampler`` or
  ``CountedInfiniteSampler`` instead of MMEngine's samplers, those of images do, too.

``train_cfg = dict(type='ResumableTrainLoop', ...)`` resumes mid-epoch; MMEngine's cannot.
"""

from ..errors import ConfigError, DataError, UserError
from .atomic_checkpoints import WholeFilesHook
from .dataset_guard import CheckDataHook
from .epoch_loop import ResumableTrainLoop
from .layer_decay import LayerDecayOptimWrapperConstructor
from .mixed_precision import BFloat16OptimWrapper
from .nonfinite import NonFiniteHook
from .preemption import PreemptionHook
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
    'NonFiniteHook',
    'PreemptionHook',
    'ResumableTrainLoop',
    'ResumeHook',
    'SafeLoadingHook',
    'SeedHook',
    'UserError',
    'WholeFilesHook',
]
