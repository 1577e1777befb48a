"""Wheels of this checkout, and pip."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ..helpers import ROOT, words


def pip(*arguments, folder=None, **environment) -> str:
    """Run pip in a folder, without an index, whatever this machine tells it; return what it prints."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith('PIP_')}
    kept.update(PIP_CONFIG_FILE=os.devnull, PIP_NO_INDEX='1', PIP_NO_CACHE_DIR='1')
    command = [sys.executable, '-m', 'pip', '--disable-pip-version-check', *words(arguments)]
    done = subprocess.run(
        command, cwd=folder, text=True, capture_output=True, env={**kept, **environment}
    )
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout


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
    source = copy_of_the_project(folder / 'source')
    pip('wheel --no-deps --no-build-isolation --wheel-dir', folder, source, **environment)
    (wheel,) = folder.glob('crossformer_mm-*.whl')
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    pip('install --no-deps --target', folder, wheel)
    return folder
