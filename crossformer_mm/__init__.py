"""CrossFormer and CrossFormer++ backbones for the OpenMMLab libraries.

``custom_imports = dict(imports=['crossformer_mm'])`` in a config registers the
backbone, the hooks, the runners of ``engine`` and what a classifier needs besides;
``type='CrossFormer'`` builds the backbone.
"""
from mmengine.config.utils import MODULE2PACKAGE

from . import engine
from .backbone import ARCHITECTURES, CrossFormer
from .classification import NormedGlobalAveragePooling
from .hooks import MagnitudeHook, ValidationSamplesHook
from .version import __version__

__all__ = ['ARCHITECTURES', 'CrossFormer', 'MagnitudeHook', 'NormedGlobalAveragePooling',
           'ValidationSamplesHook', '__version__', 'engine']

# Packages whose configs mmengine finds by name: mmengine.hub.get_config('crossformer_mm::...')
# and _base_ = 'crossformer_mm::...' in a config read only those of this table.
MODULE2PACKAGE.setdefault('crossformer_mm', 'crossformer_mm')
