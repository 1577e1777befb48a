"""What commands share: arguments, reading a config, checks before long work, how they end."""

import argparse
import logging
import os
import sys
import tempfile
import traceback
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Iterable, Iterator, List, Optional

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.dist import get_world_size, is_distributed
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner, Runner

from ..checkpoint import CheckpointError, use_safe_loading
from .errors import UserError, fail, is_of_users_code, said
from .option_checks import add_cfg_options, check_keys, check_names, let_weights_be_named
from .runner import CarefulFlexibleRunner, CarefulRunner
from .whole_files import name_of_config

# The package that each default_scope needs, as a user installs it; DENSE: of dense prediction.
SCOPES = {'mmdet': 'mmdet', 'mmseg': 'mmsegmentation', 'mmpretrain': 'mmpretrain'}
DENSE = ('mmdet', 'mmseg')
# What each launcher sets in the processes that it starts.
STARTED = {'pytorch': 'RANK', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI_COMM_WORLD_LOCAL_RANK'}
# Of torchvision, which nothing here loads images with.
warnings.filterwarnings('ignore', 'Failed to load image Python extension')


@contextmanager
def sentences_for(*errors):
    """Turn errors that already say all a user needs into that sentence."""
    try:
        yield
    except errors as error:
        fail(str(error))


def argument_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--work-dir',
        help='folder for logs and checkpoints '
        '(default: work_dirs/ and the path of the config below configs/)',
    )
    parser.add_argument('--data-root', help="the dataset's folder, in place of the config's")
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


def load_config(
    file: str, options: Optional[dict] = None, scopes: Iterable[str] = tuple(SCOPES)
) -> Config:
    """A config with some settings replaced; ends the program where its package is not there.

    Args:
        file: the config.
        options: of --cfg-options.
        scopes: default_scope of the configs that a tool can use.
    """
    if not Path(file).is_file():
        fail(f"config '{file}' does not exist.")
    try:
        cfg = Config.fromfile(file)
    except Exception as error:  # a config is a program: anything can go wrong in it
        fail(f"config '{file}' could not be read: {type(error).__name__}: {error}")
    forget_scope(cfg._cfg_dict)
    if cfg.get('default_scope') is None and isinstance(cfg.get('model'), dict):
        cfg.default_scope = scope_of(cfg.model.get('type'))
    scope = cfg.get('default_scope')
    if scope not in scopes:
        fail(
            f"config '{file}' has default_scope {scope!r}, allowed are "
            f"{', '.join(map(repr, scopes))}."
        )
    if find_spec(scope) is None:
        fail(f"config '{file}' needs the package {SCOPES[scope]}, which is not installed.")
    if scope == 'mmpretrain':
        check_torchvision(file)
    if not isinstance(cfg.get('model'), dict):
        fail(f"config '{file}' has no model.")
    let_weights_be_named(cfg, options or {})
    with sentences_for(UserError):
        check_names(cfg, file)
        check_keys(cfg, options or {})
    try:
        cfg.merge_from_dict(options or {})
    except (TypeError, KeyError, IndexError) as error:
        fail(f'--cfg-options: {error}')
    return cfg


def scope_of(kind) -> Optional[str]:
    """The library that a model is of, or is derived from, in a pure Python config."""
    modules = [one.__module__.partition('.')[0] for one in getattr(kind, '__mro__', ())]
    return next((module for module in modules if module in SCOPES), None)


def check_torchvision(file: str) -> None:
    """End the program with a sentence if MMPretrain's torchvision cannot be used."""
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # of another build than torch it fails in many ways
        fail(
            f"config '{file}' needs a torchvision that fits torch {torch.__version__}, see "
            f'docs/pretraining.md; the import ends in {said(error)}.'
        )


def forget_scope(part) -> None:
    """Let what came by ``_base_ = 'crossformer_mm::...'`` be built as if from a file beside.

    MMEngine would look it all up in a registry of that name, but models, data sets and metrics are
    those of MMDetection, MMSegmentation and MMPretrain.
    """
    if isinstance(part, dict) and part.get('_scope_') == 'crossformer_mm':
        del part['_scope_']
    if isinstance(part, (dict, list, tuple)):
        for value in part.values() if isinstance(part, dict) else part:
            forget_scope(value)


def read_config(args: argparse.Namespace) -> Config:
    """The config with the arguments applied; ends the program where that cannot work."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = load_config(args.config, args.cfg_options)

    if args.launcher != 'none' and STARTED[args.launcher] not in os.environ:
        fail(
            f'--launcher {args.launcher}: {STARTED[args.launcher]} is not set, this is no process '
            'of such a job; tools/dist_train.sh and tools/dist_test.sh start one.'
        )
    cfg.launcher = args.launcher
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif not cfg.get('work_dir'):
        cfg.work_dir = str(Path('work_dirs', name_of_config(args.config) or ''))
    if args.tensorboard:
        if find_spec('tensorboard') is None:
            fail('--tensorboard needs the package tensorboard, which is not installed.')
        let_draw(cfg).vis_backends = [
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


def let_draw(cfg: Config) -> ConfigDict:
    """The config's visualizer; where it has none, its library's."""
    if not cfg.get('visualizer'):
        kind = {'mmdet': 'DetLocalVisualizer', 'mmseg': 'SegLocalVisualizer'}
        cfg.visualizer = dict(
            type=kind.get(cfg.default_scope, 'UniversalVisualizer'),
            name='visualizer',
            vis_backends=[dict(type='LocalVisBackend')],
        )
    return cfg.visualizer


def build_runner(cfg: Config) -> Runner:
    """The runner that a config names by ``runner_type``, with care, if it is one of MMEngine's."""
    named = cfg.get('runner_type') or ('FlexibleRunner' if cfg.get('strategy') else 'Runner')
    kind = RUNNERS.get(named) if isinstance(named, str) else named
    if kind is None:
        fail(f"runner_type: there is no runner '{named}'.")
    kind = {Runner: CarefulRunner, FlexibleRunner: CarefulFlexibleRunner}.get(kind, kind)
    return kind.from_cfg(cfg)


def prepare_for_cpu(cfg: Config) -> None:
    """Settle what mmengine takes for granted to be on a GPU."""
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if cfg.get(name):
            cfg[name].pin_memory = False
    if cfg.launcher != 'pytorch':
        return
    # mmengine sets a CUDA device when it starts a process group: start it here, wrap the model
    # without naming a device.
    torch.distributed.init_process_group('gloo')
    if cfg.get('strategy'):
        device = 'device_ids' if kind_of(cfg.strategy) == 'DDPStrategy' else 'device_id'
        wrapper = cfg.strategy.get('model_wrapper') or dict(
            dict(type='MMDistributedDataParallel', broadcast_buffers=False)
            if device == 'device_ids'
            else dict(type='MMFullyShardedDataParallel')
        )
        if kind_of(cfg.strategy) in ('DDPStrategy', 'FSDPStrategy'):
            cfg.strategy.model_wrapper = {**wrapper, device: None}
        return
    cfg.model_wrapper_cfg = (
        dict(
            type='MMDistributedDataParallel',
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
        | dict(cfg.get('model_wrapper_cfg') or {})
        | dict(device_ids=None)
    )


def kind_of(part: dict) -> str:
    """What a part of a config builds, by name, be it named or, in a pure Python config, given."""
    kind = part.get('type')
    return kind.rpartition('.')[2] if isinstance(kind, str) else getattr(kind, '__name__', '')


def data_sets(dataset: dict) -> Iterator[dict]:
    """The configs of the data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    if 'dataset' in dataset:
        yield from data_sets(dataset['dataset'])
    elif 'datasets' in dataset:
        for one in dataset['datasets']:
            yield from data_sets(one)
    else:
        yield dataset


def innermost(dataset: dict) -> dict:
    """The first data set inside wrappers."""
    return next(data_sets(dataset))


def metrics_of(cfg: Config, split: str) -> List[dict]:
    """The metrics of a split, be they one or several."""
    evaluator = cfg.get(f'{split}_evaluator') or []
    if isinstance(evaluator, dict) and 'metrics' in evaluator:
        evaluator = evaluator['metrics']
    return list(evaluator) if isinstance(evaluator, (list, tuple)) else [evaluator]


def replace_data_root(cfg: Config, root: str) -> None:
    """Let every dataset, and the annotation file of every metric, live under ``root``."""
    for split in ('train', 'val', 'test'):
        if not cfg.get(f'{split}_dataloader'):
            continue
        inside = list(data_sets(cfg[f'{split}_dataloader'].dataset))
        roots = {dataset.get('data_root') for dataset in inside}
        if len(roots) > 1:
            fail(
                f"--data-root: the {split} dataset is made of several, in "
                f"{' and '.join(sorted(map(repr, roots)))}; name them one by one with "
                '--cfg-options.'
            )
        for dataset in inside:
            dataset['data_root'] = root
        (old,) = roots
        for evaluator in metrics_of(cfg, split):
            below = os.path.relpath(evaluator.get('ann_file') or '..', old or '.')
            if not below.startswith('..'):  # a file elsewhere stays where it is
                evaluator['ann_file'] = str(Path(root) / below)


def check_dataset(cfg: Config, *splits: str) -> None:
    """End the program with a sentence if a folder or file of a dataset is not there. What a backend
    reaches is left to it."""
    folders = {}
    for split in splits:
        if not cfg.get(f'{split}_dataloader'):
            continue
        for dataset in data_sets(cfg[f'{split}_dataloader'].dataset):
            root = Path(dataset.get('data_root') or '.')
            parts = [dataset.get('ann_file'), *image_folders(dataset).values()]
            if dataset.get('backend_args') or any(
                '://' in str(part) for part in (dataset.get('data_root'), *parts)
            ):
                continue
            reached = any(step.get('backend_args') for step in dataset.get('pipeline') or ())
            for path in [root, *(root / part for part in parts[: 1 if reached else None] if part)]:
                if not path.exists():
                    fail(
                        f"the {split} dataset is not there: '{path.absolute()}' does not exist; "
                        f"put it there or name another folder with --data-root (now '{root}')."
                    )
            if (
                cfg.default_scope == 'mmpretrain'
                and dataset.get('with_label', True)
                and not reached
                and not list_of_images(dataset)
            ):
                folders[split] = class_folders(split, root, image_folders(dataset))
    if len(set(map(tuple, folders.values()))) > 1:
        (first, names), (second, others) = folders.items()
        name = sorted(set(names) ^ set(others))[0]
        fail(
            f"the {first} and the {second} dataset have different folders of classes, by whose "
            f"order labels are numbered: only one has '{name}'."
        )


def image_folders(dataset: dict) -> dict:
    """The folders of a data set below its root, by what is in them."""
    # MMPretrain's may be one folder, named after the split if not otherwise.
    prefix = dataset.get('data_prefix') or dataset.get('split') or {}
    return dict(img_path=prefix) if isinstance(prefix, str) else prefix


def list_of_images(dataset: dict) -> Optional[Path]:
    """The file that lists a data set's images; None: all in its folders are taken."""
    root = Path(dataset.get('data_root') or '')
    if dataset.get('ann_file'):
        return root / dataset['ann_file']
    listed = root / 'meta' / f"{dataset.get('split')}.txt"  # where MMPretrain looks for one
    return listed if listed.exists() else None


def class_folders(split: str, root: Path, prefix: dict) -> List[str]:
    """The folders of images, one for each class; ends the program with a sentence without any."""
    folder = root / prefix.get('img_path', '')
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not names:
        fail(
            f"the {split} dataset: '{folder}' must hold a folder of images for each class, and "
            f"has no folder; or list the images with their classes in '{root}/meta/{split}.txt'."
        )
    return names


def check_file(option: str, path: str) -> None:
    if '://' not in path and not Path(path).is_file():
        fail(f"{option}: file '{path}' does not exist.")


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file, and the folders that lead to it: under its name is all of it or nothing.

    Raises:
        OSError: it cannot be written.
    """
    part = path.with_name(f'.{os.getpid()}')  # no longer than the name of any file
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """:func:`atomic_write`; ends the program if it cannot be written."""
    try:
        atomic_write(path, data)
    except OSError as error:
        fail(f"'{path}' could not be written: {error}.")


def check_writable(option: str, folder) -> None:
    """End the program with a sentence if nothing can be written to a folder."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        fail(f"{option}: '{folder}' cannot be written: {error.strerror}.")


def run(main) -> None:
    """Run a tool. A checkpoint, a config or data that cannot be used end it with a sentence; where
    code of the user's own is at fault, its traceback comes first, in the log, too.

    A process of several that fails leaves at once: the others cannot be waited for.
    """
    try:
        main()
    except (CheckpointError, UserError) as error:
        if error.__cause__ is not None and is_of_users_code(error):
            print_log(
                ''.join(traceback.format_exception(type(error), error, error.__traceback__)),
                'current',
                logging.ERROR,
            )
            traceback.print_exc()
        leave(2, f'error: {error}')
    except SystemExit as stopped:
        leave(stopped.code)
    except Exception:
        leave(1, traceback.format_exc().rstrip())
    if is_distributed():
        # A process that ends with its group alive may be aborted, its work done.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def leave(status, said: str = '') -> None:
    """End the program, with what it has to say last on stderr."""
    sys.stdout.flush()
    if said:
        print(said, file=sys.stderr, flush=True)
    if is_distributed() and get_world_size() > 1:
        os._exit(status if isinstance(status, int) else int(status is not None))
    sys.exit(status)
