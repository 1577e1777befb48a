"""The script that measures on a GPU runs to its end, even where little is installed."""

import math
import os
import runpy
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from crossformer_mm.compat import TRITON, missing_torch
from crossformer_mm.grouping import AxisRule
from crossformer_mm.kernels import fused, plain

from ..helpers import ROOT, needs_interpreter, needs_torch, read_json, run_python

needs_its_triton = needs_torch(TRITON, 'the Triton that has all that the kernels use')
SCRIPT = ROOT / 'benchmarks/gpu.py'
# As on a machine without the OpenMMLab libraries.
WITHOUT_OPENMMLAB = """
import runpy, sys
sys.modules.update(mmengine=None, mmcv=None, mmdet=None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.fixture
def script(monkeypatch):
    """The script's names, without running it."""
    pytest.importorskip('crossformer_mm.kernels.fused_triton', reason='no triton')
    monkeypatch.setattr(sys, 'path', sys.path.copy())  # which the script adds to
    for variable in ('TRITON_INTERPRET', 'PYTORCH_NVML_BASED_CUDA_CHECK'):  # which it sets
        monkeypatch.setenv(variable, '1')
    return SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name='benchmark'))


@needs_its_triton
@needs_interpreter
def test_every_section_runs_on_a_bare_machine(tmp_path):
    pytest.importorskip('triton', reason='fused attention needs the package triton')
    out = tmp_path / 'gpu.json'
    done = run_python('-c', WITHOUT_OPENMMLAB, SCRIPT, '--smoke', '--out', out)
    assert done.returncode == 0, done.stdout + done.stderr
    sections = read_json(out)['sections']
    assert ' '.join(sections) == 'compile default sanitizer check layers models learn tune'
    for name, section in sections.items():
        assert section['rows'] and not section['error'] and not section['failed'], name
    # What a CPU cannot do is counted, not left out.
    assert [section['not_run'] for section in sections.values() if section['not_run']] == [
        ['memcheck', 'racecheck'],
        ['more than 2^31 numbers'],
        ['stage 1 long flex'],
    ]
    assert '2 done, 0 failed, 0 not run' in done.stdout
    for row in sections['default']['rows']:
        assert row['passed'] and row['paths'][0].startswith('fused on cpu'), row
    assert all(row['passed'] and row['same'] for row in sections['check']['rows'][1:])


@needs_its_triton
@pytest.mark.parametrize('wrong', [math.nan, math.inf, 1.0])
def test_a_wrong_number_anywhere_fails_a_check(script, monkeypatch, wrong):
    for place in range(3):
        errors = [0.0, 0.0, 0.0]
        errors[place] = wrong
        assert not script.within(errors, 0.1)
        assert math.isnan(script.harness.worst(errors)) == math.isnan(wrong)
    case = (1, 3, 4), *[AxisRule(2, 1)] * 2, 1, 16, torch.float32
    monkeypatch.setattr(fused, 'attend', plain.attend)
    assert script.compare(*case)['passed']

    def with_wrong_gradient(qkv, table, *arguments):
        qkv.register_hook(lambda grad: torch.full_like(grad, wrong))
        return plain.attend(qkv, table, *arguments)

    monkeypatch.setattr(fused, 'attend', with_wrong_gradient)
    assert not script.compare(*case)['passed']


@needs_its_triton
def test_a_section_that_crashes_or_hangs_leaves_its_results_and_the_rest_is_counted(
    script, tmp_path
):
    def section(end):
        def run(log):
            log(planned=['first', 'second', 'third'])
            log(name='first', passed=True)
            end()

        return script.harness.run_section(run, 3, tmp_path / 'rows.jsonl')

    crashed, hung = section(os.abort), section(lambda: time.sleep(60))
    assert crashed['error'] == f'its process ended with {-signal.SIGABRT}'
    assert hung['error'] == 'stopped after 3 s' and hung['seconds'] < 30
    for found in (crashed, hung):
        assert [row['name'] for row in found['rows']] == ['first']
        assert found['not_run'] == ['second', 'third'] and not found['failed']
    assert not script.harness.report(dict(crashed=crashed))


@needs_its_triton
def test_why_there_is_no_swin_is_said(script, monkeypatch):
    for module in ('mmdet.models.backbones.swin', 'torchvision.models.swin_transformer', 'timm'):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(script.NotRun, match='mmdet.*; torchvision.*; timm: ModuleNotFound'):
        script.build_swin()


@needs_its_triton
def test_swin_of_torchvision_has_no_stochastic_depth(script, monkeypatch):
    """Its ``swin_t`` cannot be called without."""
    try:
        import torchvision.models.swin_transformer as swin
    except Exception as error:
        pytest.skip(f'torchvision: {error}')
    monkeypatch.setitem(sys.modules, 'mmdet.models.backbones.swin', None)
    model = script.build_swin()
    assert {m.p for m in model.modules() if isinstance(m, swin.StochasticDepth)} == {0.0}


def test_without_a_gpu_one_sentence_says_so(tmp_path):
    pytest.importorskip('triton', reason='without it another sentence is given')
    out = tmp_path / 'gpu.json'
    done = run_python(SCRIPT, '--out', out, TRITON_INTERPRET='', CUDA_VISIBLE_DEVICES='')
    assert done.returncode == 1 and not out.exists()
    older = missing_torch(TRITON)
    assert done.stderr.strip() == (
        f'error: benchmarks/gpu.py: {older}.'
        if older
        else 'error: no GPU is there; --smoke tries the script on the CPU'
    )
