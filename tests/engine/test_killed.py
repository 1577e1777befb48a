"""A training that is killed goes on as if it had not been; a full disk costs nothing but time."""

import os
import re
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


@pytest.fixture(scope='module', params=[DETECTOR, SEGMENTOR], ids=['detector', 'segmentor'])
def uninterrupted(request, data, tmp_path_factory):
    """A kind of training, its configuration, and a work folder in which it ran to the end."""
    folder = tmp_path_factory.mktemp(request.param.name)
    config = write_config(request.param, folder / 'config.py', data)
    process = train(folder, config)
    assert process.wait() == 0, process.output[-3000:]
    return request.param, config, folder


def test_a_killed_training_ends_with_the_same_weights(uninterrupted, tmp_path):
    kind, config, reference = uninterrupted
    first, second, *_, last = kind.checkpoints

    # Killed after the first checkpoint, on the way to the second.
    process = train(tmp_path, config)
    process.wait_until(lambda: re.search(kind.after_first, process.output))
    process.kill()
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == [first]

    # Killed while it writes the second: a pipe in the file's place makes it wait there.
    part = tmp_path / f'{second}.part'
    os.mkfifo(part)
    reader = os.open(part, os.O_RDONLY | os.O_NONBLOCK)
    process = train(tmp_path, config, '--resume')
    beginning = []

    def begun():
        try:
            beginning.append(os.read(reader, 2**16))
        except BlockingIOError:
            return False
        return any(beginning)

    process.wait_until(begun)
    process.kill()
    os.close(reader)
    part.unlink()
    # max_keep_ckpts is 1, and yet what there was is still there.
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == [first]

    # What a kill leaves elsewhere: the beginning of a file under its last name, and in the
    # file that should say which is the newest.
    part.write_bytes(b''.join(beginning))
    (tmp_path / second).write_bytes((tmp_path / first).read_bytes()[:-1000])
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / second)[:-5])
    process = train(tmp_path, config, '--resume')
    assert process.wait() == 0, process.output[-3000:]
    assert f"Checkpoint '{tmp_path / second}' is cut short or damaged" in process.output
    assert re.search(kind.after_first, process.output)
    assert not re.search(kind.before_first, process.output)  # nothing was done again

    assert sorted(path.name for path in tmp_path.glob('*.pth*')) == [last]
    assert_same_training(tmp_path / last, reference / last)


@pytest.mark.parametrize('full', ONE_STAGE.checkpoints)
def test_a_full_disk_stops_with_a_sentence_and_the_previous_checkpoint(
    refusal_of, data, tmp_path, full
):
    config = write_config(ONE_STAGE, tmp_path / 'config.py', data, **NO_VALIDATION)
    (tmp_path / f'{full}.part').symlink_to('/dev/full')
    said = refusal_of('train.py', config, '--work-dir', tmp_path)
    first, second = (tmp_path / name for name in ONE_STAGE.checkpoints)
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
    last = tmp_path / ONE_STAGE.checkpoints[-1]
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
    torch.save(dict(weights=torch.arange(1000.0), more=torch.ones(7, 9), epoch=1), file)
    content, whole = read_undamaged(str(file)), file.read_bytes()
    assert content['epoch'] == 1 and torch.equal(content['weights'], torch.arange(1000.0))
    assert torch.equal(content['more'], torch.ones(7, 9))
    with zipfile.ZipFile(file) as parts:
        beginnings = [part.header_offset for part in parts.infolist() if part.file_size > 100]
    assert len(beginnings) >= 3  # what is pickled, and the two tensors
    for beginning in beginnings:
        # Somewhere among its data, which begin on a multiple of 64.
        place = (beginning // 64 + 3) * 64
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert read_undamaged(str(file)) is None, place
    file.write_bytes(whole[:-100])
    assert read_undamaged(str(file)) is None
    file.write_bytes(b'')
    assert read_undamaged(str(file)) is None


@pytest.mark.parametrize('tool', ['train.py', 'test.py'])
def test_a_folder_that_cannot_be_written_is_refused(refusal_of, data, tmp_path, tool):
    config = write_config(ONE_STAGE, tmp_path / 'config.py', data)
    folder = '/proc/none'  # where not even root may write
    arguments = [config, *([config] if tool == 'test.py' else []), '--work-dir', folder]
    said = refusal_of(tool, *arguments)
    assert said.startswith(f"--work-dir: '{folder}' cannot be written: ")
