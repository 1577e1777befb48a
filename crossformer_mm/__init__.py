"""CrossFormer and CrossFormer++ backbones for the OpenMMLab libraries.

``custom_imports = dict(imports=['crossformer_mm'])`` in a config registers the
backbone; ``type='CrossFormer'`` builds it.
"""
from .backbone import ARCHITECTURES, CrossFormer
from .version import __version__

__all__ = ['ARCHITECTURES', 'CrossFormer', '__version__']
