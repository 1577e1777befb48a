"""Read a config, choose its library, and adapt it to this machine and to the user's folders."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Iterable, Optional

import torch
from mmengine.config import Config, ConfigDict

from ..config_parts import data_sets, kind_of, metrics_of
from ..errors import UserError, said
from .overrides import check_keys, ensure_pretrained_cfg, warn_of_typos

# Package that each default_scope needs, by its name for pip. DENSE: scopes of dense prediction.
SCOPES = {'mmdet': 'mmdet', 'mmseg': 'mmsegmentation', 'mmpretrain': 'mmpretrain'}
DENSE = ('mmdet', 'mmseg')


def load_config(
    file: str, options: Optional[dict] = None, scopes: Iterable[str] = tuple(SCOPES)
) -> Config:
    """Read a config and replace some of its settings.

    Args:
        file (str): the config.
        options (dict, optional): settings by key, as from ``--cfg-options``.
        scopes (Iterable[str]): values of ``default_scope`` that the caller can use.

    Raises:
        UserError: the config cannot be read or has no model, its library is not installed, or an
            option has no effect.
    """
    if not Path(file).is_file():
        raise UserError(f"config '{file}' does not exist.")
    try:
        cfg = Config.fromfile(file)
    except Exception as error:  # a config is a program: anything can go wrong in it
        raise UserError(
            f"config '{file}' could not be read: {type(error).__name__}: {error}"
        ) from None
    strip_scope(cfg._cfg_dict)  # with a scope at the top, which a Config's values do not include
    if cfg.get('default_scope') is None and isinstance(cfg.get('model'), dict):
        cfg.default_scope = scope_of(cfg.model.get('type'))
    scope = cfg.get('default_scope')
    if scope not in scopes:
        raise UserError(
            f"config '{file}' has default_scope {scope!r}, allowed are "
            f"{', '.join(map(repr, scopes))}."
        )
    if find_spec(scope) is None:
        raise UserError(
            f"config '{file}' needs the package {SCOPES[scope]}, which is not installed."
        )
    if scope == 'mmpretrain':
        check_torchvision(file)
    if not isinstance(cfg.get('model'), dict):
        raise UserError(f"config '{file}' has no model.")
    ensure_pretrained_cfg(cfg, options or {})
    warn_of_typos(cfg, file)
    check_keys(cfg, options or {})
    try:
        cfg.merge_from_dict(options or {})
    except (TypeError, KeyError, IndexError) as error:
        raise UserError(f'--cfg-options: {error}') from None
    return cfg


def scope_of(kind) -> Optional[str]:
    """Return the library of a model's class or of its bases, in a pure Python config."""
    modules = [one.__module__.partition('.')[0] for one in getattr(kind, '__mro__', ())]
    return next((module for module in modules if module in SCOPES), None)


def check_torchvision(file: str) -> None:
    """Import torchvision, which MMPretrain needs.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # of another build than torch it fails in many ways
        raise UserError(
            f"config '{file}' needs a torchvision that fits torch {torch.__version__}, see "
            f'docs/pretraining.md; the import ends in {said(error)}.'
        ) from None


def strip_scope(part) -> None:
    """Strip the ``_scope_`` that ``_base_ = 'crossformer_mm::...'`` adds.

    MMEngine would look types up in a registry of that name, but models, data sets and metrics are
    those of MMDetection, MMSegmentation and MMPretrain.
    """
    if isinstance(part, dict) and part.get('_scope_') == 'crossformer_mm':
        del part['_scope_']
    if isinstance(part, (dict, list, tuple)):
        for value in part.values() if isinstance(part, dict) else part:
            strip_scope(value)


def ensure_visualizer(cfg: Config) -> ConfigDict:
    """Return the config's visualizer; if it has none, add that of its library."""
    if not cfg.get('visualizer'):
        kind = {'mmdet': 'DetLocalVisualizer', 'mmseg': 'SegLocalVisualizer'}
        cfg.visualizer = dict(
            type=kind.get(cfg.default_scope, 'UniversalVisualizer'),
            name='visualizer',
            vis_backends=[dict(type='LocalVisBackend')],
        )
    return cfg.visualizer


def prepare_for_cpu(cfg: Config) -> None:
    """Replace settings of MMEngine that assume a GPU, and start the process group of a job."""
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if cfg.get(name):
            cfg[name].pin_memory = False
    if cfg.launcher != 'pytorch':
        return
    # mmengine sets a CUDA device when it starts a process group: start it here, and wrap the model
    # without a device.
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


def replace_data_root(cfg: Config, root: str) -> None:
    """Move every data set, and the annotation file of every metric, below ``root``.

    Raises:
        UserError: a split has data sets in several folders.
    """
    for split in ('train', 'val', 'test'):
        if not cfg.get(f'{split}_dataloader'):
            continue
        inside = list(data_sets(cfg[f'{split}_dataloader'].dataset))
        roots = {dataset.get('data_root') for dataset in inside}
        if len(roots) > 1:
            raise UserError(
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


def import_package(cfg) -> None:
    """Make a config import this package, so that other tools can use the copy that a run keeps."""
    given = dict(cfg.get('custom_imports') or {})
    names = given.get('imports') or []
    names = [names] if isinstance(names, str) else list(names)
    cfg.custom_imports = dict(given, imports=list(dict.fromkeys([*names, 'crossformer_mm'])))
