"""Write the model zoo from the configs, what their models cost, and docs/model_zoo.json.

    python docs/write_model_zoo.py

It writes docs/model_zoo.md and docs/model_zoo.zh.md, the table of configs in README.md and
README_zh-CN.md, a metafile.yml for each method, and model-index.yml, which OpenMMLab's tools read.
"""

import json
import re
import warnings
from pathlib import Path
from typing import Dict, List, NamedTuple

import yaml
from mmengine.config import Config

from crossformer_mm.flops import SHAPES, count

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / 'configs'
PUBLISHED = ROOT / 'docs' / 'model_zoo.json'
GENERATED = 'Written by docs/write_model_zoo.py'
# Folder, family and schedule of the models that the READMEs list.
IN_README = (
    ('retinanet', 'cf', '1x'),
    ('mask_rcnn', 'cf', '1x'),
    ('mask_rcnn', 'cfpp', '1x'),
    ('upernet', 'cf', '160k'),
    ('imagenet', 'cf', '300e'),
)
README_TABLE = re.compile(
    r"(\| (?:config \| published result|配置文件 \| 报告的结果) \|.*?\|\n\|---\|---\|---\|---\|\n)"
    r".*?(?=\n\n)",
    flags=re.DOTALL,
)


class Words(NamedTuple):
    """Texts of the written files in one language.

    Args:
        suffix (str): of the names of pages in this language, and of notes in model_zoo.json.
        phrases (dict): translations of phrases inside a table's cells.
        title, introduction, baselines (str): of the model zoo.
        columns, baseline_columns (str): heads of the tables, up to the metrics.
        heading (str): of a method, from ``method``, ``dataset``, ``height`` and ``width``.
        weights (str): head of the last column.
        none (str): where the authors offer no weights.
        note (str): of the model zoo, on the links to weights.
    """

    suffix: str
    phrases: Dict[str, str]
    title: str
    introduction: str
    columns: str
    heading: str
    weights: str
    none: str
    note: str
    baselines: str
    baseline_columns: str

    def __call__(self, cell: str) -> str:
        for english, own in self.phrases.items():
            cell = cell.replace(english, own)
        return cell


ENGLISH = Words(
    suffix='',
    phrases={},
    title='Model zoo',
    introduction='''\
This project is an independent implementation that loads the authors' released weights. Each model
here is one for which the authors publish a result. The results are theirs; none was retrained here.
Detectors and segmentors start from ImageNet weights, the authors' (links under "Image classifier")
or [your own](pretraining.md). The authors publish results of the 3x schedule but no recipe: these
configs use Swin's.

Parameters and FLOPs stand next to the published ones. FLOPs are multiply-accumulates of
convolutions, linear layers and attention products, as `tools/get_flops.py CONFIG` counts them; a
detector's second stage has 1000 proposals and 100 masks. They are up to 3 % below the published
ones, because the authors pad the map to whole groups and nothing is padded here. G and I are the
group size and the interval of each stage, as the published FLOPs show them; long distance
attention is `lda='interval'` unless the table says otherwise.''',
    columns='config | backbone | G, I | training | parameters | published | FLOPs | published',
    heading='{method}, {dataset}, FLOPs at {height}x{width}',
    weights="authors' weights",
    none='none',
    note='''\
Links are the authors' own, with Baidu's extraction key in parentheses; the files load as
downloaded. Save a file under the name before its links, which the commands of these pages use.
Where the table says none, the authors offer no file. They give the same link for CrossFormer++-L
and ++-H.''',
    baselines='''\
## Baselines

MMDetection's and MMSegmentation's own backbones instead of CrossFormer-S. Each config differs
from the `cf_s` config next to it only in `model.backbone` and in the channels that the neck takes.
The results are those that the authors list for these backbones; the recipes behind them are not
always this one. The README's table has MMDetection's own results. Published parameters of a ResNet
leave out its frozen layers (0.2 M), and published FLOPs of PVT and Swin on COCO leave out the
products of attention (90.1 G and 3.1 G).''',
    baseline_columns='config | backbone | parameters | published | FLOPs | published | '
    'published result',
)
CHINESE = Words(
    suffix='.zh',
    phrases={
        ' epochs': ' 轮',
        'k iterations': 'k 次迭代',
        ' to ': ' 至 ',
        'multi-scale': '多尺度',
        'Image classifier': '图像分类',
        'Baidu': '百度网盘',
    },
    title='模型库',
    introduction=(
        '本项目为非官方实现，可加载原作者权重。这里列出的都是原作者报告过结果的模型。'
        '表中的结果均为原作者报告的数值，本项目没有重新训练。'
        '检测和分割模型以 ImageNet 预训练权重初始化：可以使用原作者权重'
        '（链接见“图像分类”一节），也可以[自行预训练](pretraining.md)。'
        '原作者报告了 3x 训练的结果，但没有公布训练方案，这里采用 Swin 的方案。\n\n'
        '参数量和 FLOPs 与报告的数值并列。FLOPs 为卷积、线性层和注意力矩阵乘法的乘加次数，'
        '由 `tools/get_flops.py CONFIG` 统计；检测器的第二阶段按 1000 个候选框和 100 个掩码计算。'
        '统计值比报告值最多低 3 %，因为原作者会把特征图填充到完整的分组，而这里不做填充。'
        'G 和 I 是各阶段的组大小和间隔，由报告的 FLOPs 推断得出；'
        "除非表中另有说明，长距离注意力均采用 `lda='interval'`。"
    ),
    columns='配置文件 | 主干网络 | G, I | 训练设置 | 参数量 | 报告值 | FLOPs | 报告值',
    heading='{method}，{dataset}，FLOPs 按 {height}x{width} 计算',
    weights='原作者权重',
    none='无',
    note=(
        '链接均由原作者提供，括号内为百度网盘的提取码；下载后可直接加载。'
        '文件名与文档中的命令一致：请以该名称保存文件。'
        '标为“无”的模型，原作者没有提供权重。'
        '原作者为 CrossFormer++-L 和 ++-H 给出的是同一个链接。'
    ),
    baselines=(
        '## 基线\n\n'
        '用 MMDetection 和 MMSegmentation 自带的主干网络代替 CrossFormer-S。'
        '这些配置文件与同目录的 `cf_s` 配置相比，只有 `model.backbone` 以及 neck 的输入通道数不同。'
        '结果为原作者列出的数值，其训练方案不一定与这里相同。'
        'README 的表格采用 MMDetection 自己的结果。'
        '报告的 ResNet 参数量不含冻结层（0.2 M）；'
        '报告的 PVT 和 Swin 在 COCO 上的 FLOPs 不含注意力矩阵乘法（90.1 G 和 3.1 G）。'
    ),
    baseline_columns='配置文件 | 主干网络 | 参数量 | 报告值 | FLOPs | 报告值 | 报告的结果',
)
LANGUAGES = (ENGLISH, CHINESE)


class Model:
    """One config of the zoo next to its published results.

    Args:
        name (str): the config below ``configs/``, without ``.py``.
        published (dict): all of ``docs/model_zoo.json``.
        counted (dict): what :func:`crossformer_mm.flops.count` returns for it.
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
    def file(self) -> str:
        """Name of the authors' weights in the commands of the pages: theirs of classifiers."""
        if self.folder == 'imagenet':
            return f"crossformer-{'pp-' * (self.family == 'cfpp')}{self.size}.pth"
        method, dataset = self.folder.replace('_', '-'), self.method['dataset'].lower()
        return f'{method}-{self.family}-{self.size}-{dataset}-{self.schedule}.pth'

    def weights(self, words: Words) -> str:
        """File name of the authors' weights and links to them; empty if there are none."""
        offered = self.published.get('weights', {})
        links = []
        if 'google' in offered:
            links.append(f"[Google]({offered['google']})")
        if 'baidu' in offered:
            links.append(f"[{words('Baidu')}]({offered['baidu']}) ({offered['key']})")
        return f"`{self.file}`: {', '.join(links)}" if links else ''

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
    """Read the models of the zoo, in the order of ``docs/model_zoo.json``."""
    published = json.loads(PUBLISHED.read_text(encoding='utf-8'))
    return [Model(name, published, counted[name]) for name in published['models']]


def count_all() -> Dict[str, dict]:
    """Count parameters and FLOPs of all models and baselines at the sizes of the published."""
    counted = {}
    published = json.loads(PUBLISHED.read_text(encoding='utf-8'))
    for name in (*published['models'], *published['baselines']):
        cfg = Config.fromfile(CONFIGS / f'{name}.py')
        counted[name] = count(cfg, SHAPES[cfg.default_scope])
    return counted


def by(models: List[Model], key) -> Dict[object, List[Model]]:
    """Group models by ``key(model)``."""
    groups = {}
    for model in models:
        groups.setdefault(key(model), []).append(model)
    return groups


def model_zoo(models: List[Model], counted: Dict[str, dict], words: Words) -> str:
    """Return the text of docs/model_zoo.md in a language."""
    lines = [
        f'# {words.title}',
        '',
        f"<!-- {GENERATED}; the papers' figures are in {PUBLISHED.name}. -->",
        '',
        words.introduction,
        '',
        words.note,
    ]
    for _folder, members in by(models, lambda model: model.folder).items():
        metrics = list(members[0].published['results'])
        height, width = members[0].counted['shape']
        method = members[0].method
        lines += [
            '',
            '## '
            + words.heading.format(
                method=words(method['name']), dataset=method['dataset'], height=height, width=width
            ),
            '',
            f"| {words.columns} | {' | '.join(map(words, metrics))} | {words.weights} |",
            '|---' * (9 + len(metrics)) + '|',
        ]
        notes = []
        for model in members:
            results, mark = model.published['results'], ''
            if 'note' in model.published:
                notes.append(model.published[f'note{words.suffix}'])
                mark = f' [{len(notes)}]'
            cells = [
                f'[{model.stem}](../configs/{model.name}.py){mark}',
                model.backbone,
                model.groups,
                words(model.recipe),
                f"{model.counted['params'] / 1e6:.1f} M",
                figure(model.published['params'], 'M'),
                f"{model.counted['flops'] / 1e9:.1f} G",
                figure(model.published['flops'], 'G'),
                *(str(results[metric]) for metric in metrics),
                model.weights(words) or words.none,
            ]
            lines.append(f"| {' | '.join(cells)} |")
        for index, note in enumerate(notes, start=1):
            lines += ['', f'[{index}] {note}']
    return '\n'.join([*lines, '', *baselines(counted, words)]) + '\n'


def baselines(counted: Dict[str, dict], words: Words) -> List[str]:
    """Return the lines of docs/model_zoo.md on other backbones."""
    lines = [words.baselines, '', f'| {words.baseline_columns} |', '|---' * 7 + '|']
    for name, row in json.loads(PUBLISHED.read_text(encoding='utf-8'))['baselines'].items():
        results = ', '.join(f'{value} {words(metric)}' for metric, value in row['results'].items())
        lines.append(
            f"| [{name}](../configs/{name}.py) | {row['backbone']} | "
            f"{counted[name]['params'] / 1e6:.1f} M | {figure(row['params'], 'M')} | "
            f"{counted[name]['flops'] / 1e9:.1f} G | {figure(row['flops'], 'G')} | "
            f"{results or figure(None, '')} |"
        )
    return lines


def figure(value, unit: str) -> str:
    return '–' if value is None else f'{value} {unit}'


def readme_table(models: List[Model], words: Words) -> str:
    """Return the rows of a README's table of configs, one for all sizes of a backbone."""
    rows = []
    groups = by(models, lambda model: (model.folder, model.family, model.schedule))
    for folder, family, schedule in IN_README:
        members = groups[folder, family, schedule]
        sizes = ','.join(model.size for model in members)
        sizes = f'{{{sizes}}}' if len(members) > 1 else sizes
        results = ', '.join(
            f"{' / '.join(str(model.published['results'][metric]) for model in members)} "
            f'{words(metric)}'
            for metric in members[0].published['results']
        )
        offered = '; '.join(filter(None, (model.weights(words) for model in members)))
        rows.append(
            f'| `configs/{folder}/{family}_{sizes}_{schedule}.py` | {results} | '
            f'{words(members[0].recipe)} | {offered or words.none} |'
        )
    return '\n'.join(rows)


def with_table(readme: Path, rows: str) -> Dict[Path, str]:
    """Return a README's text with these rows in its table of configs."""
    text = readme.read_text(encoding='utf-8')
    return {readme: README_TABLE.sub(lambda table: table[1] + rows, text)}


def metafile(models: List[Model]) -> dict:
    """Return the content of a method's metafile.yml."""
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
    """Return the text of every file that this program writes."""
    models = read_models(counted)
    methods = by(models, lambda model: model.folder)
    files = {
        **{
            ROOT / 'docs' / f'model_zoo{words.suffix}.md': model_zoo(models, counted, words)
            for words in LANGUAGES
        },
        **with_table(ROOT / 'README.md', readme_table(models, ENGLISH)),
        **with_table(ROOT / 'README_zh-CN.md', readme_table(models, CHINESE)),
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


def main():
    warnings.simplefilter('ignore')  # of losses, which do not matter here
    for path, text in render(count_all()).items():
        path.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main()
