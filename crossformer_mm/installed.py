"""Import-time dependency check.

These packages are no dependencies of the wheel: PyTorch, mmcv and the packages on top fit one
another in few combinations, and pip would replace a part of a working one by a newer part that
does not fit.
"""

import importlib
import importlib.util
import re
from importlib.metadata import PackageNotFoundError, distribution
from typing import Optional

OLDEST = {'torch': '2.1', 'mmengine': '0.10', 'mmcv': '2.0', 'einops': '0.6'}
# The two families have the same import packages. mmcv is a source distribution: without
# --no-build-isolation pip builds it where there is no torch, and it silently omits its operators.
# mim finds compiled ones. The backbone needs no operators; mmcv-lite is mmcv without them.
FAMILIES = {
    'onedl-': "pip install --no-build-isolation 'onedl-mmengine>=0.10.12' 'onedl-mmcv>=2.3.6'",
    '': "pip install openmim && mim install mmengine 'mmcv>=2.1.0,<2.2.0'",
}
BACKBONE_ALONE = 'for the backbone alone pip install mmengine mmcv-lite'


def check_installed() -> None:
    """Raise an ImportError for the first package that is missing or too old."""
    for package, oldest in OLDEST.items():
        if importlib.util.find_spec(package) is None:
            state = 'which is not installed'
        else:
            version = str(importlib.import_module(package).__version__)
            if numbers(version) >= numbers(oldest):
                continue
            state = f'this is {version}'
        raise ImportError(
            f'crossformer_mm needs {package} {oldest} or newer, {state}: {remedy(package)}.',
            name=package,
        )


def numbers(version: str) -> tuple:
    """Return the first two numbers of a version."""
    return tuple(map(int, re.findall(r'\d+', version)[:2]))


def remedy(package: str) -> str:
    """Return the command that installs a package that fits the others."""
    if package == 'torch':
        return (
            'install it as pytorch.org says, and after it an mmcv for it, or for the backbone '
            'alone mmcv-lite'
        )
    if package == 'einops':
        return 'pip install einops'
    family = installed_family()
    if family is not None:
        return f'{FAMILIES[family]}, or {BACKBONE_ALONE}' if family == '' else FAMILIES[family]
    return (
        f"{FAMILIES['onedl-']} for the maintained packages, {FAMILIES['']} for the last of "
        f'OpenMMLab, or {BACKBONE_ALONE}'
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
