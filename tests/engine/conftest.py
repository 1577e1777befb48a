"""Data sets of shapes, to train on and for a test to spoil; warnings; the scripts of tools/."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crossformer_mm import openmmlab
from crossformer_mm.engine import dataset_guard

from ..helpers import ROOT, end_process, free_port, words
from ..trainings import make_data


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """Four images to train on and one to validate."""
    return make_data(tmp_path_factory.mktemp('data') / 'shapes', train=4, val=1, size=48)


@pytest.fixture(scope='module')
def clean(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp('data') / 'shapes', train=6, val=5, size=48)


@pytest.fixture
def own_data(clean, tmp_path) -> Path:
    """A data set of its own for a test to spoil."""
    return Path(shutil.copytree(clean, tmp_path / 'shapes'))


@pytest.fixture
def warned(monkeypatch) -> list:
    """Warnings that checks give."""
    texts: list = []
    for module in (openmmlab, dataset_guard):
        monkeypatch.setattr(module, 'print_log', lambda text, *_: texts.append(text))
    return texts


@pytest.fixture
def script():
    """Starts tools/NAME.sh as a user does; what a test that failed has left at work is ended."""
    jobs = []

    def start(name: str, *arguments, **environment) -> subprocess.Popen:
        settings = dict(OMP_NUM_THREADS='1', PORT=free_port(), PYTHON=sys.executable)
        job = subprocess.Popen(
            [ROOT / 'tools' / name, *words(arguments)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **settings, **environment},
        )
        jobs.append(job)
        return job

    yield start
    for job in jobs:
        if job.poll() is None:
            end_process(job.pid)
