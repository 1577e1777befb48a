"""CrossFormer and CrossFormer++ backbones for the OpenMMLab libraries.

``custom_imports = dict(imports=['crossformer_mm'])`` in a config registers the
backbone, the hooks, the runners of ``engine`` and what a classifier needs besides;
``type='CrossFormer'`` builds the backbone.
"""

from . import mmcv_ops
from .installed import check_installed

check_installed()
mmcv_ops.install()

from mmengine.config.utils import MODULE2PACKAGE  # noqa: E402

from . import engine, sharding  # noqa: E402
from .backbone import ARCHITECTURES, CrossFormer  # noqa: E402
from .classification import NormedGlobalAveragePooling  # noqa: E402
from .hooks import AttentionPathHook, MagnitudeHook, ValidationSamplesHook  # noqa: E402
from .version import __version__  # noqa: E402

__all__ = [
    'ARCHITECTURES',
    'AttentionPathHook',
    'CrossFormer',
    'MagnitudeHook',
    'NormedGlobalAveragePooling',
    'ValidationSamplesHook',
    '__version__',
    'engine',
    'sharding',
]

# Every training logs which path computes attention.
engine.runner.ADDED_HOOKS.append(AttentionPathHook)

# Packages whose configs mmengine finds by name: mmengine.hub.get_config('crossformer_mm::...')
# and _base_ = 'crossformer_mm::...' in a config read only those of this table.
MODULE2PACKAGE.setdefault('crossformer_mm', 'crossformer_mm')
