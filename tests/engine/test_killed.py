"""A training that is killed goes on as if it had not been; a full disk costs nothing but time."""

import os
import re
import select
import zipfile
from pathlib import Path

import pytest
import torch

from crossformer_mm.checkpoint import read_checkpoint
from crossformer_mm.engine import runner
from crossformer_mm.engine.newest_checkpoint import read_undamaged

from ..helpers import NO_VALIDATION
from ..trainings import (
    DETECTOR,
    ONE_STAGE,
    SEGMENTOR,
    assert_same_training,
    make_data,
    train,
    write_config,
)


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp('data') / 'shapes')


@pytest.mark.parametrize(
    'kind, checkpoints, before_first, after_first',
    [
        (
            DETECTOR,
            ['epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth'],
            r'Epoch\(train\) +\[1\]',
            r'Epoch\(train\) +\[2\]\[1/3\]',
        ),
        (
            SEGMENTOR,
            ['iter_3.pth', 'iter_6.pth', 'iter_11.pth'],
            r'Iter\(train\) +\[ *[12]/',
            r'Iter\(train\) +\[ *5/',
        ),
    ],
    ids=['detector', 'segmentor'],
)
def test_a_killed_training_ends_with_the_same_weights(
    data, tmp_path, kind, checkpoints, before_first, after_first
):
    first, second, last = checkpoints
    config = write_config(kind, tmp_path / 'config.py', data)
    reference, work = tmp_path / 'reference', tmp_path / 'work'
    reference.mkdir()
    work.mkdir()
    process = train(reference, config)
    assert process.wait() == 0, process.output[-3000:]

    # Killed after the first checkpoint, on the way to the second.
    process = train(work, config)
    process.wait_until(lambda: re.search(after_first, process.output))
    process.kill()
    assert sorted(path.name for path in work.glob('*.pth')) == [first]

    # Killed while it writes the second: a pipe in the file's place makes it wait there.
    part = work / f'{second}.part'
    os.mkfifo(part)
    reader = os.open(part, os.O_RDONLY | os.O_NONBLOCK)
    process = train(work, config, '--resume')
    select.select([reader], [], [], 300)
    beginning = os.read(reader, 2**16)
    process.kill()
    assert beginning
    os.close(reader)
    part.unlink()
    # max_keep_ckpts is 1, and yet what there was is still there.
    assert sorted(path.name for path in work.glob('*.pth')) == [first]

    # What a kill leaves elsewhere: the beginning of a file under its last name, and in the
    # file that should say which is the newest.
    part.write_bytes(beginning)
    (work / second).write_bytes((work / first).read_bytes()[:-1000])
    (work / 'last_checkpoint').write_text(str(work / second)[:-5])
    process = train(work, config, '--resume')
    assert process.wait() == 0, process.output[-3000:]
    assert f"Checkpoint '{work / second}' is cut short or damaged" in process.output
    assert re.search(after_first, process.output)
    assert not re.search(before_first, process.output)  # nothing was done again

    assert sorted(path.name for path in work.glob('*.pth*')) == [last]
    assert_same_training(work / last, reference / last)


@pytest.mark.parametrize('full', ['epoch_1.pth', 'epoch_2.pth'])
def test_a_full_disk_is_said_and_leaves_the_previous_checkpoint(refusal_of, data, tmp_path, full):
    config = write_config(ONE_STAGE, tmp_path / 'config.py', data, **NO_VALIDATION)
    (tmp_path / f'{full}.part').symlink_to('/dev/full')
    said = refusal_of('train.py', config, '--work-dir', tmp_path)
    first, second = tmp_path / 'epoch_1.pth', tmp_path / 'epoch_2.pth'
    if full == second.name:
        assert read_checkpoint(str(first))['meta']['epoch'] == 1
        assert f"'{first}' with --resume" in said
    else:
        assert not first.exists()
        assert '--resume' not in said
    assert f"'{tmp_path / full}'" in said and 'No space left on device' in said
    assert not second.exists()


def read_so_far() -> int:
    """Bytes that this process has asked files for, be they on the disk or in the page cache."""
    return int(Path('/proc/self/io').read_text().split()[1])


@pytest.mark.parametrize('main', [True, False], ids=['first process', 'another'])
def test_each_process_reads_a_checkpoint_once(output_of, data, tmp_path, monkeypatch, main):
    config = write_config(ONE_STAGE, tmp_path / 'config.py', data, **NO_VALIDATION)
    last = tmp_path / 'epoch_2.pth'
    output_of('train.py', config, '--work-dir', tmp_path, folder=tmp_path)
    if not main:  # which is told by the first what to load
        monkeypatch.setattr(runner, 'is_main_process', lambda: False)
        monkeypatch.setattr(
            runner, 'broadcast_object_list', lambda found: found.__setitem__(0, str(last))
        )
    read = []
    size = 2**26  # larger than all else
    for padding in (0, size):
        torch.save({**read_checkpoint(str(last)), 'padding': torch.ones(padding // 4)}, last)
        before = read_so_far()
        output_of('train.py', config, '--work-dir', tmp_path, '--resume', folder=tmp_path)
        read.append(read_so_far() - before)
    assert (read[1] - read[0]) / size == pytest.approx(1, abs=0.1)


def test_a_checkpoint_is_whole_or_nothing(tmp_path):
    file = tmp_path / 'epoch_1.pth'
    content = dict(weights=torch.arange(1000.0), more=torch.ones(7, 9), epoch=1)
    torch.save(content, file)
    torch.testing.assert_close(read_undamaged(str(file)), content, rtol=0, atol=0)
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as parts:
        beginnings = [part.header_offset for part in parts.infolist() if part.file_size > 100]
    assert len(beginnings) >= 3  # what is pickled, and the two tensors
    damaged = [b'', whole[:-100]]
    for beginning in beginnings:
        place = (
            beginning // 64 + 3
        ) * 64  # somewhere among its data, which begin on a multiple of 64
        damaged.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    for content in damaged:
        file.write_bytes(content)
        assert read_undamaged(str(file)) is None


@pytest.mark.parametrize('tool', ['train.py', 'test.py'])
def test_a_folder_that_cannot_be_written_is_refused(refusal_of, data, tmp_path, tool):
    config = write_config(ONE_STAGE, tmp_path / 'config.py', data)
    weights = config if tool == 'test.py' else ''
    folder = '/proc/none'  # where not even root may write
    said = refusal_of(tool, f'{config} {weights} --work-dir {folder}')
    assert said.startswith(f"--work-dir: '{folder}' cannot be written: ")
