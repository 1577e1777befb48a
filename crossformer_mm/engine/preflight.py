"""Checks of a config's files and numbers, before long work and before anything is built."""

from pathlib import Path
from typing import List, Optional

from mmengine.config import Config
from mmengine.dataset import BaseDataset

from ..config_parts import data_sets_of, metrics_of
from ..errors import ConfigError, UserError
from .config import SCOPES
from .dataset_access import is_path
from .overrides import class_of


def check_dataset(cfg: Config, *splits: str) -> None:
    """Check that the folders and files of the splits' data sets exist, unless on a remote backend.

    In other libraries only data sets derived from MMEngine's are known to join paths in this way.

    Raises:
        UserError: one does not exist, or splits have different folders of classes.
    """
    folders = {}
    for split in splits:
        for dataset in data_sets_of(cfg, split):
            if cfg.default_scope not in SCOPES:
                kind = class_of(dataset.get('type'), cfg.default_scope)
                if kind is None or not issubclass(kind, BaseDataset):
                    continue
            root = Path(dataset.get('data_root') or '.')
            folder_of_split = cfg.default_scope == 'mmpretrain'
            parts = [dataset.get('ann_file'), *image_folders(dataset, folder_of_split).values()]
            parts = [part if is_path(part) else None for part in parts]
            if dataset.get('backend_args') or any(
                '://' in str(part) for part in (dataset.get('data_root'), *parts)
            ):
                continue
            reached = any(step.get('backend_args') for step in dataset.get('pipeline') or ())
            for path in [root, *(root / part for part in parts[: 1 if reached else None] if part)]:
                if not path.exists():
                    raise UserError(
                        f"the {split} dataset is not there: '{path.absolute()}' does not exist; "
                        f"put it there or name another folder with --data-root (now '{root}')."
                    )
            if (
                cfg.default_scope == 'mmpretrain'
                and dataset.get('with_label', True)
                and not reached
                and not list_of_images(dataset)
            ):
                folders[split] = class_folders(split, root, image_folders(dataset, True))
    if len(set(map(tuple, folders.values()))) > 1:
        (first, names), (second, others) = folders.items()
        name = sorted(set(names) ^ set(others))[0]
        raise UserError(
            f"the {first} and the {second} dataset have different folders of classes, by whose "
            f"order labels are numbered: only one has '{name}'."
        )


def image_folders(dataset: dict, folder_of_split: bool) -> dict:
    """Return the folders of a data set below its root, by content.

    ``folder_of_split``: the folder is named after the split if not otherwise, as in MMPretrain.
    """
    prefix = dataset.get('data_prefix') or folder_of_split and dataset.get('split') or {}
    return dict(img_path=prefix) if isinstance(prefix, str) else prefix


def list_of_images(dataset: dict) -> Optional[Path]:
    """Return the file that lists a data set's images; None: it has all in its folders."""
    root = Path(dataset.get('data_root') or '')
    if dataset.get('ann_file'):
        return root / dataset['ann_file']
    listed = root / 'meta' / f"{dataset.get('split')}.txt"  # where MMPretrain looks for one
    return listed if listed.exists() else None


def class_folders(split: str, root: Path, prefix: dict) -> List[str]:
    """List the folders of images, one for each class, or raise a UserError if there is none."""
    folder = root / prefix.get('img_path', '')
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not names:
        raise UserError(
            f"the {split} dataset: '{folder}' must hold a folder of images for each class, and "
            f"has no folder; or list the images with their classes in '{root}/meta/{split}.txt'."
        )
    return names


def check_file(option: str, path: str) -> None:
    """Raise a UserError, which names the option, if a file does not exist and is no address."""
    if '://' not in path and not Path(path).is_file():
        raise UserError(f"{option}: file '{path}' does not exist.")


def check_weight_files(cfg: Config) -> bool:
    """Return if a config takes weights from files. Raise a UserError if one of these does not
    exist."""
    backbone = cfg.model.get('backbone')
    given = (backbone.get('init_cfg') if isinstance(backbone, dict) else None) or {}
    files = [
        ('model.backbone.init_cfg.checkpoint', one.get('checkpoint'))
        for one in (given if isinstance(given, list) else [given])
    ]
    files = [(key, file) for key, file in [('load_from', cfg.get('load_from')), *files] if file]
    for key, file in files:
        check_file(key, str(file))
    return bool(files)


def check_classifier(cfg) -> None:
    """Raise a ConfigError if a classifier's parts and metrics disagree on the number of classes."""
    if cfg.get('default_scope') not in ('mmpretrain', None):
        return
    head = cfg['model'].get('head') if isinstance(cfg['model'], dict) else None
    classes = head.get('num_classes') if isinstance(head, dict) else None
    if not classes:
        return
    mixed = (cfg['model'].get('data_preprocessor') or {}).get('num_classes', classes)
    if classes != mixed:
        raise ConfigError(
            f'model.data_preprocessor.num_classes = {mixed} and model.head.'
            f'num_classes = {classes} must be equal.'
        )
    for split in ('val', 'test'):
        for metric in metrics_of(cfg, split):
            best = metric.get('topk') or 1
            best = best if isinstance(best, int) else max(best)
            if best > classes:
                raise ConfigError(
                    f'{split}_evaluator.topk has {best}, but there are {classes} classes.'
                )
