"""The wheel carries configs, tools, the kernel and metafiles, where OpenMMLab's packages look for them."""

import platform
import shutil
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from ..helpers import ROOT, blocks, run_python
from .builds import build_wheel, copy_of_the_project, install, pip

# What a user does who has installed the wheel and is nowhere near a checkout.
BEGIN = '''
from pathlib import Path
import sys
import torch
import crossformer_mm

here = Path(sys.argv[1])
assert here in Path(crossformer_mm.__file__).parents, crossformer_mm.__file__
'''
PROGRAM = '''
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS, init_default_scope

cfg = get_config('crossformer_mm::mask_rcnn/cf_s_1x.py')
assert here in Path(cfg.filename).parents, cfg.filename
init_default_scope(cfg.default_scope)
with torch.device('meta'):
    model = MODELS.build(cfg.model)
assert type(model.backbone) is crossformer_mm.CrossFormer
Path('mine.py').write_text("_base_ = 'crossformer_mm::upernet/cf_s_160k.py'")
assert Config.fromfile('mine.py').model.decode_head.type == 'UPerHead'
print('whole')
'''

NO_KERNEL = '''
image = torch.rand(1, 3, 64, 64)
with torch.autocast('cpu', torch.bfloat16):
    crossformer_mm.CrossFormer('s')(image)
    try:
        crossformer_mm.CrossFormer('s', attention_path='native')(image)
    except ValueError as error:
        assert 'was not compiled when crossformer_mm was installed' in str(error), error
        print('whole')
'''

# After what docs/custom_projects.md shows, on the demo's models with random weights.
CHECKS = '''
assert len(found['labels']) == len(found['scores']) == len(found['masks']) > 0
assert labels.shape == (70, 90) and labels.max() < 5

class Marker:
    def __reduce__(self):
        return (open, ('marker', 'w'))

torch.save(dict(state_dict={}, extra=Marker()), 'detector.pth')
try:
    DetInferencer(get_config('crossformer_mm::demo/mask_rcnn_shapes.py'), weights='detector.pth')
except ValueError as error:
    assert 'was not run' in str(error), error
    print('refused')
'''


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp('wheel'))


def test_wheel_has_every_config_and_tool(wheel):
    inside = {
        name.split('.mim/')[1] for name in zipfile.ZipFile(wheel).namelist() if '/.mim/' in name
    }
    there = {
        path.relative_to(ROOT).as_posix()
        for pattern in 'configs/**/*.py configs/**/*.yml tools/*.py tools/*.sh *-index.yml'.split()
        for path in ROOT.glob(pattern)
    }
    assert inside == there


@pytest.mark.skipif(
    platform.system() != 'Linux' or platform.machine() != 'x86_64',
    reason='the kernel is for x86-64, and compiled with options of GCC and Clang',
)
def test_wheel_has_the_kernel_for_every_python(wheel):
    assert '-cp39-abi3-linux_x86_64' in wheel.name
    assert 'crossformer_mm/kernels/_native.abi3.so' in zipfile.ZipFile(wheel).namelist()


def test_without_a_compiler_the_wheel_has_no_kernel_and_works(tmp_path):
    wheel = build_wheel(tmp_path, CC='false', CXX='false')
    assert not any('/_native.' in name for name in zipfile.ZipFile(wheel).namelist())
    run_installed(install(wheel, tmp_path / 'site'), tmp_path, NO_KERNEL, 'whole')


def test_editable_install_needs_no_links(tmp_path):
    """On Windows they are for developers alone."""
    (tmp_path / 'sitecustomize.py').write_text(
        'import os\ndef refuse(*args, **kwargs):\n    raise OSError("no privilege")\n'
        'os.symlink = refuse\n'
    )
    source = copy_of_the_project(tmp_path / 'source')
    options = ('--no-deps --no-build-isolation --target', tmp_path / 'site', '--editable', source)
    pip('install', *options, PYTHONPATH=str(tmp_path), CROSSFORMER_MM_NO_EXTENSION='1')
    folder = source / 'crossformer_mm' / '.mim'
    assert sorted(path.name for path in folder.iterdir()) == ['configs', 'model-index.yml', 'tools']
    assert not any(path.is_symlink() for path in folder.rglob('*'))
    assert (folder / 'configs/mask_rcnn/cf_s_1x.py').is_file()


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory) -> Path:
    return install(wheel, tmp_path_factory.mktemp('site'))


def run_installed(installed: Path, folder: Path, program: str, last: str) -> None:
    """Run a program with the package of a folder; ``last`` is what it prints at its end."""
    done = run_python('-c', BEGIN + program, installed, folder=folder, PYTHONPATH=str(installed))
    assert done.stdout.strip().endswith(last), done.stdout + done.stderr[-3000:]


def test_config_of_the_installed_wheel_is_found_by_name(installed, tmp_path):
    run_installed(installed, tmp_path, PROGRAM, 'whole')


def test_inferencers_take_configs_and_weights(
    installed, random_detector, random_segmentor, tmp_path
):
    shutil.copy(random_detector, tmp_path / 'detector.pth')
    shutil.copy(random_segmentor, tmp_path / 'segmentor.pth')
    image = np.random.default_rng(0).integers(256, size=(70, 90, 3))
    cv2.imwrite(str(tmp_path / 'photo.jpg'), image)
    page = ROOT / 'docs/custom_projects.md'
    shown = [block for block in blocks(page, 'python') if 'Inferencer' in block]
    assert len(shown) == 2
    program = '\n'.join([*shown, CHECKS])
    for full, small in (
        ('mask_rcnn/cf_s_1x', 'demo/mask_rcnn_shapes'),
        ('upernet/cf_s_160k', 'demo/upernet_shapes'),
    ):
        program = program.replace(full, small)
    run_installed(installed, tmp_path, program, 'refused')
    assert not (tmp_path / 'marker').exists()
    written = {
        path.relative_to(tmp_path / 'predictions').as_posix()
        for path in (tmp_path / 'predictions').rglob('*.*')
    }
    assert written == {'vis/photo.jpg', 'pred/00000000_pred.png'}


def test_an_editable_install_leads_to_the_folders_beside_the_package():
    folder = ROOT / 'crossformer_mm' / '.mim'
    assert {path.name: path.resolve() for path in folder.iterdir()} == {
        name: ROOT.resolve() / name for name in ('configs', 'tools', 'model-index.yml')
    }
