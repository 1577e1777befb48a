"""Scripts for several GPUs and for Slurm; test_ranks.py starts some of them."""

import subprocess

import pytest

from ..helpers import DEMO_DETECTOR, ROOT


@pytest.mark.parametrize(
    'script, arguments, said',
    [
        ('dist_train.sh', DEMO_DETECTOR, 'usage: '),
        ('dist_test.sh', f'{DEMO_DETECTOR} x.pth', 'usage: '),
        ('dist_train.sh', f'{DEMO_DETECTOR} two', 'error: GPUS must be a whole number of at least'),
        ('dist_test.sh', f'{DEMO_DETECTOR} x.pth 0', 'error: GPUS must be a whole number of at'),
    ],
)
def test_scripts_check_their_arguments(script, arguments, said):
    command = [ROOT / 'tools' / script, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(said)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize('task, last', [('train', '--work-dir x'), ('test', 'x')])
def test_a_slurm_job_is_asked_for_as_it_is_with_mmdetection(tmp_path, task, last):
    """Partition and name; GPUs, also of several machines; a user's options; the tool."""
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    said = subprocess.run(
        [ROOT / f'tools/slurm_{task}.sh', 'gpu', 'mine', DEMO_DETECTOR, 'x', '--tensorboard'],
        capture_output=True,
        text=True,
        check=True,
        env=dict(PATH=f'{tmp_path}:/bin:/usr/bin', GPUS='16', SRUN_ARGS='--quiet --time=9'),
    ).stdout
    options, _, tool = said.partition(' python ')
    asked = '-p gpu', '--job-name=mine', '--gres=gpu:8', '--ntasks=16', '--quiet --time=9'
    assert all(option in options for option in asked)
    assert f'tools/{task}.py {DEMO_DETECTOR} {last} ' in tool
    assert '--launcher slurm' in tool and '--tensorboard' in tool
