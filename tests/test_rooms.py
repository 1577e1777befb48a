"""Rooms of the package: arrows go one way, there are no circles, and only commands end a process."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path
from typing import Dict, Iterator, NamedTuple, Optional, Set

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = 'crossformer_mm'

# Rooms that each room may import. A file or folder that is not named here belongs to the model.
EVERYBODYS = {'without_torch', 'base'}
MODEL = EVERYBODYS | {'model', 'kernels'}
MAY_IMPORT = {
    'without_torch': {'without_torch'},
    'base': EVERYBODYS,
    'model': MODEL,
    'kernels': MODEL,
    'engine': EVERYBODYS | {'engine'},
    'export': MODEL | {'export'},
    'explain': MODEL | {'explain'},
    'prediction': MODEL | {'engine', 'prediction'},
    'sweep': MODEL | {'engine', 'sweep'},
    'cli': EVERYBODYS | {'engine', 'cli'},
    'package': MODEL | {'engine'},  # crossformer_mm/__init__.py
    'tools': MODEL | {'package', 'engine', 'export', 'explain', 'prediction', 'sweep', 'cli'},
}
ROOM_OF = {
    **dict.fromkeys(('errors', 'files', 'checkpoint', 'compat', 'version', 'installed'), 'base'),
    **dict.fromkeys(('class_names', 'config_parts', 'pictures', 'mmcv_ops', 'openmmlab'), 'base'),
    **{room: room for room in ('without_torch', 'kernels', 'engine', 'export', 'explain')},
    **{room: room for room in ('prediction', 'sweep', 'cli')},
}
# They run where PyTorch is not installed, with this folder of the package copied beside them.
COPIED = 'without_torch'
WITHOUT_PYTORCH = ('tools/run_onnx.py', 'examples/service.py')
NEED_PYTORCH = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'onnxscript', PACKAGE)

COMPILED = f'{PACKAGE}.kernels._native'

DYNAMIC = 'import_module', '__import__', 'run_module', 'run_path'
DYNAMIC += 'spec_from_file_location', 'SourceFileLoader'
# Imports whose target is not written where they are made, with the reason.
UNKNOWN_TARGETS = {
    'crossformer_mm.engine.config': 'the library of a config, none of these modules',
    'crossformer_mm.installed': 'packages of the table above it, none of them this one',
    'crossformer_mm.mmcv_ops': 'its own operators as a module of mmcv, and modules that import mmcv',
}


class Import(NamedTuple):
    source: str
    target: Optional[str]  # None: not written there

    def __str__(self) -> str:
        return f'{self.source} -> {self.target}'


def module_name(file: Path) -> str:
    return '.'.join(file.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


@cache
def trees() -> Dict[str, ast.Module]:
    """Syntax trees of the package, the tools and what runs without PyTorch, by module."""
    files = [*ROOT.glob('tools/*.py'), *map(ROOT.joinpath, WITHOUT_PYTORCH)]
    files += (ROOT / PACKAGE).rglob('*.py')
    return {
        module_name(file): ast.parse(file.read_text(encoding='utf-8'))
        for file in files
        if '.mim' not in file.parts
    }


def room_of(module: str) -> str:
    first, _, rest = module.partition('.')
    if first == PACKAGE:
        return ROOM_OF.get(rest.partition('.')[0], 'model') if rest else 'package'
    return first


def absolute(module: str, name: str) -> str:
    """Resolve the name of an import in a module."""
    is_package = (ROOT / Path(*module.split('.')) / '__init__.py').is_file()
    return resolve_name(name, module if is_package else module.rpartition('.')[0])


def called(node: ast.Call) -> str:
    return ast.unparse(node.func).rpartition('.')[2]


def imports_of(module: str) -> Iterator[Import]:
    """Yield what a module imports, at any depth of its code and by any of Python's ways."""
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(module, name.name)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, '.' * node.level + (node.module or ''))
            for name in node.names:
                inner = f'{base}.{name.name}'
                yield Import(module, inner if inner in {*trees(), COMPILED} else base)
        elif isinstance(node, ast.Call) and called(node) in DYNAMIC:
            name = getattr(node.args[0], 'value', None)
            is_known = called(node) == 'import_module' and isinstance(name, str)
            yield Import(module, absolute(module, name) if is_known else None)


def all_imports() -> Set[Import]:
    return {one for module in trees() for one in imports_of(module)}


def test_arrows_between_rooms_go_one_way():
    against = {
        str(one)
        for one in all_imports()
        if one.target in trees()
        and room_of(one.target) not in MAY_IMPORT.get(room_of(one.source), MODEL)
    }
    assert not against


def test_no_modules_import_each_other():
    graph = TopologicalSorter()
    for source, target in all_imports():
        if target in trees():
            graph.add(source, target)
    graph.prepare()  # a CycleError lists the modules of a circle


def test_every_import_says_what_it_imports():
    assert {one.source for one in all_imports() if one.target is None} == set(UNKNOWN_TARGETS)


@pytest.mark.parametrize('file', WITHOUT_PYTORCH)
def test_what_serves_models_does_without_pytorch(file):
    left, seen = [module_name(ROOT / file)], set()
    while left:
        module = left.pop()
        seen.add(module)
        for one in imports_of(module):
            target = str(one.target).removeprefix(f'{PACKAGE}.')
            if target.partition('.')[0] == COPIED:
                left += {f'{PACKAGE}.{target}'} - seen
            else:
                assert one.target and one.target.partition('.')[0] not in NEED_PYTORCH, str(one)
    assert f'{PACKAGE}.{COPIED}.model' in seen


def test_only_commands_end_a_process_or_print_errors():
    def ends(node: ast.AST) -> bool:
        if isinstance(node, ast.Call):
            return called(node) in ('exit', '_exit', 'quit', 'abort', 'fail')
        if isinstance(node, ast.Raise) and node.exc is not None:
            return 'SystemExit' in ast.unparse(node.exc)
        return isinstance(node, ast.Constant) and str(node.value).startswith('error: ')

    ending = {module for module, tree in trees().items() if any(map(ends, ast.walk(tree)))}
    assert {module for module in ending if module.startswith(PACKAGE)} == {
        'crossformer_mm.cli',
        'crossformer_mm.engine.workers',  # of data loaders
    }


def test_each_file_of_tools_is_a_command():
    for file in ROOT.glob('tools/*.py'):
        assert "if __name__ == '__main__':" in file.read_text(encoding='utf-8'), file.name


# The reader of imports


@pytest.mark.parametrize(
    'line, target',
    [
        ('import crossformer_mm.engine.runner', 'crossformer_mm.engine.runner'),
        ('from .. import cli', 'crossformer_mm.cli'),
        ('from ..cli import run', 'crossformer_mm.cli'),
        ('from . import operators', 'crossformer_mm.export.operators'),
        ('def f():\n    from ..engine import runner', 'crossformer_mm.engine.runner'),
        ("importlib.import_module('crossformer_mm.cli')", 'crossformer_mm.cli'),
        ("import_module('..cli', __package__)", 'crossformer_mm.cli'),
        ("import_module('.models', __package__)", 'crossformer_mm.export.models'),
        ("__import__('crossformer_mm.cli')", None),
        ("spec_from_file_location('x', Path(__file__).with_name('train.py'))", None),
        ("runpy.run_path('tools/train.py')", None),
        ('import_module(name)', None),
        ('runpy.run_path(file)', None),
    ],
)
def test_imports_are_found_however_they_are_written(monkeypatch, line, target):
    module = 'crossformer_mm.export.metadata'
    monkeypatch.setitem(trees(), module, ast.parse(line))
    assert [one.target for one in imports_of(module)] == [target]
