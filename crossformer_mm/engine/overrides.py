"""Check the keys of ``--cfg-options``: MMEngine adds any key, even one that nothing reads."""

import difflib
import inspect
import re
import sys
from typing import Any, List, Optional, Set, Tuple

import mmengine.registry
from mmengine.registry import Registry
from mmengine.runner import Runner
from torch import nn

from ..errors import UserError

# Keys that are read besides a class's arguments: at the top of a config by mmengine's Runner and by
# the tools, in optim_wrapper by its constructor and by --amp.
READ_BY_OTHERS = {
    '': {
        'find_unused_parameters',
        'model_wrapper_cfg',
        'activation_checkpointing',
        'compile',
        'efficient_conv_bn_eval',
        'sync_bn',
        'custom_imports',
        'tta_model',
        'tta_pipeline',
        'runner_type',
        'strategy',
        'init_weights_for_test_or_val',
    },
    'optim_wrapper': {'paramwise_cfg', 'constructor', 'loss_scale', 'dtype'},
}


def ensure_pretrained_cfg(cfg, options: dict) -> None:
    """Add the ``init_cfg`` that the option ``model.backbone.init_cfg.checkpoint`` needs."""
    backbone = cfg.model.get('backbone')
    if (
        'model.backbone.init_cfg.checkpoint' in options
        and isinstance(backbone, dict)
        and backbone.get('init_cfg') is None
    ):
        backbone['init_cfg'] = dict(type='Pretrained', checkpoint=None)


def warn_of_typos(cfg, file: str) -> None:
    """Warn of unread settings at the top of a config that look like a typo of one that is read.

    They may be variables of the config, so none is an error.
    """
    read = arguments(Runner)[0]
    for name in cfg.keys():
        near = difflib.get_close_matches(name, read, n=1, cutoff=0.85)
        if name not in read | READ_BY_OTHERS[''] and near and not is_own_name(name, near[0]):
            print(
                f"warning: config '{file}': '{name}' has an effect only where the config itself "
                f"uses it; if it is a typo, write '{near[0]}'.",
                file=sys.stderr,
            )


def is_own_name(name: str, read: str) -> bool:
    """Check whether a variable is named after a setting, such as ``train_dataloader_1``."""
    own = rf'\w*_{read}|_*{read}_\w+|_*{read}_?\d+|_+{read}|{read}s'
    return re.fullmatch(own, name) is not None


def uses_of(cfg, name: str, value) -> List[str]:
    """List the settings of a config with the name or the value of one of its variables."""
    found: List[str] = []
    parts: List[Tuple[tuple, Any]] = [((), dict(cfg.items()))]
    for path, part in parts:
        pairs = part.items() if isinstance(part, dict) else enumerate(part)
        for key, inside in pairs:
            where = (*path, str(key))
            if len(where) > 1 and (
                key == name
                or type(inside) is type(value)
                and inside == value
                and not isinstance(value, (bool, int, float, type(None)))
            ):
                found.append('.'.join(where))
            elif isinstance(inside, (dict, list, tuple)):
                parts.append((where, inside))
    return sorted(found, key=lambda where: where.split('.')[0] not in arguments(Runner)[0])


def check_keys(cfg, options: dict) -> None:
    """Raise a UserError, with the nearest known key, for an option that nothing would read."""
    read = arguments(Runner)[0] | READ_BY_OTHERS['']
    for option in options:
        part: Any = dict(cfg.items())
        path: List[str] = []
        name = option.split('.')[0]
        if name in part and name not in read:
            uses = [use for use in uses_of(cfg, name, part[name]) if use.split('.')[0] in read]
            used = f": give {', '.join(uses[:4])}" + (', ...' if uses[4:] else '') if uses else ''
            raise UserError(
                f"--cfg-options: '{name}' is a variable of the config file, which has "
                f"been used by then{used}, got '{option}'."
            )
        for name in option.split('.'):
            if isinstance(part, (list, tuple)):
                if not name.isdigit() or int(name) >= len(part):
                    raise UserError(
                        f"--cfg-options: {'.'.join(path)} has {len(part)} elements, "
                        f"named by 0 to {len(part) - 1}, got '{option}'."
                    )
                part = part[int(name)]
            elif not isinstance(part, dict):
                raise UserError(
                    f"--cfg-options: {'.'.join(path)} is {part!r}, which has no part "
                    f"'{name}', got '{option}'."
                )
            elif name in part:
                part = part[name]
            else:
                built = options.get('.'.join([*path, 'type']), part.get('type'))
                check_new(part, name, path, class_of(built, cfg.get('default_scope')))
                break  # the structure of a new setting is unknown
            path.append(name)


def check_new(part: dict, name: str, path: list, built: Optional[type]) -> None:
    """Check that the class that a part of a config builds takes one more key."""
    taken, more = arguments(built if path else Runner)
    taken |= READ_BY_OTHERS.get('.'.join(path), set())
    if name in taken or name in ('_delete_', '_scope_', 'type'):
        return
    # **kwargs accept any key that is no near typo.
    near = difflib.get_close_matches(name, {*part, *taken}, n=1, cutoff=0.8 if more else 0.6)
    if more and not near:
        return
    asked = f", did you mean '{'.'.join([*path, *near])}'?" if near else '.'
    raise UserError(
        f"--cfg-options: there is no '{'.'.join([*path, name])}' in the config, and "
        f'nothing would read it{asked}'
    )


def class_of(name, scope: Optional[str]) -> Optional[type]:
    """Return the class that a config builds by ``type``; None: unknown."""
    if inspect.isclass(name):
        return name
    if not isinstance(name, str):
        return None
    # A library may lack a registry of its own for a part, and use MMEngine's.
    for key in [f'{scope}.{name}', name] if scope and '.' not in name else [name]:
        for registry in registries():
            try:
                found = registry.get(key)
            except RuntimeError:  # 'Failed to get'
                continue
            if inspect.isclass(found):
                return found
    return None


def registries() -> List[Registry]:
    """List MMEngine's own registries, whose children are those of libraries."""
    return [one for one in vars(mmengine.registry).values() if isinstance(one, Registry)]


def registered_scopes() -> Set[str]:
    """Return the scopes of all registries."""
    found, parts = set(), registries()
    for registry in parts:
        found.add(registry.scope)
        parts += registry.children.values()
    return found


def arguments(built: Optional[type]) -> Tuple[Set[str], bool]:
    """Return the names of a constructor's arguments and of those of its bases to which it passes
    ``**kwargs``, and whether it may take others."""
    names: Set[str] = set()
    for owner in built.__mro__ if built else ():
        if '__init__' not in vars(owner) or owner in (nn.Module, object):
            continue
        parameters = inspect.signature(vars(owner)['__init__']).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if all(p.kind != p.VAR_KEYWORD for p in parameters):
            return names, False
    return names, True
