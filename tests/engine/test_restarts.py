"""Jobs of two processes that are preempted, that lose a process, or that go on with another number."""

import hashlib
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.distributed import run as torchrun
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from crossformer_mm.checkpoint import read_checkpoint
from crossformer_mm.engine.preemption import SIGNALS

from ..helpers import run_in_process, run_tool, run_two, start_two
from ..trainings import assert_same_training, make_data
from .test_ranks import comparable, started

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason='compares processes without a GPU'
)

# Six iterations in an epoch; images that two processes share are those of one with twice the batch.
EPOCHS = '''
train_cfg = dict(_delete_=True, by_epoch=True, max_epochs=2, val_interval=9)
train_dataloader['sampler'] = dict(type='DefaultSampler', shuffle=True)
default_hooks['checkpoint'] = dict(type='CheckpointHook', by_epoch=False, interval=1,
                                   max_keep_ckpts=-1)
log_processor = dict(by_epoch=True)
randomness = dict(seed=0)
optim_wrapper['optimizer']['lr'] = 0.01
custom_imports = dict(imports=['crossformer_mm', 'tests.engine.test_restarts',
                               'tests.engine.test_preemption', 'tests.engine.test_nonfinite'])
custom_hooks = [dict(type='mmengine.RecordsBatches', folder=FOLDER), *HOOKS]
'''


@HOOKS.register_module(force=True)
class RecordsBatches(Hook):
    """Notes the images of each iteration, as they are augmented."""

    def __init__(self, folder: str):
        self.folder = folder

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        with open(f'{self.folder}/record{runner.rank}', 'a') as file:
            for image, sample in zip(data_batch['inputs'], data_batch['data_samples']):
                digest = hashlib.md5(image.numpy().tobytes()).hexdigest()
                print(runner.iter, Path(sample.img_path).name, digest, file=file)


def batches(folder: Path) -> list:
    """The images of each iteration, of all processes."""
    lines = ''.join(file.read_text() for file in folder.glob('record*')).splitlines()
    return sorted((int(line.split()[0]), *line.split()[1:]) for line in lines)


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp('data') / 'shapes', train=24, val=2)


@pytest.fixture(scope='module')
def start(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('start')
    return started(write(folder, data), folder / 'start.pth')


def write(folder: Path, data: Path, batch: int = 2, hooks=()) -> Path:
    folder.mkdir(exist_ok=True)
    more = f'FOLDER, HOOKS = {str(folder)!r}, {list(hooks)}\n{EPOCHS}'
    return comparable(folder / 'config.py', data, batch=batch, more=more)


def options(work: Path, start: Path) -> list:
    return ['--work-dir', work, '--cfg-options', f'load_from={start}']


@pytest.fixture(scope='module')
def undisturbed(data, start, tmp_path_factory) -> Path:
    """Work folder of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp('undisturbed')
    config = write(folder, data)
    run_two(folder / 'log', 'tools/train.py', config, *options(folder / 'work', start))
    return folder / 'work'


def test_all_processes_end_with_the_iteration_of_a_signal(data, start, undisturbed, tmp_path):
    hook = dict(type='mmengine.SignalsItself', at=3, name='SIGUSR1', rank=1)
    config, work = write(tmp_path, data, hooks=[hook]), tmp_path / 'work'
    processes = start_two(tmp_path / 'log', 'tools/train.py', config, *options(work, start))
    assert [process.wait() for process in processes] == [75, 75], processes[1].output[-3000:]
    assert 'SIGUSR1: the training ends after iteration 4' in processes[0].output
    assert_same_training(work / 'iter_4.pth', undisturbed / 'iter_4.pth')
    assert not (work / 'iter_5.pth').exists()


def test_all_processes_stop_at_the_iteration_in_which_one_has_no_finite_loss(data, start, tmp_path):
    hook = dict(type='mmengine.Breaks', at=3, what='loss', rank=1)
    config, work = write(tmp_path, data, hooks=[hook]), tmp_path / 'work'
    processes = start_two(tmp_path / 'log', 'tools/train.py', config, *options(work, start))
    assert [process.wait() for process in processes] == [2, 2], processes[1].output[-3000:]
    first, second = (process.output.strip().splitlines()[-1] for process in processes)
    assert first == second and first.startswith('error: Iteration 4: ')
    assert len(re.findall(r'[\w/]+\.jpg|[\w/]+\.png', first)) == 2  # those of one process
    assert sorted(path.name for path in work.glob('*.pth')) == [f'iter_{n}.pth' for n in (1, 2, 3)]


def test_another_number_of_processes_with_the_same_total_batch_goes_on(data, undisturbed, tmp_path):
    """Two processes, then one, then two."""
    work = tmp_path / 'work'
    work.mkdir()
    shutil.copy(undisturbed / 'iter_3.pth', work)
    hook = dict(type='mmengine.SignalsItself', at=7)
    config = write(tmp_path / 'one', data, batch=4, hooks=[hook])
    assert run_tool('train.py', config, '--work-dir', work, '--resume') == 75
    config = write(tmp_path / 'two', data)
    run_two(tmp_path / 'log', 'tools/train.py', config, '--work-dir', work, '--resume')

    checkpoints = [read_checkpoint(str(folder / 'iter_12.pth')) for folder in (undisturbed, work)]
    logs = (checkpoint['message_hub']['log_scalars']['train/loss'] for checkpoint in checkpoints)
    reference, losses = (list(log._log_history)[-12:] for log in logs)
    assert len(losses) == 12 and losses[:3] == reference[:3]
    expected, weights = (checkpoint['state_dict'] for checkpoint in checkpoints)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
    # Those of two processes in one iteration come in any order.
    both = batches(undisturbed.parent)
    assert len(both) == 48
    assert batches(tmp_path / 'one') == both[12:32]
    assert batches(tmp_path / 'two') == both[32:]


def test_a_total_batch_that_differs_is_told(output_of, data, undisturbed, tmp_path):
    config = write(tmp_path, data, batch=2)  # of one process
    options = f'--work-dir {tmp_path}/work --resume {undisturbed}/iter_6.pth'
    said = output_of('train.py', f'{config} {options} --cfg-options train_cfg.max_epochs=1')
    assert 'train_dataloader.batch_size=4' in said


def work_of(notes: str, log: str, *command: str) -> None:
    """Run a tool in a process that torchrun starts; leave a note of the attempt."""
    Path(notes, os.environ['TORCHELASTIC_RESTART_COUNT']).touch()
    run_in_process(log, {}, *command)


def test_a_job_that_loses_a_process_three_times_ends_as_if_nothing_had_happened(
    monkeypatch, data, start, undisturbed, tmp_path
):
    monkeypatch.setenv('TORCH_DISABLE_SHARE_RDZV_TCP_STORE', '1')  # as tools/dist_train.sh does
    kills = [
        dict(attempt=0, at=2, rank=1),
        dict(attempt=1, at=5, when='save'),
        dict(attempt=2, at=8, rank=1),
    ]
    hooks = [dict(type='mmengine.SignalsItself', name='SIGKILL', **kill) for kill in kills]
    config, work, notes = write(tmp_path, data, hooks=hooks), tmp_path / 'work', tmp_path / 'notes'
    notes.mkdir()
    work.mkdir()
    (tmp_path / 'log').touch()
    # The folder has checkpoints of an earlier, longer training, which is not to be resumed.
    shutil.copy(undisturbed / 'iter_12.pth', work / 'iter_12.pth')
    nodes = dict(min_nodes=1, max_nodes=1, nproc_per_node=2)
    meeting = dict(run_id='none', rdzv_backend='c10d', rdzv_endpoint='127.0.0.1:0')
    tries = dict(max_restarts=3, monitor_interval=0.1)
    agent = LaunchConfig(**nodes, **meeting, **tries, start_method='forkserver')
    command = ['tools/train.py', config, '--launcher', 'pytorch', *options(work, start)]
    elastic_launch(agent, work_of)(str(notes), str(tmp_path / 'log'), *map(str, command))
    assert sorted(note.name for note in notes.iterdir()) == ['0', '1', '2', '3']
    assert_same_training(work / 'iter_12.pth', undisturbed / 'iter_12.pth')


# The scripts


@pytest.fixture
def commands(tmp_path) -> dict:
    """Variables with which srun and scontrol, or Python, note how they were called."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    for name in ('srun', 'scontrol', 'python'):
        (folder / name).write_text(
            f'#!/usr/bin/env bash\necho "{name} $*" >> {tmp_path}/called\n'
            f'if [ {name} != scontrol ]; then exit ${{STATUS:-75}}; fi\n'
        )
        (folder / name).chmod(0o755)
    return dict(PATH=f"{folder}:{os.environ['PATH']}", VIRTUAL_ENV='x', PYTHON='')


@pytest.mark.parametrize('name', ['SIGUSR1', 'SIGUSR2'])
def test_a_signal_to_a_slurm_job_leaves_the_script_to_requeue_it(script, commands, tmp_path, name):
    (tmp_path / 'bin' / 'srun').write_text(f'#!/bin/sh\nkill -{name[3:]} $PPID\nexit 75\n')
    slurm = dict(REQUEUE='1', SLURM_JOB_ID='17')
    arguments = 'gpu name config.py work --amp --signals=SIGUSR2'
    job = script('slurm_train.sh', arguments, **commands, **slurm)
    assert job.wait(60) == 75
    assert (tmp_path / 'called').read_text() == 'scontrol requeue 17\n'


@pytest.mark.parametrize(
    'status, requeue, count, expected',
    [
        ('75', '1', '', 'scontrol requeue 17'),
        ('75', '1', '2', 'scontrol requeue 17'),
        ('75', '', '', None),
        ('1', '1', '', None),
        ('0', '1', '', None),
    ],
)
def test_a_preempted_slurm_job_is_requeued(
    script, commands, tmp_path, status, requeue, count, expected
):
    slurm = dict(STATUS=status, REQUEUE=requeue, SLURM_JOB_ID='17', SLURM_RESTART_COUNT=count)
    job = script('slurm_train.sh', 'gpu name config.py work --amp', **commands, **slurm)
    assert job.wait(60) == int(status)
    first, *rest = (tmp_path / 'called').read_text().splitlines()
    assert first.startswith('srun ') and first.endswith('--resume' if count else '--amp')
    assert rest == ([expected] if expected else [])


def test_requeueing_needs_a_batch_job(script, commands):
    slurm = dict(REQUEUE='1', SLURM_JOB_ID='')
    job = script('slurm_train.sh', 'gpu name config.py work', **commands, **slurm)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2 and 'error: REQUEUE needs a batch job' in output


@pytest.mark.parametrize('name', [*SIGNALS, 'SIGUSR2', 'SIGINT'])
def test_the_script_passes_a_signal_on_and_ends_as_resumable(script, commands, tmp_path, name):
    python = tmp_path / 'bin' / 'python'
    python.write_text(
        '#!/usr/bin/env bash\n'
        f'echo "$@" > {tmp_path}/arguments\n'
        f"trap 'echo passed on >> {tmp_path}/called; exit 1' TERM\n"
        f'echo started >> {tmp_path}/called\nwhile true; do sleep 0.05; done\n'
    )
    called = tmp_path / 'called'
    further = [] if name in SIGNALS else ['--signals', 'SIGHUP', name, '--amp']
    job = script('dist_train.sh', ' '.join(['config.py 2', *further]), **commands)
    while not called.exists():
        time.sleep(0.01)
    job.send_signal(signal.Signals[name])
    assert job.wait(60) == 75
    assert called.read_text().split('\n')[:2] == ['started', 'passed on']
    # Torchrun's own parser takes the rest as options of train.py.
    _, _, *given = (tmp_path / 'arguments').read_text().split()
    assert torchrun.parse_args(given).training_script_args[3:] == further
