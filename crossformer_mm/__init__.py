"""CrossFormer and CrossFormer++ backbones for the OpenMMLab libraries, or PyTorch alone.

``custom_imports = dict(imports=['crossformer_mm'])`` in a config registers the
backbone, the hooks, the runners of ``engine`` and what a classifier needs besides;
``type='CrossFormer'`` builds the backbone. Without MMEngine there is the backbone only.
"""

import sys

from . import installed, mmcv_ops

installed.check_installed(installed.OLDEST if installed.HAS_MMENGINE else installed.BACKBONE)

from .architectures import ARCHITECTURES  # noqa: E402
from .backbone import CrossFormer  # noqa: E402
from .classification import NormedGlobalAveragePooling  # noqa: E402
from .version import __version__  # noqa: E402

__all__ = ['ARCHITECTURES', 'CrossFormer', 'NormedGlobalAveragePooling', '__version__']

if installed.HAS_MMENGINE:
    mmcv_ops.install()

    from mmengine.config.utils import MODULE2PACKAGE

    from . import engine, sharding
    from .hooks import AttentionPathHook, MagnitudeHook, ValidationSamplesHook

    __all__ += ['AttentionPathHook', 'MagnitudeHook', 'ValidationSamplesHook', 'engine', 'sharding']

    # Every training logs which path computes attention.
    engine.runner.ADDED_HOOKS.append(AttentionPathHook)

    # Packages whose configs mmengine finds by name: mmengine.hub.get_config('crossformer_mm::...')
    # and _base_ = 'crossformer_mm::...' in a config read only those of this table.
    MODULE2PACKAGE.setdefault('crossformer_mm', 'crossformer_mm')
else:
    sys.meta_path.insert(0, installed.Finder)
