"""The import finder gives an mmcv without compiled operators those of ``mmcv_ops``."""

import os
from importlib.util import find_spec

import pytest
import torch

from crossformer_mm import mmcv_ops

from ..helpers import ROOT, run_python

pytest.importorskip('torchvision')
COMPILED = find_spec('mmcv._ext').origin != mmcv_ops.OPERATORS


def python(*program, folder=None):
    """Run a program without the finder that this Python may have from its start."""
    head = (
        'import sys, warnings; warnings.simplefilter("ignore"); sys.meta_path[:] = '
        '[one for one in sys.meta_path if one.__module__ != "crossformer_mm.mmcv_ops"]'
    )
    path = [str(folder or ''), os.environ.get('PYTHONPATH', ''), str(ROOT)]
    path = os.pathsep.join(filter(None, path))
    done = run_python('-c', '\n'.join([head, *program]), PYTHONPATH=path)
    return (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]


def test_mmcv_finds_operators_once_the_package_is_imported():
    origin = python('import crossformer_mm, mmcv.ops; print(sys.modules["mmcv._ext"].__file__)')
    assert (origin == mmcv_ops.OPERATORS) is not COMPILED


def test_a_compiled_module_wins_and_a_broken_one_raises_its_own_error(tmp_path):
    """Two stand in for one: a module in Python, and a file that is no library."""
    program = f'import crossformer_mm, mmcv; mmcv.__path__.insert(0, {str(tmp_path)!r})'
    (tmp_path / '_ext.py').write_text('')
    said = python(program, 'import mmcv._ext; print(mmcv._ext.__file__)')
    assert said == str(tmp_path / '_ext.py')
    (tmp_path / '_ext.py').unlink()
    (tmp_path / '_ext.abi3.so').write_bytes(b'no library')
    said = python(program, 'import mmcv._ext')
    assert said.startswith('ImportError') and '_ext.abi3.so' in said


NO_OPERATORS = '''
class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == 'mmcv._ext':
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Blocker)
'''
EARLY = '''
try:
    from mmcv.ops import nms, RoIAlign, point_sample as _points
except ModuleNotFoundError:
    def nms(*args):
        raise RuntimeError
    class RoIAlign:
        pass
    _points = None
'''


@pytest.mark.skipif(COMPILED, reason='mmcv is compiled')
def test_placeholders_of_modules_imported_before_are_replaced(tmp_path):
    package = tmp_path / 'mmseg'
    package.mkdir()
    (package / '__init__.py').write_text('')
    (package / 'early.py').write_text(EARLY)
    (package / 'user.py').write_text('from .early import RoIAlign as Align')
    program = NO_OPERATORS + 'from mmseg import early, user; sys.meta_path.remove(Blocker)'
    check = (
        'import crossformer_mm, mmcv.ops as ops',
        'print([early.nms, early.RoIAlign, early._points, user.Align]'
        ' == [ops.nms, ops.RoIAlign, ops.point_sample, ops.RoIAlign])',
    )
    assert python(program, *check, folder=tmp_path) == 'True'
    said = python(program, 'class Mine(early.RoIAlign): pass', *check, folder=tmp_path)
    assert said.startswith('ImportError') and said.endswith('import crossformer_mm first.')


@pytest.mark.skipif(COMPILED, reason='mmcv is compiled')
def test_inference_of_mmdetection_may_be_imported_before_the_package():
    said = python(
        NO_OPERATORS,
        'try:\n    import mmdet.apis, mmseg.apis\nexcept ImportError:\n    print("error"); exit()',
        'sys.meta_path.remove(Blocker)',
        'import crossformer_mm, gc, inspect; gc.collect()',
        'print([one for one in gc.get_objects() if inspect.isfunction(one) and any('
        '"requires mmcv to be compiled" in str(text) for text in one.__code__.co_consts)])',
    )
    if said == 'error':
        pytest.skip('this MMDetection has no placeholders')
    assert said == '[]'


@pytest.mark.skipif(COMPILED, reason='mmcv is compiled')
def test_without_torchvision_the_package_works_and_the_operators_say_what_to_install():
    program = 'sys.modules["torchvision"] = None; import crossformer_mm'
    assert python(program, 'print(crossformer_mm.CrossFormer)').startswith('<class')
    said = python(program, 'import mmcv.ops')
    assert said.startswith('ModuleNotFoundError: mmcv was installed without compiled operators')
    assert f'install the torchvision for PyTorch {torch.__version__}' in said


def test_a_file_in_site_packages_installs_the_finder_at_start(tmp_path, monkeypatch):
    from crossformer_mm.mmcv_ops import __main__ as command

    monkeypatch.setattr(command.sysconfig, 'get_path', lambda name: str(tmp_path))
    command.main()
    (file,) = tmp_path.glob('*.pth')
    add = f'import site; site.addsitedir({str(tmp_path)!r})'
    ask = 'print("torch" in sys.modules, sys.meta_path[-1].__name__)'
    assert python(add, ask) == 'False Finder'
    ask = 'import mmcv.ops; print(sys.modules["mmcv._ext"].__file__)'
    assert (python(add, ask) == mmcv_ops.OPERATORS) is not COMPILED
    file.write_text(file.read_text().replace('mmcv_ops', 'gone'))
    assert python(add, 'print(getattr(sys.meta_path[-1], "__name__", ""))') != 'Finder'
