"""Wheels of this checkout, and pip."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ..helpers import ROOT

PIP = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '--no-cache-dir']


def copy_of_the_project(folder: Path) -> Path:
    """The files of a checkout, for a build leaves folders behind; links become files."""
    ignored = shutil.ignore_patterns('.mim', '*.so', '__pycache__')
    folder.mkdir()
    for name in (ROOT / 'MANIFEST.in').read_text().split():
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder)
    for name in ('pyproject.toml', 'setup.py'):
        shutil.copy(ROOT / name, folder)
    for name in 'crossformer_mm configs tools tests requirements docs benchmarks'.split():
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def build_wheel(folder: Path, **environment) -> Path:
    options = '--quiet --no-deps --no-build-isolation --wheel-dir'.split()
    source = copy_of_the_project(folder / 'source')
    environment = {**os.environ, **environment}
    subprocess.run([*PIP, 'wheel', *options, folder, source], check=True, env=environment)
    (wheel,) = folder.glob('crossformer_mm-*.whl')
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    subprocess.run([*PIP, 'install', '--quiet', '--no-deps', '--target', folder, wheel], check=True)
    return folder
