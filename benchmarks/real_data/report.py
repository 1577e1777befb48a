"""Tables and curves of the results of run.py."""

from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Tuple

import numpy as np
from common import draw_curves
from models import ABLATION, MODELS
from scipy import stats


class Set(NamedTuple):
    """A data set: its metric, the metric's key in logs and its factor to %, and its images."""

    metric: str
    key: str
    unit: float
    shape: Tuple[int, int]


SETS = {
    'bccd': Set('box AP', 'coco/bbox_mAP', 100.0, (144, 192)),
    'camvid': Set('mIoU', 'mIoU', 1.0, (144, 192)),
    'nuclei': Set('mask AP', 'coco/segm_mAP', 100.0, (256, 256)),
}
RATES = (5e-4, 1.25e-3, 3e-3)
SEEDS = {'CrossFormer': 5, 'Swin': 5}
OTHER_SEEDS = 3
# Same attention and linear layers: the learning rate of CrossFormer serves.
SAME_RATE = ('CrossFormer, block', *ABLATION)
SIZES = (0.75, 1.0, 1.5, 2.0)
SIZED = ('CrossFormer', 'relative position bias', 'no position bias')


def seeds_of(name: str) -> Dict[str, int]:
    """Return the number of seeds of each model that is trained on a set."""
    models = [*MODELS, *(ABLATION if name == 'camvid' else ())]
    return {model: SEEDS.get(model, OTHER_SEEDS) for model in models}


def searched(name: str) -> List[str]:
    """Return the models of a set whose learning rate is searched for."""
    return [model for model in seeds_of(name) if model not in SAME_RATE]


def planned(name: str) -> int:
    """Return the number of trainings on a set."""
    return sum(seeds_of(name).values()) + len(searched(name)) * (len(RATES) - 1)


def best_rate(rows: Iterable[dict], model: str) -> float:
    """Return the learning rate with the highest last metric at seed 0."""
    model = 'CrossFormer' if model in SAME_RATE else model
    first = [row for row in rows if row['model'] == model and row['seed'] == 0]
    return max(first, key=lambda row: row['curve'][-1][1])['rate']


def results(rows: List[dict], model: str) -> List[dict]:
    """Return the results of a model at its best learning rate, by seed; none: not trained yet."""
    rows_of_model = [row for row in rows if row['model'] == model]
    if not rows_of_model:
        return []
    rate = best_rate(rows, model)
    return sorted(
        (row for row in rows_of_model if row['rate'] == rate), key=lambda row: row['seed']
    )


def last(rows: List[dict], unit: float) -> List[float]:
    """Return the last metric of each training, in %."""
    return [row['curve'][-1][1] * unit for row in rows]


def with_interval(values: List[float]) -> str:
    """Format a mean and half its 95 % interval, by Student's t."""
    if len(values) < 2:
        return f'{np.mean(values):.1f}'
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f'{np.mean(values):.1f} ± {half:.1f}'


def difference(values: List[float], others: List[float]) -> str:
    """Format the 95 % interval of a difference of means, by Welch's t."""
    if min(len(values), len(others)) < 2:
        return ''
    test = stats.ttest_ind(values, others, equal_var=False)
    low, high = test.confidence_interval()
    return f'{low:+.1f} to {high:+.1f}'


def markdown(head: Iterable, rows: Iterable[Iterable]) -> List[str]:
    """Return the lines of a table after an empty one; none for a table without rows."""
    first, *rest = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows)]
    return ['', first, '|---' * (first.count(' | ') + 1) + '|', *rest] if rest else []


def comparison(name: str, rows: List[dict], models: Iterable[str]) -> List[str]:
    """Describe the models that were trained."""
    this, cells = SETS[name], []
    reference = last(results(rows, 'CrossFormer'), this.unit)
    for model in models:
        mine = results(rows, model)
        if mine:
            scores = last(mine, this.unit)
            seconds = [row['cpu_seconds'] for row in mine if row['cpu_seconds']]
            cells.append(
                (
                    model,
                    f"{mine[0]['rate']:g}",
                    len(mine),
                    f"{mine[0]['parameters'] / 1e6:.1f}",
                    f"{mine[0]['flops'] / 1e9:.2f}",
                    f'{np.median(seconds):.0f}' if seconds else '',
                    with_interval(scores),
                    difference(scores, reference) if model != 'CrossFormer' else '',
                )
            )
    head = 'model', 'learning rate', 'seeds', 'parameters, M', 'G', 'CPU seconds', this.metric
    return markdown((*head, 'minus CrossFormer'), cells)


def search(name: str, rows: List[dict]) -> List[str]:
    """Describe the search for learning rates."""
    first = {(r['model'], r['rate']): r['curve'][-1][1] for r in rows if r['seed'] == 0}
    rates = sorted(RATES)
    cells = [
        [model]
        + [
            f'{first[model, rate] * SETS[name].unit:.1f}' if (model, rate) in first else ''
            for rate in rates
        ]
        for model in searched(name)
    ]
    head = f'{SETS[name].metric} at seed 0, learning rate', *(f'{rate:g}' for rate in rates)
    return markdown(head, cells)


def other_sizes(name: str, rows: List[dict]) -> List[str]:
    """Describe the tests at other image sizes."""
    cells = []
    for model in SIZED:
        sizes = [row['sizes'] for row in results(rows, model) if 'sizes' in row]
        if sizes:
            metrics = ([each[f'{size:g}'] * SETS[name].unit for each in sizes] for size in SIZES)
            cells.append([model, *map(with_interval, metrics)])
    return markdown(['tested at, times the size of training', *SIZES], cells)


def table_of(name: str, rows: List[dict]) -> str:
    """Describe the results on a set as tables."""
    this, of = SETS[name], planned(name)
    so_far = '' if len(rows) == of else f'**{len(rows)} of {of} trainings so far.** '
    text = (
        f'{so_far}Written by `python benchmarks/real_data/run.py {name}` on '
        f"{' and '.join(sorted({row['processor'] for row in rows}))}. {this.metric} in % on the "
        'held-out images after the last step: mean of the seeds and its 95 % interval, and the '
        '95 % interval of its difference from that of CrossFormer. Multiply-accumulates (G) are '
        f"of the whole model at {' x '.join(map(str, this.shape))}; CPU seconds are the median of "
        'the trainings, validation included, on one thread.'
    )
    lines = [text, *comparison(name, rows, MODELS), *comparison(name, rows, ABLATION)]
    return '\n'.join([*lines, *search(name, rows), *other_sizes(name, rows)]) + '\n'


def draw(name: str, rows: List[dict], file: Path) -> None:
    """Draw the metric after each validation, mean and range of the seeds."""
    this, lines = SETS[name], []
    for model in MODELS:
        mine = results(rows, model)
        if mine:
            curves = np.array([row['curve'] for row in mine])
            scores = curves[:, :, 1] * this.unit
            band, label = (scores.min(0), scores.max(0)), f'{model}, seeds: {len(mine)}'
            lines.append(dict(x=curves[0, :, 0], y=scores.mean(0), band=band, label=label))
    step = 'iteration' if name == 'camvid' else 'epoch'
    ticks = lines[0]['x']
    panel = dict(title=name, xlabel=step, ylabel=f'{this.metric} in %', xticks=ticks, lines=lines)
    draw_curves(file, [panel], 1)
