"""Write the model zoo from the configs, what their models cost, and docs/published.json.

    python tools/write_model_zoo.py

Written are docs/model_zoo.md, the table of configs in README.md and README_zh-CN.md, a
metafile.yml for each method and model-index.yml, which OpenMMLab's tools read. With --check,
nothing is: the program ends with a sentence if a file is not up to date.
"""

import argparse
import json
import re
import warnings
from pathlib import Path
from typing import Dict, List

import yaml
from mmengine.config import Config

from crossformer_mm.engine.command_line import fail, run
from crossformer_mm.flops import SHAPES, count

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / 'configs'
PUBLISHED = ROOT / 'docs' / 'published.json'
GENERATED = 'Written by tools/write_model_zoo.py'
README_TABLE = re.compile(
    r"(\| (?:config \| paper's result|配置文件 \| 论文结果) \| \|\n\|---\|---\|---\|\n).*?(?=\n\n)",
    flags=re.DOTALL,
)
CHINESE = {
    ' epochs ': ' 轮 ',
    'k iterations ': 'k 次迭代 ',
    ' to ': ' 至 ',
    'multi-scale': '多尺度',
}
INTRODUCTION = '''\
Every model here is one for which the authors publish a result. Results are theirs; none was
trained anew here. Detectors and segmentors start from ImageNet weights, for which the authors'
repository has links; [pretraining.md](pretraining.md) makes them. Of the 3x schedule they publish
results but no recipe: the configs have Swin's.

Parameters and FLOPs are beside the published ones. FLOPs are multiply-accumulates of convolutions,
linear layers and attention products, as `tools/get_flops.py CONFIG` counts them; a detector's
second stage has 1000 proposals and 100 masks. They are up to 3 % below the published ones, because
the authors pad the map to whole groups and here nothing is padded. G and I, the group size and the
interval of each stage, are those that the published FLOPs show; long distance attention is
`lda='interval'` where nothing else is said.'''

BASELINES = '''\
## Baselines

Backbones of MMDetection and MMSegmentation in the place of CrossFormer-S: these configs differ from
the `cf_s` config beside them in `model.backbone`, and in the channels that the neck takes, alone.
Results are those that the papers list for these backbones; the recipes behind them are not always
this one. Published parameters of a ResNet leave out its frozen layers (0.2 M), published FLOPs of
PVT and Swin on COCO the products of attention (90.1 G and 3.1 G).'''


class Model:
    """One config of the zoo beside its published results.

    Args:
        name (str): the config below ``configs/``, without ``.py``.
        published (dict): all of ``docs/published.json``.
        counted (dict): what :func:`get_flops.count` returns for it.
    """

    def __init__(self, name: str, published: dict, counted: dict):
        self.name = name
        self.folder, self.stem = name.split('/')
        self.family, self.size, self.schedule = self.stem.split('_')
        self.cfg = Config.fromfile(CONFIGS / f'{name}.py')
        self.counted = counted
        self.published = published['models'][name]
        self.method = published['methods'][self.folder]
        self.paper = published['papers'][self.family]
        self.metrics = published['metrics']

    @property
    def backbone(self) -> str:
        return f"{self.paper['name']}-{self.size.upper()}"

    @property
    def groups(self) -> str:
        backbone = self.cfg.model.backbone
        groups = ', '.join(
            '·'.join(map(str, of_stages)) for of_stages in (backbone.group_size, backbone.interval)
        )
        return groups if backbone.lda == 'interval' else f'{groups}, {backbone.lda}'

    @property
    def recipe(self) -> str:
        """Image size and length of training, read off the config."""
        steps = {step.type: step for step in self.cfg.train_pipeline}
        if 'RandomResizedCrop' in steps:
            size = '{0}x{0}'.format(steps['RandomResizedCrop'].scale)
        elif 'RandomCrop' in steps:
            height, width = steps['RandomCrop'].crop_size
            size = f'{width}x{height}'
        elif 'RandomChoiceResize' in steps:
            (longer, least), *_, (_, most) = steps['RandomChoiceResize'].scales
            size = f'{longer}x{least} to {longer}x{most}'
        else:
            size = '{}x{}'.format(*steps['Resize'].scale)
        train = self.cfg.train_cfg
        length = (
            f'{train.max_epochs} epochs'
            if 'max_epochs' in train
            else f'{train.max_iters // 1000}k iterations'
        )
        return f'{size}, {length}'


def read_models(counted: Dict[str, dict]) -> List[Model]:
    """The models of the zoo, in the order of ``docs/published.json``."""
    published = json.loads(PUBLISHED.read_text(encoding='utf-8'))
    return [Model(name, published, counted[name]) for name in published['models']]


def count_all() -> Dict[str, dict]:
    """What all models of the zoo and baselines cost, at the size of the published tables."""
    counted = {}
    published = json.loads(PUBLISHED.read_text(encoding='utf-8'))
    for name in (*published['models'], *published['baselines']):
        cfg = Config.fromfile(CONFIGS / f'{name}.py')
        counted[name] = count(cfg, SHAPES[cfg.default_scope])
    return counted


def by(models: List[Model], key) -> Dict[object, List[Model]]:
    """Models in groups of the same ``key(model)``."""
    groups = {}
    for model in models:
        groups.setdefault(key(model), []).append(model)
    return groups


def model_zoo(models: List[Model], counted: Dict[str, dict]) -> str:
    """The text of docs/model_zoo.md."""
    lines = [
        '# Model zoo',
        '',
        f"<!-- {GENERATED}; the papers' figures are in {PUBLISHED.name}. -->",
        '',
        INTRODUCTION,
    ]
    for _folder, members in by(models, lambda model: model.folder).items():
        metrics = list(members[0].published['results'])
        height, width = members[0].counted['shape']
        method = members[0].method
        lines += [
            '',
            f"## {method['name']}, {method['dataset']}, FLOPs at {height}x{width}",
            '',
            f"| config | backbone | G, I | training | parameters | published | FLOPs | "
            f"published | {' | '.join(metrics)} |",
            '|---' * (8 + len(metrics)) + '|',
        ]
        notes = []
        for model in members:
            results, mark = model.published['results'], ''
            if 'note' in model.published:
                notes.append(model.published['note'])
                mark = f' [{len(notes)}]'
            cells = [
                f'[{model.stem}](../configs/{model.name}.py){mark}',
                model.backbone,
                model.groups,
                model.recipe,
                f"{model.counted['params'] / 1e6:.1f} M",
                figure(model.published['params'], 'M'),
                f"{model.counted['flops'] / 1e9:.1f} G",
                figure(model.published['flops'], 'G'),
                *(str(results[metric]) for metric in metrics),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        for index, note in enumerate(notes, start=1):
            lines += ['', f'[{index}] {note}']
    return '\n'.join([*lines, '', *baselines(counted)]) + '\n'


def baselines(counted: Dict[str, dict]) -> List[str]:
    """The lines of docs/model_zoo.md on other backbones."""
    lines = [
        BASELINES,
        '',
        '| config | backbone | parameters | published | FLOPs | published | published result |',
        '|---' * 7 + '|',
    ]
    for name, row in json.loads(PUBLISHED.read_text(encoding='utf-8'))['baselines'].items():
        results = ', '.join(f'{value} {metric}' for metric, value in row['results'].items())
        lines.append(
            f"| [{name}](../configs/{name}.py) | {row['backbone']} | "
            f"{counted[name]['params'] / 1e6:.1f} M | {figure(row['params'], 'M')} | "
            f"{counted[name]['flops'] / 1e9:.1f} G | {figure(row['flops'], 'G')} | "
            f"{results or figure(None, '')} |"
        )
    return lines


def figure(value, unit: str) -> str:
    return '–' if value is None else f'{value} {unit}'


def readme_table(models: List[Model]) -> str:
    """The rows of README.md's table of configs, one for all sizes of a backbone."""
    rows = []
    groups = by(models, lambda model: (model.folder, model.family, model.schedule))
    for (folder, family, schedule), members in groups.items():
        sizes = ','.join(model.size for model in members)
        sizes = f'{{{sizes}}}' if len(members) > 1 else sizes
        results = ', '.join(
            f"{' / '.join(str(model.published['results'][metric]) for model in members)} {metric}"
            for metric in members[0].published['results']
        )
        rows.append(
            f'| `configs/{folder}/{family}_{sizes}_{schedule}.py` | {results} | '
            f'{members[0].recipe} |'
        )
    return '\n'.join(rows)


def with_table(readme: Path, rows: str) -> Dict[Path, str]:
    """A README's text with these rows in its table of configs."""
    text = readme.read_text(encoding='utf-8')
    return {readme: README_TABLE.sub(lambda table: table[1] + rows, text)}


def metafile(models: List[Model]) -> dict:
    """What a method's metafile.yml says."""
    entries = []
    for model in models:
        tasks = {}
        for metric, value in model.published['results'].items():
            tasks.setdefault(model.metrics[metric], {})[metric] = value
        entries.append(
            {
                'Name': f'{model.folder}_{model.stem}',
                'In Collection': model.method['name'],
                'Config': f'configs/{model.name}.py',
                'Metadata': {
                    'Training Data': model.method['dataset'],
                    'Architecture': [model.backbone, model.method['name']],
                    'Parameters': model.counted['params'],
                    'FLOPs': model.counted['flops'],
                    'Image Size': 'x'.join(map(str, model.counted['shape'])),
                },
                'Results': [
                    {'Task': task, 'Dataset': model.method['dataset'], 'Metrics': metrics}
                    for task, metrics in tasks.items()
                ],
                'Paper': {'Title': model.paper['title'], 'URL': model.paper['url']},
            }
        )
    return {'Collections': [{'Name': models[0].method['name']}], 'Models': entries}


def dump(content: dict) -> str:
    return f'# {GENERATED}.\n' + yaml.safe_dump(content, sort_keys=False, width=100)


def render(counted: Dict[str, dict]) -> Dict[Path, str]:
    """The text of every file that this program writes."""
    models = read_models(counted)
    methods = by(models, lambda model: model.folder)
    rows = readme_table(models)
    translated = rows
    for english, chinese in CHINESE.items():
        translated = translated.replace(english, chinese)
    files = {
        ROOT / 'docs' / 'model_zoo.md': model_zoo(models, counted),
        **with_table(ROOT / 'README.md', rows),
        **with_table(ROOT / 'README_zh-CN.md', translated),
        ROOT / 'model-index.yml': dump(
            {'Import': [f'configs/{folder}/metafile.yml' for folder in methods]}
        ),
    }
    files.update(
        {
            CONFIGS / folder / 'metafile.yml': dump(metafile(members))
            for folder, members in methods.items()
        }
    )
    return files


def outdated(files: Dict[Path, str]) -> List[str]:
    """Files that are not what :func:`render` says."""
    return [
        str(path.relative_to(ROOT))
        for path, text in files.items()
        if not path.is_file() or path.read_text(encoding='utf-8') != text
    ]


def main():
    parser = argparse.ArgumentParser(
        description='Write docs/model_zoo.md, the configs in both READMEs and the metafiles'
    )
    parser.add_argument('--check', action='store_true', help='write nothing, only say what is old')
    args = parser.parse_args()
    warnings.simplefilter('ignore')  # of losses, which are of no interest here
    try:
        files = render(count_all())
        old = outdated(files)
        if args.check and old:
            fail(f"not up to date: {', '.join(old)}; run 'python tools/write_model_zoo.py'.")
        for path, text in files.items():
            path.write_text(text, encoding='utf-8')
    except OSError as error:
        fail(f"'{error.filename}' could not be read or written: {error.strerror}.")


if __name__ == '__main__':
    run(main)
