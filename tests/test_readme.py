"""What README.md says is so, and README_zh-CN.md says the same."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import List, Tuple

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from crossformer_mm import ARCHITECTURES, CrossFormer

from .test_docs import anchor

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
CHINESE = (ROOT / 'README_zh-CN.md').read_text(encoding='utf-8')


def blocks(language: str) -> list:
    return re.findall(rf'```{language}\n(.*?)```', README, flags=re.DOTALL)


def rows(first_column: str) -> list:
    """Cells of the table whose head starts with a column."""
    table = README.split(f'| {first_column} |', 1)[1].split('\n\n', 1)[0]
    return [
        [cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]]
        for line in table.splitlines()[2:]
    ]


def test_config_snippet_works_on_a_config_of_mmdetection(tmp_path):
    (snippet,) = [block for block in blocks('python') if 'custom_imports' in block]
    (tmp_path / 'mine.py').write_text(
        "_base_ = 'mmdet::_base_/models/faster-rcnn_r50_fpn.py'\n"
        "default_scope = 'mmdet'\n" + snippet
    )
    cfg = Config.fromfile(tmp_path / 'mine.py')
    assert cfg.model.backbone.init_cfg.checkpoint == 'crossformer-s.pth'
    assert 'depth' not in cfg.model.backbone
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        features = model.extract_feat(torch.rand(1, 3, 70, 90))
    assert [tuple(feature.shape[-2:]) for feature in features] == [
        (18, 23),
        (9, 12),
        (5, 6),
        (3, 3),
        (2, 2),
    ]


def test_plain_pytorch_snippet_gives_the_shapes_it_names():
    (snippet,) = [block for block in blocks('python') if 'import torch' in block]
    names = {}
    exec(snippet, names)
    said = re.findall(r'\((\d+), (\d+), (\d+), (\d+)\)', snippet.split('#')[1])
    assert [tuple(feature.shape) for feature in names['features']] == [
        tuple(map(int, shape)) for shape in said
    ]


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
        assert said[name] == (
            arch['embed_dims'],
            arch['depths'],
            arch['num_heads'],
            arch['drop_path_rate'],
            f'{millions:.1f} M',
        )


@pytest.fixture(scope='module')
def options() -> dict:
    """The options that each tool says it has."""
    found = {}
    for tool in ('train', 'test'):
        said = subprocess.run(
            [sys.executable, f'tools/{tool}.py', '--help'],
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=True,
        ).stdout
        found[tool] = set(re.findall(r'--[a-z-]+', said))
    return found


def test_options_table_is_that_of_the_tools(options):
    said = {'train': {'--help'}, 'test': {'--help'}}
    for names, tools, _ in rows('option | of'):
        for tool in ('train', 'test') if tools == 'both' else (tools,):
            said[tool] |= set(re.findall(r'--[a-z-]+', names))
    assert said == {tool: options[tool] for tool in said}


def test_config_table_names_the_configs_that_exist():
    said = set()
    for config, *_ in rows("config | paper's result"):
        stem, letters, rest = re.fullmatch(r'`([^{]*)(?:\{(.*)\}(.*))?`', config).groups('')
        said |= {f'{stem}{letter}{rest}' for letter in letters.split(',')}
    # Published CrossFormers; the variants and baselines are listed in docs/configs_and_recipes.md,
    # and the same recipes on several GPUs in docs/distributed.md.
    there = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob('configs/*/cf*_*.py')
        if not path.stem.endswith('_fsdp')
    }
    assert said == there


@pytest.mark.parametrize('folder', ['crossformer_mm'])
def test_list_of_files_is_complete(folder):
    said = set(
        re.findall(r'^ *(?:crossformer_mm/ +)?(\w+\.py|kernels/|engine/) ', README, re.MULTILINE)
    )
    there = {
        path.name + '/' * path.is_dir()
        for path in (ROOT / folder).iterdir()
        if not path.name.startswith(('__', '.'))
    }
    assert said == there - {'version.py'}


# A translation has the same pieces in the same order. Of one that has Chinese in it, code, names of
# files, figures, links and pictures are the same; of any other, everything is.


def pieces(page: str) -> List[Tuple[str, str]]:
    """Headings, paragraphs, items of lists, cells of tables and blocks of code, in turn."""
    found = []
    for part in re.split(r'^(```.*?^```)$', page, flags=re.DOTALL | re.MULTILINE):
        if part.startswith('```'):
            found.append((part.splitlines()[0], part))
            continue
        for paragraph in filter(None, re.split(r'\n\s*\n', part.strip())):
            if paragraph.startswith('|'):
                found += [
                    ('cell', cell.strip()) if cell else ('row', '')
                    for row in paragraph.splitlines()
                    for cell in re.split(r'(?<!\\)\|', row)[:-1]
                ]
            elif paragraph.startswith('#'):
                found.append((f"{paragraph.split(' ')[0]} heading", paragraph))
            else:
                items = re.split(r'\n(?=(?:[-*]|\d+\.) )', paragraph)
                found += [(re.match(r'[-*] |\d+\. |', item)[0] + 'text', item) for item in items]
    return found


def kept(kind: str, text: str, headings: List[str]) -> list:
    """What a translation leaves as it is."""
    if kind.startswith('```'):
        code = re.sub(r'(?m)(^|\s+)#.*$', '', text) if kind != '```' else ''
        names = re.findall(r'[\w.-]*(?:\d|_|[./]\w|\w/)[\w./{},*-]*', text, flags=re.ASCII)
        return [code, *sorted(name.strip('.,') for name in names)]
    links = r'\]\(([^)]+)\)|\b(?:href|src|srcset)="([^"]+)"'
    targets = [''.join(target) for target in re.findall(links, text)]
    rest = re.sub(links, '', text)
    return [
        sorted(
            str(headings.index(target[1:])) if target.startswith('#') else target
            for target in targets
        ),
        sorted(re.findall(r'!\[|<img|<picture', text)),
        sorted(re.findall(r'`[^`]+`', rest)),
        sorted(re.findall(r'\d+(?:[.,]\d+)*', re.sub(r'`[^`]+`', '', rest))),
    ]


def differences(english: str, chinese: str) -> List[str]:
    """What one README has and the other has not."""
    pages = [
        pieces(page.replace(switch, '', 1))
        for page, switch in (
            (english, '\nEnglish | [简体中文](README_zh-CN.md)\n'),
            (chinese, '\n[English](README.md) | 简体中文\n'),
        )
    ]
    headings = [[anchor(text) for kind, text in page if kind.endswith('heading')] for page in pages]
    for (kind, text), (kind_there, translated) in zip(*pages):
        if kind != kind_there:  # what follows is out of step
            return [f'{kind}: {text}\n{kind_there}: {translated}']
    found = [
        f'{kind}: {text}\n{translated}'
        for (kind, text), (_, translated) in zip(*pages)
        if (
            kept(kind, text, headings[0]) != kept(kind, translated, headings[1])
            if re.search('[\u4e00-\u9fff]', translated)
            else text != translated
        )
    ]
    shorter, longer = sorted(pages, key=len)
    return found + [f'{kind}: {text}' for kind, text in longer[len(shorter) :]]


def test_chinese_readme_says_the_same():
    assert 'English | [简体中文](README_zh-CN.md)' in README.splitlines()
    assert '[English](README.md) | 简体中文' in CHINESE.splitlines()
    found = differences(README, CHINESE)
    assert not found, '\n\n'.join(found)


@pytest.mark.parametrize(
    'old, new',
    [
        ('--auto-scale-lr \\', '--amp \\'),  # a command
        ('make demo   #', 'make show   #'),
        ('[96, 192, 384, 768]', '[96, 192, 384, 769]'),
        ('# (1, 96, 107, 160)', '# (1, 96, 107, 161)'),  # a figure in a comment
        ('mark 70', 'mark 71'),
        ('linear.py ', 'linears.py '),  # a file of the list
        ('45.4 / 47.2', '45.5 / 47.2'),  # cells
        ('2, 2, 18, 2', '2, 18, 2, 2'),
        ('| `--amp [bfloat16]` | train', '| `--fp16` | train'),
        ('| `(7, 7, 7, 7)`', '| `(8, 8, 8, 8)`'),
        ('| `--tta` ', '| `--flip` | test | flips |\n| `--tta` '),  # a row
        ('\n## Predictions\n', '\n### Predictions\n'),
        ('\n## Predictions\n', '\n'),
        ('less than 10 minutes', 'less than 11 minutes'),
        ('docs/model_zoo.md) has', 'docs/how_it_works.md) has'),  # a link
        ('\nLicence:', '\n![curves](benchmarks/curves.png)\n\nLicence:'),
        ('\nLicence:', '\n<img src="benchmarks/curves.png">\n\nLicence:'),
        ('\n\nPut the data', '\n\nA paragraph.\n\nPut the data'),
        ('\n- `lda=\'block\'`', '\n- An item.\n- `lda=\'block\'`'),
    ],
)
def test_a_change_of_one_readme_alone_is_noticed(old, new):
    assert old in README
    assert differences(README.replace(old, new, 1), CHINESE)


def test_a_readme_that_goes_on_is_noticed():
    assert differences(README + '\nA paragraph.\n', CHINESE)
    assert differences(README, CHINESE + '\n一段话。\n')
