"""Provide ``mmcv._ext``, mmcv's compiled operators, from torchvision's where mmcv has none.

``install`` appends a finder to ``sys.meta_path``. Python asks it last, so that operators that mmcv
has compiled, even ones that fail to load, are never replaced.
"""

import importlib.util
import os
import sys

NAME = 'mmcv._ext'
OPERATORS = os.path.join(os.path.dirname(__file__), 'operators.py')


class Finder:
    """Find ``mmcv._ext`` here. The module is executed when mmcv imports it."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != NAME:
            return None
        return importlib.util.spec_from_file_location(name, OPERATORS)


def install() -> None:
    """Append the finder, and repair modules that were imported before it.

    onedl-mmdetection and onedl-mmsegmentation catch the import error of most operators and define
    placeholders, which raise when they are used. These are replaced.

    Raises:
        ImportError: a class was derived from a placeholder.
    """
    if Finder in sys.meta_path:
        return
    sys.meta_path.append(Finder)
    users = ('mmdet.', 'mmseg.', 'mmpretrain.')
    early = [module for name, module in sys.modules.items() if name.startswith(users)]
    spec = importlib.util.find_spec(NAME) if early else None
    if spec is not None and spec.origin == OPERATORS:
        # MMDetection imports one of mmcv's placeholders, too.
        for module in [sys.modules.get('mmcv.cnn.bricks.transformer'), *early]:
            for placeholder, operator in placeholders(module):
                replace(placeholder, operator, early)


def placeholders(module):
    """Yield each placeholder that a module has for an import from mmcv, and the real object."""
    import ast
    import inspect

    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError):  # has no source
        return
    for statement in tree.body:
        for line in statement.body if isinstance(statement, ast.Try) else ():
            if not isinstance(line, ast.ImportFrom) or not line.module:
                continue
            if not line.module.startswith('mmcv.'):
                continue
            try:
                source = importlib.import_module(line.module)
            except ImportError:  # torchvision has no operators
                return
            for alias in line.names:
                name, operator = alias.asname or alias.name, getattr(source, alias.name)
                if vars(module).get(name) is None:
                    setattr(module, name, operator)
                elif vars(module)[name] is not operator:
                    yield vars(module)[name], operator


def replace(placeholder, operator, modules) -> None:
    """Replace a placeholder wherever it was imported to."""
    if isinstance(placeholder, type) and placeholder.__subclasses__():
        raise ImportError(
            f'{placeholder.__module__} was imported when mmcv had no operators, and a class was '
            f'derived from its placeholder {placeholder.__name__}: import crossformer_mm first.'
        )
    for module in modules:
        for name, value in list(vars(module).items()):
            if value is placeholder:
                setattr(module, name, operator)
