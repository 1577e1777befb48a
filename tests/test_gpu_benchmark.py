"""The script that measures on a GPU runs to its end, even where little is installed."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from crossformer_mm.compat import missing_torch

from .older_torch import needs_interpreter, needs_torch

needs_its_triton = needs_torch('2.4', 'the Triton that has all that the kernels use')
SCRIPT = Path(__file__).parents[1] / 'benchmarks/gpu.py'
# As on a machine without the OpenMMLab libraries.
WITHOUT_OPENMMLAB = """
import runpy, sys
sys.modules.update(mmengine=None, mmcv=None, mmdet=None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@needs_its_triton
@needs_interpreter
def test_every_section_runs_on_a_bare_machine(tmp_path):
    pytest.importorskip('triton', reason='fused attention needs the package triton')
    out = tmp_path / 'gpu.json'
    done = subprocess.run(
        [sys.executable, '-c', WITHOUT_OPENMMLAB, SCRIPT, '--smoke', '--out', out],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert results['stand_ins'] == ['mmengine', 'mmcv']
    sections = results['sections']
    assert list(sections) == ['check', 'tune', 'attention', 'flex', 'backbone', 'profile']
    for name, section in sections.items():
        assert section['rows'] and 'error' not in section, name
    assert all(row['passed'] for row in sections['check']['rows'])
    assert {row['way'] for row in sections['attention']['rows']} == {'fused', 'plain', 'sdpa'}
    assert {row['model'] for row in sections['backbone']['rows']} >= {'fused', 'mask and pad'}
    assert {row['kernel'] for row in sections['tune']['rows']} == {
        'forward',
        'backward_groups',
        'backward_queries',
        'backward_keys',
        'backward_pairs',
    }
    assert 'SMALL_TILES = {' in done.stdout


@needs_its_triton
def test_candidates_start_with_the_present_tiles(monkeypatch):
    """So that a section cut short by its time limit keeps what is there."""
    monkeypatch.setattr(sys, 'path', sys.path.copy())  # which the script adds to
    fused_triton = pytest.importorskip('crossformer_mm.kernels.fused_triton', reason='no triton')
    script = runpy.run_path(SCRIPT, run_name='benchmark')
    for present, candidates in (
        (fused_triton.TILES, script['CANDIDATES']),
        (fused_triton.SMALL_TILES, script['SMALL_CANDIDATES']),
    ):
        assert present.keys() == candidates.keys()
        for key, tile in present.items():
            assert candidates[key][0] == tuple(tile), key


@needs_its_triton
def test_why_there_is_no_swin_is_said(monkeypatch, capsys):
    pytest.importorskip('crossformer_mm.kernels.fused_triton', reason='no triton')
    monkeypatch.setattr(sys, 'path', sys.path.copy())
    script = runpy.run_path(SCRIPT, run_name='benchmark')
    sources = ('mmdet', 'torchvision', 'timm')
    for module in ('mmdet.models.backbones.swin', 'torchvision.models', 'timm'):
        monkeypatch.setitem(sys.modules, module, None)
    assert script['build_swin']() == (None, 'none')
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(':')[0].strip() for line in lines] == [f'no Swin-T of {s}' for s in sources]


def test_without_a_gpu_one_sentence_says_so(tmp_path):
    pytest.importorskip('triton', reason='without it another sentence is given')
    environment = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'}
    done = subprocess.run(
        [sys.executable, SCRIPT, '--out', tmp_path / 'gpu.json'],
        env=environment | dict(CUDA_VISIBLE_DEVICES=''),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not (tmp_path / 'gpu.json').exists()
    older = missing_torch('2.4')
    assert done.stderr.strip() == (
        f'error: benchmarks/gpu.py: {older}.'
        if older
        else 'error: no GPU is there; --smoke tries the script on the CPU'
    )
