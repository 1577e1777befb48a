"""README.md and the tables of docs/ are true, and the Chinese pages give the same facts."""

import copy
import inspect
import json
import re
from pathlib import Path

import mmdet
import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config

from crossformer_mm import ARCHITECTURES, CrossFormer, __version__

from ..helpers import README, ROOT, TRANSLATED, blocks, build_model, load_script

DOCS = ROOT / 'docs'
PROCESSORS = ('amd-zen4', 'amd-zen4-avx2')
PUBLISHED = json.loads((DOCS / 'model_zoo.json').read_text())
# Of each page that has a Chinese version: both.
PAIRS = [
    (page.with_name(re.sub(r'(\.zh|_zh-CN)\.md$', '.md', page.name)), page) for page in TRANSLATED
]


def rows(first_column: str, page: Path = README) -> list:
    """Cells of the table whose head starts with a column."""
    text = page.read_text(encoding='utf-8')
    table = text.split(f'| {first_column} |', 1)[1].split('\n\n', 1)[0]
    return [
        [cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]]
        for line in table.splitlines()[2:]
    ]


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding='utf-8')


def zoo_line(config: str) -> str:
    """The line of the model zoo that has a config."""
    (line,) = re.findall(rf'^.*/configs/{config}\.py.*$', text_of('model_zoo.md'), re.MULTILINE)
    return line


def code_of(page: Path, start: str) -> str:
    """The first block of Python code that begins so."""
    return next(block for block in blocks(page, 'python') if block.startswith(start))


def test_config_snippet_works_on_a_config_of_mmdetection(tmp_path):
    (snippet,) = [block for block in blocks(README, 'python') if 'custom_imports' in block]
    (tmp_path / 'mine.py').write_text(snippet)
    cfg = Config.fromfile(tmp_path / 'mine.py')
    assert cfg.model.backbone.init_cfg.checkpoint == 'crossformer-s.pth'
    assert 'depth' not in cfg.model.backbone
    ours = Config.fromfile(ROOT / 'configs/mask_rcnn/cf_s_1x.py')
    assert cfg.optim_wrapper == ours.optim_wrapper
    assert cfg.auto_scale_lr.base_batch_size == 16
    with torch.no_grad():
        features = build_model(cfg).extract_feat(torch.rand(1, 3, 70, 90))
    sizes = [tuple(feature.shape[-2:]) for feature in features]
    assert sizes == [(18, 23), (9, 12), (5, 6), (3, 3), (2, 2)]


def test_constructor_table_has_every_option_with_its_default():
    said = {}
    for names, defaults, _ in rows('option | default', DOCS / 'backbone.md'):
        names, defaults = re.findall(r'`(.+?)`', names), re.findall(r'`(.+?)`', defaults)
        said.update(zip(names, (eval(default) for default in defaults), strict=True))
    parameters = inspect.signature(CrossFormer).parameters
    assert said == {name: parameter.default for name, parameter in parameters.items()}


def test_architecture_table_is_that_of_the_code():
    table = {row[0].strip('`'): row[1:] for row in rows('arch | channels', DOCS / 'backbone.md')}
    assert set(table) == set(ARCHITECTURES)
    for name, (dims, depths, heads, drop_path, size) in table.items():
        depths, heads = (tuple(map(int, cell.split(','))) for cell in (depths, heads))
        said = dict(embed_dims=int(dims), depths=depths, num_heads=heads)
        assert dict(said, drop_path_rate=float(drop_path)).items() <= ARCHITECTURES[name].items()
        with torch.device('meta'):
            millions = sum(p.numel() for p in CrossFormer(name).parameters()) / 1e6
        assert size == f'{millions:.1f} M'


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_options_table_is_that_of_the_tools(output_of, tool):
    table = rows('option | tool', DOCS / 'configs_and_recipes.md')
    listed = '--help ' + ' '.join(names for names, tools, _ in table if tools in (tool, 'both'))
    there = output_of(f'{tool}.py', '--help')
    assert set(re.findall(r'--[a-z-]+', listed)) == set(re.findall(r'--[a-z-]+', there))


def test_the_picture_is_what_its_command_draws(tmp_path):
    from PIL import Image, ImageFilter

    pytest.importorskip('skimage')  # has the photo
    kept = DOCS / 'pictures/overview.jpg'
    assert kept.stat().st_size < 300_000
    load_script(kept.with_suffix('.py')).main(tmp_path / kept.name)
    # Blurred: versions of Matplotlib set letters and edges of pixels otherwise.
    drawn, kept = (
        np.asarray(Image.open(path).convert('RGB').filter(ImageFilter.BoxBlur(4)), dtype=float)
        for path in (tmp_path / kept.name, kept)
    )
    assert drawn.shape == kept.shape
    assert abs(drawn - kept).mean() < 1  # of 255


@pytest.fixture(scope='module')
def measured() -> dict:
    """Cells of benchmarks/cpu/ by processor, size, mode and model."""
    found = {}
    for table in ROOT.glob('benchmarks/cpu/*/table.md'):
        head = r'\*\*(\d+x\d+)(?:, batch 1)?, (infer|train), float32\*\*\n\n'
        parts = re.findall(rf'{head}(.*?)(?=\n\n|\Z)', table.read_text(), flags=re.DOTALL)
        for size, mode, part in parts:
            heads, _, *lines = (
                [cell.strip() for cell in row.split('|')] for row in part.strip().split('\n')
            )
            for line in lines:
                cells = dict(zip(heads, line))
                found[table.parent.name, size, mode, cells['model']] = cells
    return found


def of_mmdetection(folder: str, name: str) -> tuple:
    """Box AP and mask AP of MMDetection's model, from the metafile that it installs."""
    metafile = Path(mmdet.__file__).parent / '.mim/configs' / folder / 'metafile.yml'
    models = yaml.safe_load(metafile.read_text(encoding='utf-8'))['Models']
    (model,) = [model for model in models if model['Name'] == name]
    return tuple(ap for result in model['Results'] for ap in result['Metrics'].values())


def test_comparison_gives_what_was_measured(measured):
    """Times are those of the benchmark, AP that of the papers and of MMDetection."""
    found = {name: cells for name, *cells in rows('measure | CrossFormer-S')}
    times = found['inference on a CPU, times Swin-T']
    for model, place in (('crossformer_s', 0), ('resnet_50', 3)):
        cells = [measured[one, '800x1216', 'infer', model] for one in PROCESSORS]
        assert times[place] == ', '.join(row['time / Swin-T'] for row in cells)

    models = PUBLISHED['models']
    ours, plus = (
        [models[f'mask_rcnn/{name}_1x']['results'][key] for key in ('box AP', 'mask AP')]
        for name in ('cf_s', 'cfpp_s')
    )
    swin = of_mmdetection('swin', 'mask-rcnn_swin-t-p4-w7_fpn_1x_coco')
    resnet = of_mmdetection('mask_rcnn', 'mask-rcnn_r50_fpn_1x_coco')
    reported = found['Mask R-CNN 1x, box / mask AP, as reported']
    assert reported == ['{} / {}'.format(*results) for results in (ours, plus, swin, resnet)]
    for place, name in enumerate(('cf_s', 'cfpp_s', 'swin_t', 'r50')):
        for cost in ('Mask R-CNN, parameters', 'Mask R-CNN, FLOPs at 800x1280'):
            assert f'| {found[cost][place]} |' in zoo_line(f'mask_rcnn/{name}_1x')


def test_the_page_on_speed_gives_what_was_measured(measured):
    models = {
        "CrossFormer-S, `lda='interval'`": 'crossformer_s',
        'the same with `with_cp=True`': 'crossformer_s-with_cp',
        "CrossFormer-S, `lda='block'`": 'crossformer_s-block',
        'Swin-T': 'swin_t',
        'ResNet-50': 'resnet_50',
    }
    tables = text_of('speed.md').split('| | inference |')[1:]
    for processor, table in zip(PROCESSORS, tables, strict=True):
        lines = table.split('\n\n')[0].splitlines()[2:]
        known = [m for m in models.values() if (processor, '800x1216', 'train', m) in measured]
        assert len(lines) == len(known) >= 4
        for line in lines:
            name, *said = [cell.strip() for cell in line.split('|')[1:-1]]
            expected = []
            for mode in ('infer', 'train'):
                row = measured.get((processor, '800x1216', mode, models[name]))
                ratio = '1' if name == 'Swin-T' else row and row['time / Swin-T']
                timed = row and row['time'] != '–'
                expected += [f"{float(row['time'].split()[0]):.2f} s", ratio] if timed else ['', '']
            memory = row['memory / Swin-T'].split()[0]
            expected += [row['peak memory'], '1' if name == 'Swin-T' else memory]
            assert said == expected


def test_the_page_on_deployment_gives_what_was_measured():
    table = (ROOT / 'benchmarks/deployment/amd-zen4/table.md').read_text(encoding='utf-8')
    measured = [
        [cell.strip(' *') for cell in line.split('|')[1:-1]]
        for line in table.splitlines()
        if line.startswith('| ') and not line.startswith(('| way', '| Swin'))
    ]
    said = rows('CrossFormer-S | CPU time', DOCS / 'deployment.md')
    assert [[row[0].replace('`--fixed-shape`', 'fixed size'), *row[1:]] for row in said] == measured
    ratios = '{} of its CPU time in ONNX Runtime, {} in OpenVINO'
    assert ratios.format(*(row[3] for row in measured[-2:])) in text_of('deployment.md')


def test_preprocessing_is_that_of_the_configs():
    mean, deviation = (
        [float(cell) for cell in row[1:]] for row in rows('channel | R', DOCS / 'backbone.md')
    )
    names = {}
    exec(code_of(DOCS / 'backbone.md', 'model = '), names)
    for config in ('mask_rcnn/cf_s_1x', 'retinanet/cf_s_1x', 'upernet/cf_s_160k'):
        cfg = Config.fromfile(ROOT / f'configs/{config}.py')
        used = cfg.model.data_preprocessor
        assert used.bgr_to_rgb and (used.mean, used.std) == (mean, deviation)
        kept = copy.deepcopy(used)
        cfg.merge_from_dict(dict(model=names['model']))  # the page's snippet changes nothing
        assert cfg.model.data_preprocessor == kept


def test_plain_pytorch_of_the_page_on_the_backbone_runs(tmp_path, monkeypatch):
    code = code_of(DOCS / 'backbone.md', 'import torch')
    torch.save(dict(model=CrossFormer('s').state_dict()), tmp_path / 'crossformer-s.pth')
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    said = re.findall(r'\(\d+, \d+, \d+, \d+\)', code.split('\n# ')[1])
    assert [str(tuple(feature.shape)) for feature in names['features']] == said


def test_weights_are_where_the_authors_offer_them():
    """Every link that the data have, beside its model, and no other; the READMEs have some."""
    offered = [
        model['weights'][host]
        for model in PUBLISHED['models'].values()
        for host in ('google', 'baidu')
        if host in model.get('weights', {})
    ]
    for page in [*PAIRS[0], DOCS / 'model_zoo.md', DOCS / 'model_zoo.zh.md']:
        text = page.read_text(encoding='utf-8')
        links = re.findall(r'\]\((https://(?:drive\.google|pan\.baidu)\.com[^)]*)\)', text)
        if page.parent == DOCS:
            assert links == offered, page.name
        assert links and set(links) <= set(offered), page.name
    for name, model in PUBLISHED['models'].items():
        has = model.get('weights', {})
        plus, imagenet = '/cfpp_' in name, name.startswith('imagenet/')
        assert ('google' in has) == (not plus and '_3x' not in name), name
        assert ('baidu' in has) == (imagenet or 'google' in has), name


def test_list_of_files_is_complete():
    text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    block = text.split('## Where a change belongs')[1].split('```')[1]
    said = set(re.findall(r'(?<![\w/.])(\w+\.py|\w+/)(?=,| )', block))
    there = {
        path.name + '/' * path.is_dir()
        for path in (ROOT / 'crossformer_mm').iterdir()
        if not path.name.startswith(('__', '.'))
    }
    assert there - {'version.py'} <= said
    folders = [ROOT / folder for folder in ('', 'docs', 'tests', 'tools')]
    known = {path.name for folder in folders for path in folder.iterdir()}
    known |= {path.name for path in (ROOT / 'crossformer_mm').rglob('*')}
    assert {name.rstrip('/') for name in said} <= known


def test_the_version_is_one():
    changes = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    released = re.findall(r'^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$', changes, re.MULTILINE)
    assert released[0][0] == __version__
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    assert (citation['version'], str(citation['date-released'])) == released[0]


def test_the_address_is_one():
    (address,) = re.findall(r'^Repository = "(.*)"$', (ROOT / 'pyproject.toml').read_text(), re.M)
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    assert citation['repository-code'] == address
    assert f'repo_url: {address}\n' in (ROOT / 'mkdocs.yml').read_text(encoding='utf-8')


# A translation is written for its readers, not sentence by sentence: what it shares are facts.


def facts(page: Path) -> dict:
    """Code without its comments; links; figures of tables, and those of the text that were measured."""
    text, code = page.read_text(encoding='utf-8'), re.compile('^```.*?^```$', re.DOTALL | re.M)
    rest = code.sub('', text)
    targets = [
        re.sub(r'(\.zh|_zh-CN)?\.md(#.*)?$', '.md', target.replace('#language=zh', ''))
        for target in re.findall(r'\]\(([^)#][^)]*)\)', rest)
    ]
    rest = re.sub(r'\]\([^)]*\)', ']', rest)
    tables = re.findall(r'^\|.*', rest, re.MULTILINE)
    prose = re.sub(r'(?m)^\|.*', '', rest)
    return {
        'code': [re.sub(r'(?m)(^|\s+)#.*$', '', block) for block in code.findall(text)],
        'links': sorted(targets),
        'tables': [
            (sorted(re.findall(r'`[^`]+`', line)), re.findall(r'\d+(?:\.\d+)?', line))
            for line in tables
        ],
        'names': sorted(set(re.findall(r'`[^`]+`', prose))),
        'figures': sorted(set(re.findall(r'\d+\.\d+|\d{3,}', re.sub(r'`[^`]+`', '', prose)))),
        'headings': re.findall(r'^#+(?= )', rest, re.MULTILINE),
    }


@pytest.mark.parametrize('english, chinese', PAIRS, ids=lambda page: page.name)
def test_a_translation_gives_the_same_facts(english, chinese):
    expected, found = facts(english), facts(chinese)
    for kind, value in expected.items():
        assert found[kind] == value, f'{chinese.name}: {kind}'


@pytest.mark.parametrize(
    'kind, fact',
    [
        ('code', '--out model.onnx'),
        ('tables', r'(?<=^\| any size, OpenVINO \| )[\d.]+'),
        ('figures', '[\\d.]+(?= of its CPU time)'),
        ('names', '`size`'),
        ('links', r'(?<=\]\()\.\./benchmarks'),
        ('headings', '^## '),
    ],
)
def test_a_fact_that_is_changed_in_one_language_is_noticed(kind, fact, tmp_path):
    text = text_of('deployment.md')
    changed = re.sub(fact, '### 0 ', text, flags=re.MULTILINE)
    assert changed != text
    (tmp_path / 'other.md').write_text(changed, encoding='utf-8')
    assert facts(tmp_path / 'other.md')[kind] != facts(DOCS / 'deployment.md')[kind]


def test_each_language_leads_to_the_other():
    english, chinese = (page.read_text(encoding='utf-8') for page in PAIRS[0])
    assert '(README_zh-CN.md)' in english and '(README.md)' in chinese
