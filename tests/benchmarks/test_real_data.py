"""Order, resumption and reports of benchmarks/real_data, without its data."""

import json
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import import_modules_from_strings
from pycocotools.mask import encode

from crossformer_mm.engine.config import load_config

from ..helpers import ROOT, load_script
from ..test_golden import LOSS_TOLERANCE, NORM_TOLERANCE, TRAJECTORY

FOLDER = ROOT / 'benchmarks' / 'real_data'
KEPT = sorted(file.stem for file in (FOLDER / 'results').glob('*.json'))


@pytest.fixture
def run(monkeypatch):
    pytest.importorskip('mmpretrain', reason='ConvNeXt is one of the models')
    monkeypatch.syspath_prepend(FOLDER.parent)
    monkeypatch.syspath_prepend(FOLDER)
    return load_script(FOLDER / 'run.py')


@pytest.fixture
def report(run):
    return sys.modules['report']


@pytest.fixture
def study(run, tmp_path, monkeypatch):
    """A study of which no tool runs: a training's metric is 0.1 less for every seed, and highest
    with the rate 1.25e-3 for CrossFormer, with 3e-3 for others."""
    calls = []

    def tool(log: Path, tool: str, config: Path, *arguments) -> float:
        work, cfg = config.parent, load_config(str(config))
        if tool == 'test.py':
            result = arguments[arguments.index('--work-dir') + 1] / 'time' / 'time.json'
            result.parent.mkdir(parents=True)
            result.write_text('{"mIoU": 30.0}')
            return 1.0
        rate, seed = cfg.optim_wrapper.optimizer.lr, cfg.randomness.seed
        best = 1.25e-3 if cfg.model.backbone.type == 'CrossFormer' else 3e-3
        calls.append((work.name, rate, seed))
        scalars = work / 'time' / 'vis_data' / 'scalars.json'
        scalars.parent.mkdir(parents=True)
        rows = [{'step': step, 'mIoU': 40.0 - seed - 5 * (rate != best)} for step in (1, 2)]
        scalars.write_text('\n'.join(map(json.dumps, rows)))
        (work / 'last_checkpoint').write_text(str(work / 'last.pth'))
        (work / 'last.pth').touch()
        return 60.0

    monkeypatch.setattr(run, 'run_tool', tool)
    monkeypatch.setattr(run, 'count', lambda cfg, shape: dict(params=8e6, flops=1e9))
    study = run.Study('camvid', tmp_path, tmp_path / 'work', tmp_path / 'camvid.json')
    study.calls = calls
    return study


def test_every_seed_is_trained_once_at_the_best_rate_and_the_first_is_kept(
    run, report, study, tmp_path
):
    study.run(jobs=2)
    rows, done = list(study.runs.values()), len(study.calls)
    for model, seeds in run.seeds_of('camvid').items():
        mine = report.results(rows, model)
        best = 3e-3 if model in ('Swin', 'ConvNeXt', 'ResNet') else 1.25e-3
        assert [(row['rate'], row['seed']) for row in mine] == [(best, n) for n in range(seeds)]
        assert [row['seed'] for row in mine if 'sizes' in row] == [0, 1, 2] * (model in run.SIZED)
    assert 'so far' not in run.table_of('camvid', rows)
    kept = {file.parent for file in study.work.glob('*/*.pth')}
    assert kept == {study.folder(*study.best(model, 0)) for model in run.seeds_of('camvid')}
    again = run.Study('camvid', tmp_path, tmp_path / 'work', tmp_path / 'camvid.json')
    again.run(jobs=2)
    assert again.runs == study.runs and len(study.calls) == done


def test_results_so_far_are_named_as_such(run, study):
    for seed in range(2):
        study.train('CrossFormer', 5e-4, seed)
    table = run.table_of('camvid', list(study.runs.values()))
    assert table.startswith('**2 of 50 trainings so far.**')
    assert '| CrossFormer | 0.0005 | 2 | 8.0 | 1.00 | 60 | 34.5 ± 6.4 |  |' in table
    assert 'ResNet' not in table.split('at seed 0')[0]


def test_a_resumed_training_has_one_curve_and_no_time(run, study, tmp_path):
    for start, rows in {'1': [(1, 0.1), (2, 0.2)], '2': [(2, 0.3), (3, 0.4)]}.items():
        file = tmp_path / start / 'vis_data' / 'scalars.json'
        file.parent.mkdir(parents=True)
        lines = [{'step': step, 'AP': value} for step, value in rows] + [{'step': 1, 'loss': 5}]
        file.write_text('\n'.join(map(json.dumps, lines)))
    assert run.read_curve(tmp_path, 'AP') == [[1, 0.1], [2, 0.3], [3, 0.4]]
    work = study.folder('Swin', 5e-4, 0)
    work.mkdir(parents=True)
    (work / 'iter_180.pth').touch()
    study.train('Swin', 5e-4, 0)
    (row,) = study.runs.values()
    assert row['cpu_seconds'] is None


def test_intervals_are_those_of_student_and_welch(report):
    # By hand: t(2) = 4.303 and sd = 1; t(4) = 2.776 for two of three values, sd = 1 each.
    assert report.with_interval([1, 2, 3]) == '2.0 ± 2.5'
    assert report.difference([1, 2, 3], [4, 5, 6]) == '-5.3 to -0.7'


def test_found_objects_are_drawn_from_a_score_on(run, tmp_path):
    image = tmp_path / 'cells.png'
    cv2.imwrite(str(image), np.full((48, 64, 3), 255, np.uint8))
    mask = encode(np.asfortranarray(np.eye(48, 64, dtype=np.uint8)))
    found = dict(image_id=7, category_id=1, bbox=[8, 8, 30, 20])
    coco = dict(
        images=[dict(id=7, file_name=image.name, width=64, height=48)],
        categories=[dict(id=1, name='cell')],
        annotations=[dict(found, id=1, area=600, iscrowd=0)],
    )
    (tmp_path / 'val.json').write_text(json.dumps(coco))
    pictures = {}
    segmentation = dict(mask, counts=mask['counts'].decode())
    kinds = dict(none=None, low=dict(score=0.1), box={}, mask=dict(segmentation=segmentation))
    for kind, values in kinds.items():
        objects = [] if values is None else [{**found, 'score': 0.9, **values}]
        (tmp_path / 'found.json').write_text(json.dumps(objects))
        results, file = dict(model=tmp_path / 'found.json'), tmp_path / 'picture.png'
        run.draw_predictions(tmp_path / 'val.json', [image], results, file)
        pictures[kind] = cv2.imread(str(file)).astype(int)
    left, right = np.s_[:, : pictures['none'].shape[1] // 2], np.s_[:, -200:]
    assert (pictures['none'][left] < 128).any()  # the annotation
    assert (pictures['low'] == pictures['none']).all()
    for kind in ('box', 'mask'):
        assert (pictures[kind][left] == pictures['none'][left]).all()
        assert (pictures[kind][right] != pictures['none'][right]).any()
    assert (pictures['box'] != pictures['mask']).any()


@pytest.mark.parametrize('name', ['bccd', 'camvid', 'nuclei'])
def test_necks_and_heads_fit_every_backbone(name, run, tmp_path):
    """Forward of each backbone, on an image of one set; channels, on the others."""
    for model, (_, channels) in {**run.MODELS, **run.ABLATION}.items():
        run.write_config(tmp_path / 'run.py', name, model, 1e-3, 0)
        cfg = load_config(str(tmp_path / 'run.py'))
        stages = cfg.model.backbone.out_indices
        part = cfg.model.get('neck') or cfg.model.decode_head
        assert part.in_channels == [channels[stage] for stage in stages]
        if name == 'camvid':
            assert cfg.model.auxiliary_head.in_channels == channels[2]
            init_default_scope(cfg.default_scope)
            import_modules_from_strings(**cfg.custom_imports)
            backbone = MODELS.build(cfg.model.backbone)
            backbone.eval()  # of mmdet's ResNet it returns nothing
            with torch.no_grad():
                assert [f.shape[1] for f in backbone(torch.rand(1, 3, 64, 64))] == channels


@pytest.mark.parametrize('name', KEPT)
def test_kept_results_give_the_kept_table(name, run):
    rows = list(json.loads((FOLDER / 'results' / f'{name}.json').read_text()).values())
    assert run.table_of(name, rows) == (FOLDER / 'results' / f'{name}.md').read_text()
    flops = {row['model']: row['flops'] for row in rows}
    assert all(abs(each / flops['CrossFormer'] - 1) < 0.1 for each in flops.values())


def test_the_page_gives_what_was_measured(report):
    page = (ROOT / 'docs' / 'learning.md').read_text(encoding='utf-8')
    said = f'a relative error of {LOSS_TOLERANCE:.0e}', f'agree to {NORM_TOLERANCE:.0e}'
    assert all(each.replace('e-0', 'e-') in page for each in said)
    assert len(TRAJECTORY['interval']['losses']) == 40 and '40 steps of AdamW' in page
    assert KEPT == sorted(report.SETS)
    for name in KEPT:
        table = (FOLDER / 'results' / f'{name}.md').read_text()
        assert all(line in page for line in table.splitlines() if line.startswith('|'))
        assert all(said in page for said in re.findall(r'\d+ of \d+ trainings so far', table))
