"""Import-time dependency check.

The backbone needs PyTorch and einops. Where MMEngine is installed, the package needs all of these.

These packages are no dependencies of the wheel: PyTorch, mmcv and the packages on top fit one
another in few combinations, and pip would replace a part of a working one by a newer part that
does not fit.
"""

import importlib
import importlib.util
import re
from importlib.metadata import PackageNotFoundError, distribution
from typing import Iterable, Optional

BACKBONE = ('torch', 'einops')
OLDEST = {'torch': '2.1', 'mmengine': '0.10', 'mmcv': '2.0', 'einops': '0.6'}
# The two families have the same import packages. mmcv is a source distribution: without
# --no-build-isolation pip builds it where there is no torch, and it silently omits its operators.
# mim finds compiled ones; mmcv-lite is mmcv without operators.
FAMILIES = {
    'onedl-': "pip install --no-build-isolation 'onedl-mmengine>=0.10.12' 'onedl-mmcv>=2.3.6'",
    '': "pip install openmim && mim install mmengine 'mmcv>=2.1.0,<2.2.0'",
}
WITHOUT_OPERATORS = 'without compiled operators pip install mmengine mmcv-lite'
# Modules and names of the package that need MMEngine.
NEED_MMENGINE = {
    *('cli', 'engine', 'flops', 'hooks', 'hub', 'pictures', 'prediction', 'sharding', 'sweep'),
    *('AttentionPathHook', 'MagnitudeHook', 'ValidationSamplesHook'),
}


def is_installed(package: str) -> bool:
    """Check whether a package can be found, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # from a finder that blocks it
        return False


HAS_MMENGINE = is_installed('mmengine')


class Finder:
    """Raise the error of :func:`check_installed` for a part of the package that needs MMEngine."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        package, _, part = name.partition('.')
        if package == __package__ and part.partition('.')[0] in NEED_MMENGINE:
            check_installed(needed_by=name)


def check_installed(packages: Iterable[str] = tuple(OLDEST), needed_by: str = 'crossformer_mm'):
    """Raise an ImportError for the first of the packages that is missing or too old."""
    for package in packages:
        oldest = OLDEST[package]
        if not is_installed(package):
            state = 'which is not installed'
        else:
            version = str(importlib.import_module(package).__version__)
            if numbers(version) >= numbers(oldest):
                continue
            state = f'this is {version}'
        raise ImportError(
            f'{needed_by} needs {package} {oldest} or newer, {state}: {remedy(package)}.',
            name=package,
        )


def numbers(version: str) -> tuple:
    """Return the first two numbers of a version."""
    return tuple(map(int, re.findall(r'\d+', version)[:2]))


def remedy(package: str) -> str:
    """Return the command that installs a package that fits the others."""
    if package == 'torch':
        return (
            'install it as pytorch.org says, and after it an mmcv for it, unless you use the '
            'backbone only'
        )
    if package == 'einops':
        return 'pip install einops'
    family = installed_family()
    if family is not None:
        return f'{FAMILIES[family]}, or {WITHOUT_OPERATORS}' if family == '' else FAMILIES[family]
    return (
        f"{FAMILIES['onedl-']} for the maintained packages, {FAMILIES['']} for the last of "
        f'OpenMMLab, or {WITHOUT_OPERATORS}'
    )


def installed_family() -> Optional[str]:
    """Return the prefix of the installed family's names, or None if there is none."""
    for family in FAMILIES:
        for package in ('mmengine', 'mmcv', 'mmdetection', 'mmdet', 'mmsegmentation'):
            try:
                distribution(family + package)
                return family
            except PackageNotFoundError:
                pass
    return None
