"""Folders of checkpoints: where they are written, which one is resumed, which is never replaced."""

import os
import re
import shutil
from pathlib import Path

import pytest
from mmengine.config import Config

from crossformer_mm import checkpoint as reading
from crossformer_mm.engine.config import name_of_config

from ..helpers import NO_VALIDATION, ROOT, run_tool
from ..trainings import ONE_STAGE, write_config


def trained_by(path: Path, data: Path, **changes) -> Path:
    config = write_config(ONE_STAGE, path, data, **NO_VALIDATION, **changes)
    assert run_tool('train.py', config, '--work-dir', path.parent / 'work') == 0
    return config


@pytest.fixture(scope='module')
def elsewhere(data, tmp_path_factory):
    """A training of two epochs that keeps its checkpoints in another folder, by another name: its
    configuration, its work folder and the folder of checkpoints."""
    folder = tmp_path_factory.mktemp('elsewhere')
    config = trained_by(
        folder / 'with_out_dir.py',
        data,
        default_hooks=dict(
            checkpoint=dict(
                out_dir=str(folder / 'kept'), max_keep_ckpts=-1, filename_tmpl='after_{}.pth'
            )
        ),
    )
    return config, folder / 'work', folder / 'kept' / 'work'


@pytest.fixture(scope='module')
def by_iteration(data, tmp_path_factory):
    """A training of two epochs of two iterations, with a checkpoint after each iteration: its
    configuration and its work folder."""
    folder = tmp_path_factory.mktemp('by_iteration')
    config = trained_by(
        folder / 'by_iteration.py',
        data,
        default_hooks=dict(checkpoint=dict(by_epoch=False, interval=1, max_keep_ckpts=-1)),
    )
    return config, folder / 'work'


def epochs_of(output: str) -> list:
    """The epochs that a training says it did."""
    return sorted(set(map(int, re.findall(r'Epoch\(train\) +\[(\d+)\]', output))))


def test_checkpoints_are_written_where_the_config_says(elsewhere):
    _, work, kept = elsewhere
    assert sorted(path.name for path in kept.iterdir()) == ['after_1.pth', 'after_2.pth']
    assert not list(work.glob('*.pth'))


def test_resuming_takes_the_highest_number_and_says_what_has_changed(
    output_of, elsewhere, monkeypatch
):
    config, work, kept = elsewhere
    for name, time in (('after_1.pth', 2e9), ('after_2.pth', 1e9)):  # as a copy may leave them
        os.utime(kept / name, (time, time))
    read, read_bytes, read_plain = [], Path.read_bytes, reading.read_plain
    monkeypatch.setattr(Path, 'read_bytes', lambda file: read.append(file) or read_bytes(file))
    monkeypatch.setattr(
        reading,
        'read_plain',
        lambda file, *options: read.append(file) or read_plain(file, *options),
    )
    said = output_of(
        'train.py',
        f'{config} --work-dir {work} --resume --cfg-options train_cfg.max_epochs=3',
        'train_dataloader.batch_size=4',
    )
    assert epochs_of(said) == [3]
    read = [file for file in read if getattr(file, 'suffix', '.pth') == '.pth']
    assert read == [kept / 'after_2.pth']  # once, to see that it is whole and to load it
    assert 'random weights' not in said
    assert 'with 2 images each' in said and 'with 4' in said
    assert 'set train_dataloader.batch_size=2' in said
    (kept / 'after_3.pth').unlink()


def test_checkpoints_of_another_config_are_not_replaced(output_of, elsewhere, data, tmp_path):
    config, _, kept = elsewhere
    before = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    other = tmp_path / 'other.py'
    other.write_text(f'_base_ = {str(config)!r}\n')
    said = output_of('train.py', other, '--work-dir', elsewhere[1], expect=2)
    assert said.strip().splitlines()[-1] == (
        f"error: '{kept}' has checkpoints of 'with_out_dir', which a training of 'other' would "
        'replace: give it a folder of its own with --work-dir.'
    )
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
    [
        'mask_rcnn/cf_s_1x.py',
        'demo/mask_rcnn_shapes.py',
        'demo/upernet_shapes.py',
        'retinanet/cf_s_1x.py',
    ],
)
def test_a_config_without_test_time_augmentation_does_not_name_it(config):
    cfg = Config.fromfile(ROOT / 'configs' / config)
    for name in ('tta_model', 'tta_pipeline'):  # MMDetection's test.py looks whether they are there
        assert name not in cfg or cfg[name] is not None


def test_a_test_leaves_the_config_of_the_training_as_it_is(output_of, elsewhere):
    config, work, kept = elsewhere
    before = (work / config.name).read_bytes()
    output_of('test.py', config, kept / 'after_2.pth', '--work-dir', work)
    assert (work / config.name).read_bytes() == before
    assert (work / 'test' / config.name).exists() and list((work / 'test').glob('2*/*.json'))


# Checkpoints by iterations in a loop of epochs


def test_with_another_total_batch_nothing_amid_an_epoch_can_be_resumed(
    output_of, by_iteration, tmp_path
):
    config, work = by_iteration
    assert len(list(work.glob('iter_*.pth'))) == 4
    for name in ('iter_1.pth', 'iter_2.pth', 'iter_3.pth'):
        shutil.copy(work / name, tmp_path)
    run = f'{config} --work-dir {tmp_path}'
    other = '--cfg-options train_dataloader.batch_size=1 train_cfg.max_epochs=1'
    said = output_of('train.py', f'{run} --resume {tmp_path}/iter_3.pth {other}', expect=2)
    last = said.strip().splitlines()[-1]
    assert str(tmp_path / 'iter_3.pth') in last and 'epoch 2, after iteration 3' in last
    assert 'set train_dataloader.batch_size=2' in last
    said = output_of('train.py', f'{run} --resume {other}')
    assert f"Checkpoint '{tmp_path / 'iter_3.pth'}' was written mid-epoch" in said
    assert epochs_of(said) == []  # iter_2.pth is the end of the only epoch


def test_the_newest_is_taken_amid_an_epoch(output_of, by_iteration, tmp_path):
    config, work = by_iteration
    for name in ('iter_1.pth', 'iter_2.pth', 'iter_3.pth'):
        shutil.copy(work / name, tmp_path)
    said = output_of('train.py', config, '--work-dir', tmp_path, '--resume')
    assert re.findall(r'Epoch\(train\) +(\S+)', said) == ['[2][2/2]']
    meta = reading.read_checkpoint(str(tmp_path / 'iter_4.pth'))['meta']
    assert meta['iter'] == 4


def test_a_training_that_is_done_does_not_go_on(output_of, by_iteration):
    config, work = by_iteration
    said = output_of('train.py', config, '--work-dir', work, '--resume')
    assert epochs_of(said) == []
    assert len(list(work.glob('iter_*.pth'))) == 4
