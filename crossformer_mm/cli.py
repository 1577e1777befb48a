"""Parts that commands share: argument parsers, reading a config by them, and how a command ends.

Besides the commands, only this module ends a process and prints ``error: ...``.
"""

import argparse
import logging
import os
import sys
import traceback
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, NoReturn

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.dist import get_world_size, is_distributed
from mmengine.logging import print_log

from .checkpoint import use_safe_loading
from .engine.config import (
    ensure_visualizer,
    load_config,
    name_of_config,
    prepare_for_cpu,
    replace_data_root,
)
from .errors import UserError, is_users_code

# Variable that each launcher sets in the processes that it starts.
LAUNCHERS = {'pytorch': 'RANK', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI_COMM_WORLD_LOCAL_RANK'}


# Arguments


class KeyValues(DictAction):
    """Parse ``KEY=VALUE ...``; anything else is an error of the parser."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for pair in values:
            key, separator, _ = pair.partition('=')
            if not separator or not all(key.split('.')):
                parser.error(f"{option_string}: '{pair}' is not of the form KEY=VALUE.")
        try:
            super().__call__(parser, namespace, values, option_string)
        except (ValueError, AssertionError) as error:
            parser.error(f'{option_string}: {error}.')


def add_cfg_options(parser: argparse.ArgumentParser, such_as: str = '') -> None:
    """Add the option ``--cfg-options``, whose help text ends in ``such_as``."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=KeyValues,
        metavar='KEY=VALUE',
        help=f'settings that replace those of the config{such_as}',
    )


def argument_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the arguments that training and testing share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--work-dir',
        help='folder for logs and checkpoints '
        '(default: work_dirs/ and the path of the config below configs/)',
    )
    parser.add_argument('--data-root', help="the dataset's folder, instead of the config's")
    parser.add_argument('--tensorboard', action='store_true', help='also log to TensorBoard')
    add_cfg_options(parser, ', such as train_dataloader.batch_size=4 model.backbone.with_cp=True')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes of a distributed job were started',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def read_config(args: argparse.Namespace) -> Config:
    """Read the config that the arguments of :func:`argument_parser` name, and apply them to it.
    Raise a UserError if the config or an argument cannot work."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = load_config(args.config, args.cfg_options, scopes=None)
    variable = LAUNCHERS.get(args.launcher)
    if variable and variable not in os.environ:
        raise UserError(
            f'--launcher {args.launcher}: {variable} is not set, this is no process of such a job; '
            'tools/dist_train.sh and tools/dist_test.sh start one.'
        )
    cfg.launcher = args.launcher
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif not cfg.get('work_dir'):
        cfg.work_dir = str(Path('work_dirs', name_of_config(args.config) or ''))
    if args.tensorboard:
        if find_spec('tensorboard') is None:
            raise UserError('--tensorboard needs the package tensorboard, which is not installed.')
        ensure_visualizer(cfg).vis_backends = [
            *(cfg.visualizer.get('vis_backends') or []),
            dict(type='TensorboardVisBackend'),
        ]
    for name in ('custom_hooks', 'auto_scale_lr'):
        if name in cfg and cfg[name] is None:
            cfg.pop(name)
    if get_device() == 'cpu':
        prepare_for_cpu(cfg)
    if args.data_root:
        replace_data_root(cfg, args.data_root)
    use_safe_loading()
    return cfg


# The end of a command


def run(main: Callable) -> None:
    """Run a command and end the process as it ended.

    A :class:`~crossformer_mm.errors.UserError` is printed as ``error: ...`` and gives status 2. If
    the user's own code caused it, the traceback is printed before it and logged. Any other error
    keeps its traceback and gives status 1. One process of a distributed job that fails ends at
    once, without waiting for the others.

    Args:
        main (Callable): the command, without arguments.
    """
    # Torchvision warns at import if it cannot load images; nothing here loads them with it.
    warnings.filterwarnings('ignore', 'Failed to load image Python extension')
    try:
        main()
    except UserError as error:
        if error.__cause__ is not None and is_users_code(error):
            print_log(
                ''.join(traceback.format_exception(type(error), error, error.__traceback__)),
                'current',
                logging.ERROR,
            )
            traceback.print_exc()
        exit_process(2, f'error: {error}')
    except SystemExit as stopped:
        exit_process(stopped.code)
    except Exception:
        exit_process(1, traceback.format_exc().rstrip())
    if is_distributed():
        # A process that ends with its group alive may be aborted, its work done.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def exit_process(status, message: str = '') -> NoReturn:
    """End the process with a status and a last message on stderr."""
    sys.stdout.flush()
    if message:
        print(message, file=sys.stderr, flush=True)
    if is_distributed() and get_world_size() > 1:
        # sys.exit would wait for threads that wait for the other processes.
        os._exit(status if isinstance(status, int) else int(status is not None))
    sys.exit(status)
