"""Status and last line of a command that ends early."""

import argparse

import pytest
from mmengine.config import Config

from crossformer_mm import cli
from crossformer_mm.checkpoint import CheckpointError
from crossformer_mm.cli import run
from crossformer_mm.engine import mixed_precision
from crossformer_mm.engine.config import load_config
from crossformer_mm.engine.preflight import check_file
from crossformer_mm.errors import ConfigError, DataError, UserError
from crossformer_mm.files import check_writable, write_whole

from .helpers import DEMO_DETECTOR, ROOT


def ended(main, capsys) -> tuple:
    """Status and stderr of a command that ends early."""
    with pytest.raises(SystemExit) as stopped:
        run(main)
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize('kind', [UserError, ConfigError, DataError, CheckpointError])
def test_a_mistake_of_the_user_is_one_line_and_status_2(capsys, kind):
    def main():
        raise kind('--out: it cannot be.')

    assert ended(main, capsys) == (2, 'error: --out: it cannot be.\n')


def test_any_other_error_keeps_its_traceback_and_is_status_1(capsys):
    def main():
        raise ValueError('unexpected')

    status, said = ended(main, capsys)
    assert status == 1 and 'in main' in said and said.endswith('ValueError: unexpected\n')


def test_an_error_that_the_users_code_caused_shows_where(capsys):
    def main():
        try:
            raise KeyError('theirs')
        except KeyError as error:
            raise ConfigError('The model cannot be built.') from error

    status, said = ended(main, capsys)
    assert status == 2 and "KeyError: 'theirs'" in said
    assert said.endswith('error: The model cannot be built.\n')


@pytest.mark.parametrize(
    'call',
    [
        lambda file: load_config(str(file / 'none.py')),
        lambda file: check_file('--option', f'{file}.pth'),
        lambda file: check_writable('--option', file / 'inside'),
        lambda file: write_whole(file / 'inside', b''),
    ],
)
def test_a_library_raises_and_never_ends_the_process(tmp_path, call):
    file = tmp_path / 'file'
    file.write_text('')
    with pytest.raises(UserError):
        call(file)


@pytest.mark.parametrize('device, said', [('cpu', True), ('npu', False), ('mlu', False)])
def test_other_accelerators_are_not_taken_for_a_cpu(monkeypatch, device, said):
    monkeypatch.setattr(mixed_precision, 'get_device', lambda: device)
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper')))
    if said:
        with pytest.raises(UserError, match='--amp needs a GPU'):
            mixed_precision.use_mixed_precision(cfg, 'float16')
    else:
        mixed_precision.use_mixed_precision(cfg, 'float16')
        assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    monkeypatch.setattr(cli, 'get_device', lambda: device)
    options = dict(launcher='none', local_rank=0, work_dir='x', tensorboard=False, data_root=None)
    monkeypatch.chdir(ROOT)
    cfg = cli.read_config(argparse.Namespace(config=DEMO_DETECTOR, cfg_options={}, **options))
    assert (cfg.train_dataloader.get('pin_memory') is False) == (device == 'cpu')
