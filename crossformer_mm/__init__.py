"""CrossFormer and CrossFormer++ backbones for the OpenMMLab libraries.

``custom_imports = dict(imports=['crossformer_mm'])`` in a config registers the
backbone; ``type='CrossFormer'`` builds it.
"""
from mmengine.config.utils import MODULE2PACKAGE

from .backbone import ARCHITECTURES, CrossFormer
from .version import __version__

__all__ = ['ARCHITECTURES', 'CrossFormer', '__version__']

# Packages whose configs mmengine finds by name: mmengine.hub.get_config('crossformer_mm::...')
# and _base_ = 'crossformer_mm::...' in a config read only those of this table.
MODULE2PACKAGE.setdefault('crossformer_mm', 'crossformer_mm')
