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
RATES = (5e-4, 1.25e-3, 2e-4)
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


def table_of(name: str, rows: List[dict]) -> str:
    """Describe the results on a set as tables."""
    this = SETS[name]
    height, width = this.shape
    seeds = seeds_of(name)
    planned = sum(seeds.values()) + len(searched(name)) * (len(RATES) - 1)
    whole = '' if len(rows) == planned else f'**{len(rows)} of {planned} trainings so far.** '
    processors = ' and '.join(sorted({row['processor'] for row in rows}))
    lines = [
        f'{whole}Written by `python benchmarks/real_data/run.py {name}` on {processors}. '
        f'{this.metric} in % on the held-out images after the last step: mean of the seeds and its '
        '95 % interval, and the 95 % interval of what it is above CrossFormer. '
        f'Multiply-accumulates (G) are of the whole model at {height} x {width}; CPU seconds are '
        'the median of the trainings, validation included, on one thread.'
    ]
    reference = last(results(rows, 'CrossFormer'), this.unit)
    head = 'model | learning rate | seeds | parameters, M | G | CPU seconds'
    for models in (MODELS, ABLATION):
        found = {model: results(rows, model) for model in models}
        if not any(found.values()):
            continue
        lines += ['', f'| {head} | {this.metric} | minus CrossFormer |', '|---' * 8 + '|']
        for model, mine in found.items():
            if not mine:
                continue
            seconds = [row['cpu_seconds'] for row in mine if row['cpu_seconds']]
            cells = [
                model,
                f"{mine[0]['rate']:g}",
                len(mine),
                f"{mine[0]['parameters'] / 1e6:.1f}",
                f"{mine[0]['flops'] / 1e9:.2f}",
                f'{np.median(seconds):.0f}' if seconds else '',
                with_interval(last(mine, this.unit)),
                difference(last(mine, this.unit), reference) if model != 'CrossFormer' else '',
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        '',
        f"| {this.metric} at seed 0, learning rate | "
        f"{' | '.join(f'{rate:g}' for rate in sorted(RATES))} |",
        '|---' * 4 + '|',
    ]
    for model in searched(name):
        tried = {row['rate']: row for row in rows if (row['model'], row['seed']) == (model, 0)}
        cells = (
            f'{last([tried[rate]], this.unit)[0]:.1f}' if rate in tried else ''
            for rate in sorted(RATES)
        )
        lines.append(f"| {model} | {' | '.join(cells)} |")
    sized = {model: [r for r in results(rows, model) if 'sizes' in r] for model in SIZED}
    if any(sized.values()):
        sizes = ' | '.join(f'{size:g}' for size in SIZES)
        lines += ['', f'| tested at, times the size of training | {sizes} |', '|---' * 5 + '|']
        for model, mine in sized.items():
            cells = (
                with_interval([row['sizes'][f'{size:g}'] * this.unit for row in mine])
                for size in SIZES
            )
            lines.append(f"| {model} | {' | '.join(cells) if mine else ' |' * 3} |")
    return '\n'.join(lines) + '\n'


def draw(name: str, rows: List[dict], file: Path) -> None:
    """Draw the metric after each validation, mean and range of the seeds."""
    this, lines = SETS[name], []
    for model in MODELS:
        mine = results(rows, model)
        if mine:
            curves = np.array([row['curve'] for row in mine])
            scores = curves[:, :, 1] * this.unit
            band, label = (scores.min(0), scores.max(0)), f'{model}, {len(mine)} seeds'
            lines.append(dict(x=curves[0, :, 0], y=scores.mean(0), band=band, label=label))
    step = 'iteration' if name == 'camvid' else 'epoch'
    panel = dict(title=name, xlabel=step, ylabel=f'{this.metric} in %', lines=lines)
    draw_curves(file, [panel], 1)
