"""tools/sweep_groups.py: the metrics of tools/test.py for each setting, what it costs, drawn."""

import json
import subprocess
from collections import Counter
from pathlib import Path

import cv2
import pytest
from mmengine.config import Config

from crossformer_mm import CrossFormer
from crossformer_mm.flops import count
from crossformer_mm.sweep.report import pareto
from crossformer_mm.sweep.settings import caution, settings_of

from ..helpers import (
    DEMO_DETECTOR,
    DEMO_SEGMENTOR,
    ROOT,
    metrics,
    random_model,
    read_json,
    run_tool,
)
from ..trainings import make_data

OTHER = '--group-size 3,3,2,2'


@pytest.fixture(scope='module')
def shapes(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp('data') / 'shapes', train=1, val=3)


def read(out: Path) -> list:
    return read_json(out / 'sweep.json')['settings']


@pytest.fixture
def one_apart(monkeypatch) -> list:
    """Only the first process is one, the others run here, for speed; their commands."""
    start, commands = subprocess.run, []

    def run(command, **options):
        if '--task' not in command:  # of a library
            return start(command, **options)
        commands.append(command)
        if len(commands) == 1:
            return start(command, **options)
        return subprocess.CompletedProcess(command, run_tool('sweep_groups.py', command[4:]))

    monkeypatch.setattr(subprocess, 'run', run)
    return commands


def test_every_setting_has_the_metrics_of_tools_test(here, one_apart, tmp_path, output_of):
    out, work = tmp_path / 'sweep', tmp_path / 'test'
    printed = output_of('sweep_groups.py', here, OTHER, '--out', out)
    assert len(one_apart) == 2
    own, other = read(out)
    assert own['own'] and (own['group_size'], own['lda']) == ([7, 7, 7, 7], 'interval')
    assert not other['own'] and other['group_size'] == [3, 3, 2, 2]
    asked = '--cfg-options model.backbone.group_size=(3,3,2,2)'
    for setting, options in ((own, ''), (other, asked)):
        output_of('test.py', here, '--work-dir', work, options)
        assert_those_of(setting['metrics'], work, 'mIoU', 'aAcc')
        assert 0 < setting['backbone_seconds'] < setting['seconds']
        assert setting['peak_memory'] > 2**25
    assert own['metrics'] != other['metrics']
    assert own['backbone_flops'] > other['backbone_flops'] > 0
    assert ' 1 * G 7·7·7·7, I 8·4·2·1, interval ' in printed
    assert ' 2   G 3·3·2·2, I 8·4·2·1, interval ' in printed
    assert '3/3' in printed  # how far each is
    assert min(cv2.imread(str(out / 'sweep.png')).shape[:2]) > 300


def assert_those_of(found: dict, work: Path, *names: str) -> None:
    """Assert the metrics that tools/test.py wrote, some of them by name."""
    expected = metrics(work)
    assert {*names} <= found.keys()
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-9)


def cut(shapes: Path, folder: Path, images: int) -> Path:
    """The same data set with some of its validation images alone."""
    (folder / 'annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        (folder / f'{split}2017').symlink_to(shapes / 'coco' / f'{split}2017')
        name = f'annotations/instances_{split}2017.json'
        known = read_json(shapes / 'coco' / name)
        kept = {image['id'] for image in known['images'][:images]}
        known['images'] = known['images'][:images]
        known['annotations'] = [one for one in known['annotations'] if one['image_id'] in kept]
        (folder / name).write_text(json.dumps(known))
    return folder


def task(folder: Path, images: int, *asked, group_size=(7, 7, 7, 7)) -> list:
    """Task of a process that measures one setting."""
    folder.mkdir(exist_ok=True)
    setting = dict(group_size=group_size, interval=[8, 4, 2, 1], lda='interval')
    content = dict(setting=setting, images=images, asked=asked, folder=str(folder))
    return ['--task', json.dumps(content)]


def test_some_images_of_a_detector_are_all_that_counts(
    output_of, shapes, random_detector, tmp_path
):
    here = f'{DEMO_DETECTOR} {random_detector} --data-root'
    output_of('sweep_groups.py', here, shapes / 'coco', task(tmp_path / 'task', 2))
    result = read_json(tmp_path / 'task' / 'result.json')
    fewer = cut(shapes, tmp_path / 'cut', 2)
    output_of('test.py', here, fewer, '--work-dir', tmp_path / 'test')
    assert_those_of(result['metrics'], tmp_path / 'test', 'coco/bbox_mAP', 'coco/segm_mAP')
    # Images are padded to multiples of 32.
    counted = count(Config.fromfile(ROOT / DEMO_DETECTOR), (128, 128))['parts']
    assert result['shape'] == [128, 128] and result['backbone_flops'] == sum(
        part['flops'] for name, part in counted.items() if name.startswith('backbone.')
    )


@pytest.fixture
def here(shapes, random_segmentor) -> str:
    return f'{DEMO_SEGMENTOR} {random_segmentor} --data-root {shapes}/ade'


def test_a_metric_that_is_not_there_is_said(here, tmp_path, refusal_of):
    said = refusal_of('sweep_groups.py', here, task(tmp_path / 'task', 2, 'mIoU', 'mDice'))
    assert said.startswith("--metric: the config's evaluator has no 'mDice', but 'aAcc', 'mIoU'")
    assert read_json(tmp_path / 'task' / 'result.json') == dict(error=said, refused=True)


def test_an_error_of_a_process_keeps_its_traceback_and_reaches_the_table(
    here, output_of, tmp_path, monkeypatch
):
    def broken(*_):
        raise RuntimeError('out of\nmemory')

    monkeypatch.setattr(CrossFormer, 'forward', broken)
    said = output_of('sweep_groups.py', here, task(tmp_path / 'task', 1), expect=1)
    assert 'Traceback' in said
    left = read_json(tmp_path / 'task' / 'result.json')
    assert left == dict(error='RuntimeError: out of memory', refused=False)


def test_a_position_bias_that_has_a_size_is_resized(output_of, shapes, tmp_path):
    """Its parameters fit the config's own groups alone."""
    bias = "position_bias='relative'"
    config, folder = tmp_path / 'relative.py', tmp_path / 'task'
    base = str(ROOT / DEMO_SEGMENTOR)
    config.write_text(f'_base_ = {base!r}\nmodel = dict(backbone=dict({bias}))')
    checkpoint = random_model(config, tmp_path / 'relative.pth', {})
    asked = task(folder, 1, group_size=(3, 3, 3, 3))
    output_of('sweep_groups.py', config, checkpoint, '--data-root', shapes / 'ade', asked)
    assert 0 <= read_json(folder / 'result.json')['metrics']['mIoU'] <= 100


@pytest.fixture
def sweep(monkeypatch, here, tmp_path):
    """Runs the tool; its exit status.

    Each of its processes in turn gives one of the answers: the result that it leaves, or its exit
    status without one, or an exception that is raised while it runs.
    """

    def call(*answers, arguments='') -> int:
        left = list(answers)

        def run(command, stderr):
            answer = left.pop(0)
            if isinstance(answer, BaseException):
                raise answer
            if isinstance(answer, dict):
                folder = json.loads(command[command.index('--task') + 1])['folder']
                Path(folder, 'result.json').write_text(json.dumps(answer))
                answer = 1 if 'error' in answer else 0
            return subprocess.CompletedProcess(command, answer)

        monkeypatch.setattr(subprocess, 'run', run)
        status = run_tool('sweep_groups.py', here, '--out', tmp_path / 'sweep', arguments)
        assert not left
        return status

    return call


def answer(miou: float, seconds: float) -> dict:
    costs = dict(seconds=seconds, backbone_seconds=seconds / 2, peak_memory=2**30)
    metrics = dict(aAcc=50.0, mIoU=miou)
    return dict(metrics=metrics, backbone_flops=10**9, shape=[64, 64], **costs)


FAILURE = dict(error='error: the disk is on fire.', refused=True)


def test_a_setting_that_fails_is_reported_and_the_others_go_on(sweep, tmp_path, capsys):
    arguments = '--group-size 7,7,7,7 14,14,7,7 --lda interval block'
    answers = answer(40, 1), -9, FAILURE, answer(39, 0.5)
    assert sweep(*answers, arguments=arguments) == 1
    printed = capsys.readouterr().out
    assert 'signal 9' in printed
    assert 'failed: error: the disk is on fire' in printed and '500.0 ms' in printed
    assert [list(result)[-1] for result in read(tmp_path / 'sweep')].count('error') == 2
    assert (tmp_path / 'sweep' / 'sweep.png').is_file()
    # Only those that failed are tried again.
    assert sweep(answer(40, 2), answer(41, 3), arguments=arguments) == 0
    assert [result['metrics']['mIoU'] for result in read(tmp_path / 'sweep')] == [40, 40, 41, 39]


def test_an_interrupted_sweep_keeps_what_it_has(sweep, tmp_path, capsys):
    assert sweep(answer(40, 1), KeyboardInterrupt(), arguments=OTHER) == 2
    assert 'keeps 1 settings, the same command goes on' in capsys.readouterr().err
    assert len(read(tmp_path / 'sweep')) == 1
    assert sweep(answer(39, 1), arguments=OTHER) == 0
    assert len(read(tmp_path / 'sweep')) == 2


def test_a_model_that_is_refused_ends_the_sweep(sweep, tmp_path, capsys):
    assert sweep(FAILURE, arguments=OTHER) == 2
    assert capsys.readouterr().err.endswith('error: error: the disk is on fire.\n')
    assert not (tmp_path / 'sweep' / 'sweep.json').exists()


def test_results_of_another_model_or_other_data_are_kept(sweep, tmp_path, capsys):
    assert sweep(answer(40, 1), arguments='--lda interval') == 0
    before = (tmp_path / 'sweep' / 'sweep.json').read_bytes()
    assert sweep(arguments='--lda interval --max-images 2') == 2
    assert 'is of another model' in capsys.readouterr().err
    assert (tmp_path / 'sweep' / 'sweep.json').read_bytes() == before


def test_the_grid_around_the_config():
    backbone = Config.fromfile(ROOT / DEMO_SEGMENTOR).model.backbone
    settings = settings_of(backbone)
    assert settings[0] == dict(group_size=(7, 7, 7, 7), interval=(8, 4, 2, 1), lda='interval')
    sizes, intervals = (Counter(one[key] for one in settings) for key in ('group_size', 'interval'))
    assert sizes == dict.fromkeys([(7, 7, 7, 7), (14, 14, 7, 7)], 3)
    assert intervals == dict.fromkeys([(8, 4, 2, 1), (16, 8, 2, 1), (4, 2, 2, 1)], 2)
    # Something is asked for: no more than that.
    only = settings_of(backbone, definitions=['block'])
    assert [setting['lda'] for setting in only] == ['interval', 'block']


def test_pareto_front():
    points = [(1, 5), (2, 5), (2, 7), (3, 6), (4, 9), (1, 4)]
    assert pareto(points) == [(1, 5), (2, 7), (4, 9)]
    assert pareto([]) == []


def test_other_position_biases_are_remarked_on():
    assert caution(dict(type='CrossFormer')) is None
    assert caution(dict(position_bias='dynamic_residual')) is None
    for bias in ('relative', 'absolute', 'none'):
        assert f"position_bias is '{bias}'" in caution(dict(position_bias=bias))
