"""What train.py and test.py share: arguments, reading a config, checks before long work."""
import argparse
import logging
import os
import tempfile
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Iterable, List, Optional

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner.checkpoint import find_latest_checkpoint

from ..checkpoint import (CheckpointError, fit_checkpoint, model_weights,
                          use_safe_loading)
from .data_checks import image_folders, list_of_images
from .errors import UserError, fail, said
from .option_checks import add_cfg_options, check_keys, let_weights_be_named

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
    parser.add_argument('--work-dir', help='folder for logs and checkpoints '
                        '(default: work_dirs/NAME_OF_CONFIG)')
    parser.add_argument('--data-root', help="the dataset's folder, in place of the config's")
    parser.add_argument('--tensorboard', action='store_true', help='also log to TensorBoard')
    add_cfg_options(parser, ', such as train_dataloader.batch_size=4 model.backbone.with_cp=True')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none',
                        help='how the processes of a distributed job were started')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0,
                        help=argparse.SUPPRESS)
    return parser


def load_config(file: str, options: Optional[dict] = None,
                scopes: Iterable[str] = tuple(SCOPES)) -> Config:
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
    scope = cfg.get('default_scope')
    if scope not in scopes:
        fail(f"config '{file}' has default_scope {scope!r}, allowed are "
             f"{', '.join(map(repr, scopes))}.")
    if find_spec(scope) is None:
        fail(f"config '{file}' needs the package {SCOPES[scope]}, which is not installed.")
    if scope == 'mmpretrain':
        check_torchvision(file)
    if not isinstance(cfg.get('model'), dict):
        fail(f"config '{file}' has no model.")
    let_weights_be_named(cfg, options or {})
    with sentences_for(UserError):
        check_keys(cfg, options or {})
    try:
        cfg.merge_from_dict(options or {})
    except (TypeError, KeyError, IndexError) as error:
        fail(f'--cfg-options: {error}')
    return cfg


def check_torchvision(file: str) -> None:
    """End the program with a sentence if MMPretrain's torchvision cannot be used."""
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # of another build than torch it fails in many ways
        fail(f"config '{file}' needs a torchvision that fits torch {torch.__version__}, see "
             f'docs/pretraining.md; the import ends in {said(error)}.')


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
        fail(f'--launcher {args.launcher}: {STARTED[args.launcher]} is not set, this is no process '
             'of such a job; tools/dist_train.sh and tools/dist_test.sh start one.')
    cfg.launcher = args.launcher
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif not cfg.get('work_dir'):
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    if args.tensorboard:
        if find_spec('tensorboard') is None:
            fail('--tensorboard needs the package tensorboard, which is not installed.')
        cfg.visualizer.vis_backends = [*cfg.visualizer.vis_backends,
                                       dict(type='TensorboardVisBackend')]
    if not torch.cuda.is_available():
        prepare_for_cpu(cfg)
    if args.data_root:
        replace_data_root(cfg, args.data_root)
    use_safe_loading()
    return cfg


def prepare_for_cpu(cfg: Config) -> None:
    """Settle what mmengine takes for granted to be on a GPU."""

    def plain_batch_norm(part) -> None:
        for value in part.values() if isinstance(part, dict) else part:
            if isinstance(value, (dict, list, tuple)):
                plain_batch_norm(value)
        if isinstance(part, dict) and part.get('type') == 'SyncBN':
            part['type'] = 'BN'

    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if cfg.get(name):
            cfg[name].pin_memory = False
    if cfg.launcher == 'pytorch':
        # mmengine sets a CUDA device when it starts a process group: start it here,
        # wrap the model without naming a device, use no norm that needs one.
        torch.distributed.init_process_group('gloo')
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel', broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        ) | dict(cfg.get('model_wrapper_cfg') or {}) | dict(device_ids=None)
        plain_batch_norm(cfg.model)


def innermost(dataset: dict) -> dict:
    """The dataset inside wrappers such as RepeatDataset."""
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset


def replace_data_root(cfg: Config, root: str) -> None:
    """Let every dataset, and the annotation file of every metric, live under ``root``."""
    for split in ('train', 'val', 'test'):
        if not cfg.get(f'{split}_dataloader'):
            continue
        dataset = innermost(cfg[f'{split}_dataloader'].dataset)
        old, dataset.data_root = dataset.data_root, root
        evaluators = cfg.get(f'{split}_evaluator') or []
        for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
            inside = os.path.relpath(evaluator.get('ann_file') or '..', old)
            if not inside.startswith('..'):  # a file elsewhere stays where it is
                evaluator.ann_file = str(Path(root) / inside)


def check_dataset(cfg: Config, *splits: str) -> None:
    """End the program with a sentence if a folder or file of a dataset is not there."""
    folders = {}
    for split in splits:
        if not cfg.get(f'{split}_dataloader'):
            continue
        dataset = innermost(cfg[f'{split}_dataloader'].dataset)
        root = Path(dataset.get('data_root') or '.')
        parts = [dataset.get('ann_file'), *image_folders(dataset).values()]
        for path in [root, *(root / part for part in parts if part)]:
            if not path.exists():
                fail(f"the {split} dataset is not there: '{path.absolute()}' does not exist; put "
                     f"it there or name another folder with --data-root (now '{root}').")
        if (cfg.default_scope == 'mmpretrain' and dataset.get('with_label', True)
                and not list_of_images(dataset)):
            folders[split] = class_folders(split, root, image_folders(dataset))
    if len(set(map(tuple, folders.values()))) > 1:
        (first, names), (second, others) = folders.items()
        name = sorted(set(names) ^ set(others))[0]
        fail(f"the {first} and the {second} dataset have different folders of classes, by whose "
             f"order labels are numbered: only one has '{name}'.")


def class_folders(split: str, root: Path, prefix: dict) -> List[str]:
    """The folders of images, one for each class; ends the program with a sentence without any."""
    folder = root / prefix.get('img_path', '')
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not names:
        fail(f"the {split} dataset: '{folder}' must hold a folder of images for each class, and "
             f"has no folder; or list the images with their classes in '{root}/meta/{split}.txt'.")
    return names


def check_file(option: str, path: str) -> None:
    if '://' not in path and not Path(path).is_file():
        fail(f"{option}: file '{path}' does not exist.")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, and the folders that lead to it: under its name is all of it or nothing."""
    part = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        fail(f"'{path}' could not be written: {error}.")
    finally:
        part.unlink(missing_ok=True)


def check_writable(option: str, folder) -> None:
    """End the program with a sentence if nothing can be written to a folder."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        fail(f"{option}: '{folder}' cannot be written: {error.strerror}.")


def checkpoint_name(runner) -> str:
    """The file that a runner has loaded."""
    return runner._load_from or find_latest_checkpoint(runner.work_dir)


def bare_model(runner):
    """A runner's model without wrappers."""
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


class NameWeights(Hook):
    """Give all other hooks, such as those of averaged weights, a file's weights under
    ``state_dict`` and as the model names them."""

    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner, checkpoint) -> None:
        checkpoint['state_dict'] = model_weights(bare_model(runner), checkpoint,
                                                 checkpoint_name(runner))


class CheckWeights(Hook):
    """Refuse a checkpoint that does not fit; mmengine would warn and leave weights random.

    Args:
        advice: what a user can do, a clause after the sentence that says what does not fit.
        required: prefix of the keys that must fit (``''``: all, None: none).
        resume: whether the checkpoint must hold the state of a training.
    """

    priority = 'VERY_LOW'  # other hooks, such as those of averaged weights, choose weights first

    def __init__(self, advice: str, required: Optional[str] = '', resume: bool = False):
        self.advice, self.required, self.resume = advice, required, resume

    def after_load_checkpoint(self, runner, checkpoint) -> None:
        name = checkpoint_name(runner)
        try:
            fit_checkpoint(bare_model(runner), checkpoint, name, self.required)
        except CheckpointError as error:
            raise CheckpointError(f'{error} {self.advice}') from None
        absent = [key for key in ('optimizer', 'message_hub', 'meta') if key not in checkpoint]
        if self.resume and absent:
            raise CheckpointError(
                f"Checkpoint '{name}' holds no state of a training ({', '.join(absent)}): start a "
                "new one from its weights with --cfg-options load_from=FILE.")
        compare_classes(runner, checkpoint)


def compare_classes(runner, checkpoint: dict) -> None:
    """Warn if a checkpoint names other classes than the dataset, by which results are read."""
    meta = checkpoint['meta'] if isinstance(checkpoint.get('meta'), dict) else {}
    said = (meta.get('dataset_meta') or {}).get('classes') or meta.get('CLASSES')
    loop = getattr(runner, '_test_loop', None)
    dataset = getattr(getattr(loop, 'dataloader', None), 'dataset', None)
    classes = getattr(dataset, 'metainfo', {}).get('classes')
    if said and classes and list(said) != list(classes):
        print_log('The checkpoint names other classes than the dataset, whose names are used: '
                  f'{list(said)[:3]}... and {list(classes)[:3]}...', 'current', logging.WARNING)


def run(main) -> None:
    """Run a tool; a checkpoint, a config or data that cannot be used end it with a sentence."""
    with sentences_for(CheckpointError, UserError):
        try:
            main()
        finally:
            # A process that ends with its group alive may be aborted, its work done.
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
