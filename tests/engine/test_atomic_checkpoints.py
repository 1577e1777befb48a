"""Folders of checkpoints: where they are written, which one is resumed, which is never replaced."""

import os
import re
from pathlib import Path

import pytest
from mmengine.config import Config

from crossformer_mm.engine.config import name_of_config

from ..helpers import DEMO_DETECTOR, DEMO_SEGMENTOR, NO_VALIDATION, ROOT, run_tool
from ..trainings import ONE_STAGE, write_config


def trained(folder: Path, data: Path, **checkpoint) -> tuple:
    """Train two epochs of two iterations, with settings of CheckpointHook; the configuration and
    the work folder."""
    hooks = dict(checkpoint=dict(max_keep_ckpts=-1, **checkpoint))
    path, work = folder / 'mine.py', folder / 'work'
    config = write_config(ONE_STAGE, path, data, default_hooks=hooks, **NO_VALIDATION)
    assert run_tool('train.py', config, '--work-dir', work) == 0
    return config, work


@pytest.fixture(scope='module')
def elsewhere(data, tmp_path_factory):
    """A training that keeps its checkpoints in another folder, which comes last, by another name."""
    folder = tmp_path_factory.mktemp('elsewhere')
    names = dict(out_dir=str(folder / 'kept'), filename_tmpl='after_{}.pth')
    return *trained(folder, data, **names), folder / 'kept' / 'work'


def epochs_of(output: str) -> list:
    """The epochs that a training says it did."""
    return sorted(set(map(int, re.findall(r'Epoch\(train\) +\[(\d+)\]', output))))


def test_checkpoints_are_written_where_the_config_says(elsewhere):
    _, work, kept = elsewhere
    assert sorted(path.name for path in kept.iterdir()) == ['after_1.pth', 'after_2.pth']
    assert not list(work.glob('*.pth'))


def test_resuming_takes_the_highest_number_and_says_what_has_changed(output_of, elsewhere):
    config, work, kept = elsewhere
    for name, time in (('after_1.pth', 2e9), ('after_2.pth', 1e9)):  # as a copy may leave them
        os.utime(kept / name, (time, time))
    changes = '--cfg-options train_cfg.max_epochs=3 train_dataloader.batch_size=4'
    said = output_of('train.py', f'{config} --work-dir {work} --resume {changes}')
    assert epochs_of(said) == [3]
    assert 'random weights' not in said
    assert 'with 2 images each' in said and 'with 4' in said
    assert 'set train_dataloader.batch_size=2' in said
    (kept / 'after_3.pth').unlink()


def test_checkpoints_of_another_config_are_not_replaced(refusal_of, elsewhere, tmp_path):
    config, work, kept = elsewhere
    before = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    other = tmp_path / 'other.py'
    other.write_text(f'_base_ = {str(config)!r}\n')
    said = refusal_of('train.py', other, '--work-dir', work)
    assert f"'{kept}' has checkpoints of 'mine', which a training of 'other' would replace" in said
    assert '--work-dir' in said
    assert before == {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}


def test_no_two_configs_have_the_same_work_folder():
    files = [file for file in (ROOT / 'configs').rglob('*.py') if '_base_' not in file.parts]
    names = [name_of_config(str(file)) for file in files]
    assert len(set(names)) == len(files) > 40
    assert name_of_config(str(ROOT / 'configs/retinanet/cf_s_1x.py')) == 'retinanet/cf_s_1x'
    # Not a folder that the name of a config of the user's happens to be below.
    assert name_of_config('/data/my.py') == 'my'


@pytest.mark.parametrize(
    'config',
    [DEMO_DETECTOR, DEMO_SEGMENTOR, 'configs/mask_rcnn/cf_s_1x.py', 'configs/retinanet/cf_s_1x.py'],
)
def test_a_config_without_test_time_augmentation_does_not_name_it(config):
    cfg = Config.fromfile(ROOT / config)
    for name in ('tta_model', 'tta_pipeline'):  # MMDetection's test.py looks whether they are there
        assert name not in cfg or cfg[name] is not None


def test_a_test_leaves_the_config_of_the_training_as_it_is(output_of, elsewhere):
    config, work, kept = elsewhere
    before = (work / config.name).read_bytes()
    output_of('test.py', config, kept / 'after_2.pth', '--work-dir', work)
    assert (work / config.name).read_bytes() == before
    assert (work / 'test' / config.name).exists() and list((work / 'test').glob('2*/*.json'))


def test_another_total_batch_resumes_nothing_mid_epoch(output_of, refusal_of, data, tmp_path):
    config, work = trained(tmp_path, data, by_epoch=False, interval=1)
    (work / 'iter_4.pth').unlink()
    run, newest = f'{config} --work-dir {work} --resume', work / 'iter_3.pth'
    other = '--cfg-options train_dataloader.batch_size=1 train_cfg.max_epochs=1'
    said = refusal_of('train.py', f'{run} {newest} {other}')
    assert str(newest) in said and 'epoch 2, after iteration 3' in said
    assert 'an epoch had 2 iterations and now has 4' in said
    assert 'set train_dataloader.batch_size=2' in said
    said = output_of('train.py', f'{run} {other}')
    assert f"Checkpoint '{newest}' was written mid-epoch" in said
    assert epochs_of(said) == []  # iter_2.pth is the end of the only epoch
