"""Plumbing of benchmarks/: processes that are measured, and the table that they fill."""

import json
import time

import pytest
import torch
from torch import nn

from ..helpers import ROOT, load_script, read_json

FOLDER = ROOT / 'benchmarks'
MODULE = '''
import os

def start(case):
    settings = lambda: {name: v for name, v in os.environ.items() if 'MALLOC' in name}
    return dict(settings=settings, fail=lambda: 1 / 0, die=os.abort)
'''


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return load_script(FOLDER / 'common.py')


@pytest.fixture
def backbone(common):
    return load_script(FOLDER / 'backbone.py')


@pytest.fixture
def worker(common, tmp_path, monkeypatch):
    """Starts a process that returns the settings of its allocator."""
    monkeypatch.setenv('MALLOC_TRIM_THRESHOLD_', '0')
    monkeypatch.setenv('MALLOC_ARENA_MAX', '1')
    (tmp_path / 'functions.py').write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    functions, started = load_script(tmp_path / 'functions.py'), []

    def start(**environment):
        started.append(common.Worker(functions.start, dict(threads=1), **environment))
        return started[-1]

    yield start
    for process in started:
        process.close()


def test_time_is_measured_with_the_systems_own_allocator(worker):
    assert worker().ask('settings') == {}


def test_memory_is_measured_with_the_settings_of_the_benchmark(worker):
    settings = dict(MALLOC_TRIM_THRESHOLD_='1000000')
    assert worker(**settings).ask('settings') == settings


def test_a_process_that_fails_or_dies_tells_why(worker):
    with pytest.raises(RuntimeError, match='ZeroDivisionError: division by zero'):
        worker().ask('fail')
    with pytest.raises(RuntimeError, match='terminated abruptly'):
        worker().ask('die')


def test_sizes_are_read_as_height_and_width(common):
    assert common.size_of('800x1216') == (800, 1216)
    for text in ('800', '0x5', '5x', '-1x2', 'axb', '1x2x3'):
        with pytest.raises(Exception, match='write HEIGHTxWIDTH'):
            common.size_of(text)


def test_the_parts_of_a_step_are_timed_on_the_ways_that_are_measured(backbone, small):
    """Hooks of linear layers would turn their faster ways off."""
    hooked, model = [], small()

    def step() -> float:
        hooked.extend(m for m in model.modules() if isinstance(m, nn.Linear) and m._forward_hooks)
        start = time.perf_counter()
        model(torch.rand(1, 3, 64, 64))
        return time.perf_counter() - start

    parts = backbone.time_of_parts(model, step)
    attention = {'projections (q k v, out)', 'position bias', 'attention in groups'}
    assert parts.keys() == {'embedding and merging', 'LayerNorm', *attention, 'MLP', 'rest'}
    assert min(parts.values()) > 0 and not hooked
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    'script, folder',
    [
        ('backbone', 'cpu/amd-zen4'),
        ('backbone', 'cpu/amd-zen4-avx2'),
        ('deployment', 'deployment/amd-zen3'),
        ('deployment', 'deployment/amd-zen4'),
    ],
)
def test_kept_results_give_the_kept_tables(common, script, folder):
    record = read_json(FOLDER / folder / 'results.json')
    table = load_script(FOLDER / f'{script}.py').table_of(record)
    assert table == (FOLDER / folder / 'table.md').read_text()


def test_a_line_joins_single_images_of_several_sizes(backbone):
    kind = dict(model='swin_t', mode='infer', dtype='float32')
    cases = [(10, 1), (10, 16), (20, 1)]
    results = [dict(kind, size=[side, 5], batch=batch, median=side) for side, batch in cases]
    lines = backbone.series(results, 'median')
    assert lines == [('swin_t', 'infer', 'float32', [(50, 10), (100, 20)])]


def test_ratios_are_to_models_of_the_same_run(backbone):
    """A run on a busy machine takes longer, its ratios do not; a run without the other has none."""
    ours = [dict(run=run, median=time) for run, time in enumerate((1, 10, 3, 7))]
    other = [dict(run=run, median=time) for run, time in enumerate((2, 20, 2))]
    ratios = backbone.ratios(ours, other, 'median')
    assert backbone.over_runs(ratios) == '0.50 (0.50 to 1.50)'


def test_a_run_is_added_to_those_of_the_same_machine_only(backbone, tmp_path, monkeypatch):
    earlier = json.dumps(dict(machine='another', commands=[], rates=[], results=[]))
    (tmp_path / 'results.json').write_text(earlier)
    monkeypatch.setattr('sys.argv', ['backbone.py', '--out', str(tmp_path), '--add'])
    with pytest.raises(SystemExit, match='is of another; this is'):
        backbone.main()
    assert (tmp_path / 'results.json').read_text() == earlier
