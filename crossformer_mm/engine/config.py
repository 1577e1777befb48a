"""Read a config, choose its library, and adapt it to this machine and to the user's folders."""

import os
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Iterable, Optional

import torch
from mmengine.config import Config, ConfigDict
from mmengine.config.utils import MODULE2PACKAGE

from ..config_parts import data_sets_of, kind_of, metrics_of
from ..errors import UserError, said
from .overrides import check_keys, class_of, ensure_pretrained_cfg, registered_scopes, warn_of_typos

# Values of default_scope whose models, data sets and results are known. DENSE: of dense prediction.
SCOPES = ('mmdet', 'mmseg', 'mmpretrain')
DENSE = ('mmdet', 'mmseg')


def load_config(
    file: str, options: Optional[dict] = None, scopes: Optional[Iterable[str]] = SCOPES
) -> Config:
    """Read a config and replace some of its settings.

    Args:
        file (str): the config.
        options (dict, optional): settings by key, as from ``--cfg-options``.
        scopes (Iterable[str], optional): values of ``default_scope`` that the caller can use. None:
            any library of MMEngine's.

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
    if scopes is not None and scope not in scopes:
        raise UserError(
            f"config '{file}' has default_scope {scope!r}, allowed are "
            f"{', '.join(map(repr, scopes))}.{inferencers_of(scope)}"
        )
    if not isinstance(cfg.get('model'), dict):
        no_scope = 'default_scope None and ' if scope is None else ''
        raise UserError(f"config '{file}' has {no_scope}no model.")
    if scope is None:
        use_mmengines_scope(cfg, file)
    else:
        check_library(scope, file)
    ensure_pretrained_cfg(cfg, options or {})
    warn_of_typos(cfg, file)
    check_keys(cfg, options or {})
    try:
        cfg.merge_from_dict(options or {})
    except (TypeError, KeyError, IndexError) as error:
        raise UserError(f'--cfg-options: {error}') from None
    return cfg


def name_of_config(file: Optional[str]) -> Optional[str]:
    """Return a config's name with its folders below the last one that is called ``configs``."""
    if not file:
        return None
    path = Path(file).absolute().with_suffix('')
    folders = path.parts[:-1]
    if 'configs' not in folders:
        return path.name
    return '/'.join(path.parts[len(folders) - folders[::-1].index('configs') :])


def scope_of(kind) -> Optional[str]:
    """Return the library of a model's class or of its bases, in a pure Python config."""
    modules = [one.__module__.partition('.')[0] for one in getattr(kind, '__mro__', ())]
    known = [module for module in modules if module in SCOPES]
    return next(iter([*known, *filter(registered_scopes().__contains__, modules)]), None)


def use_mmengines_scope(cfg: Config, file: str) -> None:
    """Use MMEngine's own registries for a config without ``default_scope``, as MMEngine does. Raise
    a UserError if they do not have the model."""
    cfg.default_scope = 'mmengine'
    kind = cfg.model.get('type')
    if class_of(kind, 'mmengine') is None:
        raise UserError(
            f"config '{file}' has default_scope None, and MMEngine itself has no model {kind!r}: "
            'name the library of the model.'
        )


def check_library(scope: str, file: str) -> None:
    """Import the library of a config's ``default_scope``. Raise a UserError if that is impossible
    or registers nothing with MMEngine."""
    if scope not in registered_scopes():  # by one of the config's custom_imports
        if find_spec(scope) is None:
            package = MODULE2PACKAGE.get(scope, scope)
            raise UserError(f"config '{file}' needs the package {package}, which is not installed.")
        try:
            if find_spec(f'{scope}.registry') is not None:
                import_module(f'{scope}.registry')
        except Exception as error:  # of the library
            raise UserError(
                f"config '{file}' needs {scope}, whose import ends in {said(error)}."
            ) from error
    if scope == 'mmpretrain':
        check_torchvision(file)
    if scope not in registered_scopes():
        raise UserError(
            f"config '{file}' has default_scope {scope!r}, and this package has no registry of "
            "MMEngine's: import the module that defines it by custom_imports."
        )


def inferencers_of(scope: Optional[str]) -> str:
    """Return a sentence that names the inferencers of a library, or ''."""
    try:
        found = find_spec(f'{scope}.apis')
    except Exception:  # not installed, or cannot be imported
        return ''
    if found is None or not found.origin:
        return ''
    text = Path(found.origin).read_text(encoding='utf-8')  # importing it may take long
    names = re.findall(r'\b(?!Base)\w+Inferencer\b', text) or re.findall(r'\binference_\w+', text)
    some = ', '.join(list(dict.fromkeys(names))[:3])
    return f' {scope} predicts by its own {scope}.apis: {some}.' if some else ''


def check_torchvision(file: str) -> None:
    """Import torchvision, which MMPretrain needs, or raise a UserError."""
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
        kind = {
            'mmdet': 'DetLocalVisualizer',
            'mmseg': 'SegLocalVisualizer',
            'mmpretrain': 'UniversalVisualizer',
        }
        cfg.visualizer = dict(
            type=kind.get(cfg.default_scope, 'mmengine.Visualizer'),
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
    """Move every data set, and the annotation file of every metric, below ``root``. Raise a
    UserError if a split has data sets in several folders."""
    for split in ('train', 'val', 'test'):
        inside = data_sets_of(cfg, split)
        roots = {dataset.get('data_root') for dataset in inside}
        if not roots:
            continue
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
