"""``--cfg-options`` with checked keys: MMEngine adds any key, and nothing would read it."""

import argparse
import difflib
import inspect
import re
import sys
from typing import Any, List, Optional, Set, Tuple

import mmengine.registry
from mmengine.config import DictAction
from mmengine.registry import Registry
from mmengine.runner import Runner
from torch import nn

from .errors import UserError

# What is read besides the arguments of what is built: at the top of a config, by mmengine's Runner
# and by the tools; of the optimizer, by what constructs it, and by --amp.
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


class KeyValues(DictAction):
    """Parses ``KEY=VALUE ...``; what is no such pair is refused in a sentence."""

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
    """Give a tool the option ``--cfg-options``; ``such_as`` ends its help."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=KeyValues,
        metavar='KEY=VALUE',
        help=f'settings that replace those of the config{such_as}',
    )


def let_weights_be_named(cfg, options: dict) -> None:
    """Let ``model.backbone.init_cfg.checkpoint`` name weights where a config has none."""
    backbone = cfg.model.get('backbone')
    if (
        'model.backbone.init_cfg.checkpoint' in options
        and isinstance(backbone, dict)
        and backbone.get('init_cfg') is None
    ):
        backbone['init_cfg'] = dict(type='Pretrained', checkpoint=None)


def warn_of_names(cfg, file: str) -> None:
    """Warn of settings at the top of a config that nothing reads and that look like a typo of one
    that is read. They may be variables of the config, so none is refused."""
    read = arguments(Runner)[0]
    for name in cfg._cfg_dict:
        near = difflib.get_close_matches(name, read, n=1, cutoff=0.85)
        if name not in read | READ_BY_OTHERS[''] and near and not is_own_name(name, near[0]):
            print(
                f"warning: config '{file}': '{name}' has an effect only where the config itself "
                f"uses it; if it is a typo, write '{near[0]}'.",
                file=sys.stderr,
            )


def is_own_name(name: str, read: str) -> bool:
    """Whether a variable is named after a setting, as ``train_dataloader_1``, and no slip of it."""
    own = rf'\w*_{read}|_*{read}_\w+|_*{read}_?\d+|_+{read}|{read}s'
    return re.fullmatch(own, name) is not None


def uses_of(cfg, name: str, value) -> List[str]:
    """Where a config has the value of one of its variables, or a setting of the same name."""
    found: List[str] = []
    parts: List[Tuple[tuple, Any]] = [((), cfg._cfg_dict)]
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
    """See that settings are there to be replaced, or that what they are given to takes them.

    Raises:
        UserError: the key that is unknown, and the nearest that is known.
    """
    read = arguments(Runner)[0] | READ_BY_OTHERS['']
    for option in options:
        part = cfg._cfg_dict
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
                break  # what is inside something new is anyone's guess
            path.append(name)


def check_new(part: dict, name: str, path: list, built: Optional[type]) -> None:
    """See that a part of a config, from which something is built, may have one more key."""
    taken, more = arguments(built if path else Runner)
    taken |= READ_BY_OTHERS.get('.'.join(path), set())
    if name in taken or name in ('_delete_', '_scope_', 'type'):
        return
    # What may hold anything is believed, unless it looks like a slip.
    near = difflib.get_close_matches(name, {*part, *taken}, n=1, cutoff=0.8 if more else 0.6)
    if more and not near:
        return
    asked = f", did you mean '{'.'.join([*path, *near])}'?" if near else '.'
    raise UserError(
        f"--cfg-options: there is no '{'.'.join([*path, name])}' in the config, and "
        f'nothing would read it{asked}'
    )


def class_of(name, scope: Optional[str]) -> Optional[type]:
    """What a config builds by ``type``; None: unknown."""
    if inspect.isclass(name):
        return name
    for registry in vars(mmengine.registry).values() if isinstance(name, str) else ():
        if isinstance(registry, Registry):
            found = registry.get(f'{scope}.{name}' if scope and '.' not in name else name)
            if inspect.isclass(found):
                return found
    return None


def arguments(built: Optional[type]) -> Tuple[Set[str], bool]:
    """Names of a constructor's arguments, those that it hands on with them, and whether it may
    take others, of which nothing is known."""
    names: Set[str] = set()
    for owner in built.__mro__ if built else ():
        if '__init__' not in vars(owner) or owner in (nn.Module, object):
            continue
        parameters = inspect.signature(vars(owner)['__init__']).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if all(p.kind != p.VAR_KEYWORD for p in parameters):
            return names, False
    return names, True
