"""The wheel carries configs, tools, the kernel and metafiles, where OpenMMLab's packages look for them."""

import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ..helpers import ROOT, blocks
from .builds import PIP, build_wheel, copy_of_the_project, install

# What a user does who has installed the wheel and is nowhere near a checkout.
PROGRAM = '''
from pathlib import Path
import sys
import torch
import crossformer_mm
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS, init_default_scope

here = Path(sys.argv[1])
assert here in Path(crossformer_mm.__file__).parents, crossformer_mm.__file__
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
from pathlib import Path
import sys
import torch
import crossformer_mm

assert Path(sys.argv[1]) in Path(crossformer_mm.__file__).parents, crossformer_mm.__file__
image = torch.rand(1, 3, 64, 64)
with torch.autocast('cpu', torch.bfloat16):
    crossformer_mm.CrossFormer('s')(image)
    try:
        crossformer_mm.CrossFormer('s', attention_path='native')(image)
    except ValueError as error:
        assert 'was not compiled when crossformer_mm was installed' in str(error), error
        print('whole')
'''

# And what docs/custom_projects.md shows, on the demo's models with random weights.
INFERENCERS = '''
import cv2
import numpy as np
import torch
from mmengine.hub import get_config
from mmengine.registry import MODELS, init_default_scope
import crossformer_mm

cv2.imwrite('photo.jpg', np.random.default_rng(0).integers(256, size=(70, 90, 3)))
for name, file in ('mask_rcnn', 'detector.pth'), ('upernet', 'segmentor.pth'):
    cfg = get_config(f'crossformer_mm::demo/{name}_shapes.py')
    init_default_scope(cfg.default_scope)
    meta = dict(dataset_meta=dict(cfg.test_dataloader.dataset.metainfo))
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict(), meta=meta), file)
'''
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
    assert not any('_native' in name for name in zipfile.ZipFile(wheel).namelist())
    done = run_installed(install(wheel, tmp_path / 'site'), tmp_path, NO_KERNEL)
    assert done.stdout.strip().endswith('whole'), done.stderr[-3000:]


def test_editable_install_needs_no_links(tmp_path):
    """On Windows they are for developers alone."""
    (tmp_path / 'sitecustomize.py').write_text(
        'import os\ndef refuse(*args, **kwargs):\n    raise OSError("no privilege")\n'
        'os.symlink = refuse\n'
    )
    source = copy_of_the_project(tmp_path / 'source')
    subprocess.run(
        [
            *PIP,
            'install',
            '--quiet',
            '--no-deps',
            '--no-build-isolation',
            '--target',
            tmp_path / 'site',
            '--editable',
            source,
        ],
        check=True,
        env={**os.environ, 'PYTHONPATH': str(tmp_path), 'CROSSFORMER_MM_NO_EXTENSION': '1'},
    )
    folder = source / 'crossformer_mm' / '.mim'
    assert sorted(path.name for path in folder.iterdir()) == ['configs', 'model-index.yml', 'tools']
    assert not any(path.is_symlink() for path in folder.rglob('*'))
    assert (folder / 'configs/mask_rcnn/cf_s_1x.py').is_file()


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory) -> Path:
    return install(wheel, tmp_path_factory.mktemp('site'))


def run_installed(installed: Path, folder: Path, program: str) -> subprocess.CompletedProcess:
    env = {**os.environ, 'PYTHONPATH': str(installed), 'OMP_NUM_THREADS': '1'}
    return subprocess.run(
        [sys.executable, '-c', program, installed],
        cwd=folder,
        env=env,
        text=True,
        capture_output=True,
    )


def test_config_of_the_installed_wheel_is_found_by_name(installed, tmp_path):
    done = run_installed(installed, tmp_path, PROGRAM)
    assert done.stdout.strip().endswith('whole'), done.stderr[-3000:]


def test_inferencers_take_configs_and_weights(installed, tmp_path):
    shown = [
        block
        for block in blocks(ROOT / 'docs/custom_projects.md', 'python')
        if 'Inferencer' in block
    ]
    assert len(shown) == 2
    program = '\n'.join([INFERENCERS, *shown, CHECKS])
    for full, small in (
        ('mask_rcnn/cf_s_1x', 'demo/mask_rcnn_shapes'),
        ('upernet/cf_s_160k', 'demo/upernet_shapes'),
    ):
        program = program.replace(full, small)
    done = run_installed(installed, tmp_path, program)
    assert done.stdout.strip().endswith('refused'), done.stdout + done.stderr[-3000:]
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
