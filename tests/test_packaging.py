"""The wheel carries configs, tools and metafiles, where OpenMMLab's packages look for them."""
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '--no-cache-dir']

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


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'  # a copy, for a build leaves folders behind
    source.mkdir()
    for name in ('setup.py', 'README.md', 'LICENSE', 'model-index.yml'):
        shutil.copy(ROOT / name, source)
    for name in ('crossformer_mm', 'configs', 'tools'):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    subprocess.run([*PIP, 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '--wheel-dir',
                    folder, source], check=True)
    wheel, = folder.glob('crossformer_mm-*.whl')
    return wheel


def test_wheel_has_every_config_and_tool(wheel):
    inside = {name.split('.mim/')[1] for name in zipfile.ZipFile(wheel).namelist()
              if '/.mim/' in name}
    there = {path.relative_to(ROOT).as_posix()
             for pattern in ('configs/**/*.py', 'configs/**/*.yml', 'tools/*.py', 'tools/*.sh',
                             'model-index.yml') for path in ROOT.glob(pattern)}
    assert inside == there - {'tools/write_model_zoo.py'}


def test_config_of_the_installed_wheel_is_found_by_name(wheel, tmp_path):
    subprocess.run([*PIP, 'install', '--quiet', '--no-deps', '--target', tmp_path / 'site', wheel],
                   check=True)
    env = {**os.environ, 'PYTHONPATH': str(tmp_path / 'site'), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', PROGRAM, tmp_path / 'site'], cwd=tmp_path,
                          env=env, text=True, capture_output=True)
    assert done.stdout.strip().endswith('whole'), done.stderr[-3000:]


def test_links_of_the_checkout_lead_to_the_folders_beside_the_package():
    folder = ROOT / 'crossformer_mm' / '.mim'
    assert {path.name: path.resolve() for path in folder.iterdir()} == {
        name: ROOT.resolve() / name for name in ('configs', 'tools', 'model-index.yml')}
