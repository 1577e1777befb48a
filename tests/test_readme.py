"""What README.md says is so."""
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from crossformer_mm import ARCHITECTURES, CrossFormer

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')


def blocks(language: str) -> list:
    return re.findall(rf'```{language}\n(.*?)```', README, flags=re.DOTALL)


def rows(first_column: str) -> list:
    """Cells of the table whose head starts with a column."""
    table = README.split(f'| {first_column} |', 1)[1].split('\n\n', 1)[0]
    return [[cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]]
            for line in table.splitlines()[2:]]


def test_config_snippet_works_on_a_config_of_mmdetection(tmp_path):
    snippet, = [block for block in blocks('python') if 'custom_imports' in block]
    (tmp_path / 'mine.py').write_text(
        "_base_ = 'mmdet::_base_/models/faster-rcnn_r50_fpn.py'\n"
        "default_scope = 'mmdet'\n" + snippet)
    cfg = Config.fromfile(tmp_path / 'mine.py')
    assert cfg.model.backbone.init_cfg.checkpoint == 'crossformer-s.pth'
    assert 'depth' not in cfg.model.backbone
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        features = model.extract_feat(torch.rand(1, 3, 70, 90))
    assert [tuple(feature.shape[-2:]) for feature in features] == [
        (18, 23), (9, 12), (5, 6), (3, 3), (2, 2)]


def test_plain_pytorch_snippet_gives_the_shapes_it_names():
    snippet, = [block for block in blocks('python') if 'import torch' in block]
    names = {}
    exec(snippet, names)
    said = re.findall(r'\((\d+), (\d+), (\d+), (\d+)\)', snippet.split('#')[1])
    assert [tuple(feature.shape) for feature in names['features']] == [
        tuple(map(int, shape)) for shape in said]


def test_constructor_table_has_every_option_with_its_default():
    said = {}
    for names, defaults, _ in rows('option | default'):
        names, defaults = re.findall(r'`(.+?)`', names), re.findall(r'`(.+?)`', defaults)
        said.update(zip(names, (eval(default) for default in defaults), strict=True))
    parameters = inspect.signature(CrossFormer).parameters
    assert said == {name: parameter.default for name, parameter in parameters.items()}


def test_architecture_table_is_that_of_the_code():
    said = {}
    for name, dims, depths, heads, drop_path, size in rows('arch | channels'):
        numbers = [tuple(map(int, cell.split(','))) for cell in (depths, heads)]
        said[name.strip('`')] = (int(dims), *numbers, float(drop_path), size)
    assert set(said) == set(ARCHITECTURES)
    for name, arch in ARCHITECTURES.items():
        with torch.device('meta'):
            millions = sum(p.numel() for p in CrossFormer(name).parameters()) / 1e6
        assert said[name] == (arch['embed_dims'], arch['depths'], arch['num_heads'],
                              arch['drop_path_rate'], f'{millions:.1f} M')


@pytest.fixture(scope='module')
def options() -> dict:
    """The options that each tool says it has."""
    found = {}
    for tool in ('train', 'test'):
        said = subprocess.run([sys.executable, f'tools/{tool}.py', '--help'], cwd=ROOT, text=True,
                              capture_output=True, check=True).stdout
        found[tool] = set(re.findall(r'--[a-z-]+', said))
    return found


def test_options_table_is_that_of_the_tools(options):
    said = {'train': {'--help'}, 'test': {'--help'}}
    for names, tools, _ in rows('option | of'):
        for tool in ('train', 'test') if tools == 'both' else (tools, ):
            said[tool] |= set(re.findall(r'--[a-z-]+', names))
    assert said == {tool: options[tool] for tool in said}


def test_config_table_names_the_configs_that_exist():
    said = set()
    for config, *_ in rows("config | paper's result"):
        stem, letters, rest = re.fullmatch(r'`([^{]*)(?:\{(.*)\}(.*))?`', config).groups('')
        said |= {f'{stem}{letter}{rest}' for letter in letters.split(',')}
    there = {str(path.relative_to(ROOT)) for path in ROOT.glob('configs/[!_d]*/*.py')}
    assert said == there


@pytest.mark.parametrize('folder', ['crossformer_mm'])
def test_list_of_files_is_complete(folder):
    said = set(re.findall(r'^ *(?:crossformer_mm/ +)?(\w+\.py|kernels/) ', README, re.MULTILINE))
    there = {path.name + '/' * path.is_dir() for path in (ROOT / folder).iterdir()
             if not path.name.startswith(('__', '.'))}
    assert said == there - {'version.py'}
