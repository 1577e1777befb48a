"""The benchmark of pretraining runs whole at a small size."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from ..helpers import ROOT, load_script, read_json

pytestmark = pytest.mark.usefixtures('own_loaders')


@pytest.fixture
def benchmark():
    return load_script(ROOT / 'benchmarks/pretraining.py')


def test_a_try_of_it_leaves_figures_and_a_picture(output_of, benchmark, tmp_path, monkeypatch):
    ran = []

    def run(log, title, tool, *arguments):
        ran.append(' '.join(map(str, arguments)))
        output_of(Path(tool).name, *arguments)

    monkeypatch.setattr(benchmark, 'run_tool', run)  # in this process, for speed
    options = f'--smoke --seeds 3 --out {tmp_path} --work-dir {tmp_path}/work'
    monkeypatch.setattr(sys, 'argv', ['pretraining.py', *options.split()])
    benchmark.main()
    result = read_json(tmp_path / 'results.json')
    assert len(result['top1']) == 1 and result['seeds'] == [3]
    for arm in benchmark.ARMS:
        assert all(np.shape(result[arm][key]) == (1, 1) for key in benchmark.METRICS)
    # The two differ in the weights that they start from alone.
    start = f"model.backbone.init_cfg.checkpoint={tmp_path / 'work/classifier/epoch_1.pth'} "
    pretrained, random = (
        line.replace(f'/{arm}_', '') for line, arm in zip(ran[-2:], benchmark.ARMS)
    )
    assert pretrained.replace(start, '') == random != pretrained
    assert cv2.imread(str(tmp_path / 'curves.png')).std() > 10
    assert '| 1 | ' in (tmp_path / 'table.md').read_text()


def test_every_class_is_drawn_in_its_own_way(benchmark):
    drawn = [
        benchmark.draw(np.random.default_rng(0), shape, pattern)
        for shape in benchmark.CLASSES
        for pattern in benchmark.PATTERNS
    ]
    assert len({image.tobytes() for image in drawn}) == 16
    assert all(image.shape == (64, 64, 3) for image in drawn)
