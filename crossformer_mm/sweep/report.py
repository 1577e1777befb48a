"""Record, table and picture of a sweep."""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from mmengine.config import Config

from ..errors import UserError
from ..files import write_whole
from .settings import name_of

# Shown if no metric is asked for, as far as the evaluator has them.
METRICS = ('coco/bbox_mAP', 'coco/segm_mAP', 'mIoU')


class Column(NamedTuple):
    """Cost of a result by its key: a column of the table, and an axis of the picture if it has a
    label."""

    key: str
    heading: str
    width: int
    form: str
    factor: float
    label: str = ''

    def cell(self, result: dict) -> str:
        value = result[self.key]  # no memory is known of a CPU
        return f"{self.form.format(value * self.factor) if value else '–':>{self.width}}"


COLUMNS = (
    Column('seconds', 'time', 11, '{:.1f} ms', 1e3, 'milliseconds per image'),
    Column('backbone_seconds', 'of backbone', 13, '{:.1f} ms', 1e3),
    Column('peak_memory', 'memory', 11, '{:.0f} MiB', 2**-20, 'peak memory in MiB, {device}'),
    Column('backbone_flops', 'FLOPs of backbone', 19, '{:.2f} G', 1e-9),
)


def identity(cfg: Config, config: str, checkpoint: str, images: int) -> dict:
    """Return what results are of: model, data and machine."""
    return dict(
        config=config,
        digest=hashlib.sha256(repr(cfg.to_dict()).encode()).hexdigest()[:16],
        checkpoint=checkpoint,
        written=os.stat(checkpoint).st_mtime,
        images=images,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU',
        threads=torch.get_num_threads(),
    )


class Record:
    """The results of a sweep by setting, kept in a file.

    Args:
        file (Path): JSON that earlier sweeps may have written.
        of (dict): what :func:`identity` returns.

    Raises:
        UserError: the file is of another model, other data or another machine, or no record.
    """

    def __init__(self, file: Path, of: dict):
        self.file, self.of = file, of
        self.results: Dict[str, dict] = {}
        if not file.is_file():
            return
        try:
            record = json.loads(file.read_text(encoding='utf-8'))
            same = record['of'] == of
            self.results = {name_of(result): result for result in record['settings']}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"--out: '{file}' is no result of this tool; name another folder, or remove it."
            ) from None
        if not same:
            raise UserError(
                f"--out: '{file}' is of another model, other data or another machine; name "
                'another folder, or remove it.'
            )

    def measured(self, setting: dict) -> Optional[dict]:
        """Return the metrics of a setting; None: it is to be measured, or failed."""
        return self.results.get(name_of(setting), {}).get('metrics')

    def add(self, result: dict) -> None:
        """Keep a result, in the file too."""
        self.results[name_of(result)] = result
        content = dict(of=self.of, settings=list(self.results.values()))
        write_whole(self.file, json.dumps(content, indent=1).encode())


def shown_metrics(asked: Sequence[str], results: Sequence[dict]) -> List[str]:
    """Choose the metrics of table and picture."""
    there = next((list(result['metrics']) for result in results if result.get('metrics')), [])
    return [name for name in asked or METRICS if name in there] or there[:1]


def table(results: Sequence[dict], metrics: Sequence[str]) -> str:
    """Format a line for each setting, with a star at the config's own."""
    width = max(len(name_of(result)) for result in results)
    lines = [
        f"{'':6}{'setting':{width}}"
        + ''.join(f'{name:>15}' for name in metrics)
        + ''.join(f'{column.heading:>{column.width}}' for column in COLUMNS)
    ]
    for number, result in enumerate(results, start=1):
        line = f"{number:3} {'*' if result['own'] else ' '} {name_of(result):{width}}"
        if 'error' in result:
            lines.append(f"{line}  failed: {result['error']}")
            continue
        lines.append(
            line
            + ''.join(f"{result['metrics'].get(name, float('nan')):15.4g}" for name in metrics)
            + ''.join(column.cell(result) for column in COLUMNS)
        )
    return '\n'.join([*lines, '* as in the config'])


def pareto(points: Sequence[tuple]) -> List[tuple]:
    """Return the Pareto front of points (cost, value), by cost."""
    best: List[tuple] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or value > best[-1][1]:
            best.append((cost, value))
    return best


def draw(results: Sequence[dict], metrics: Sequence[str], of: dict, path: Path) -> None:
    """Write a PNG that plots each metric, in a row of axes, against time and memory. The numbers
    are those of the table; ``config``, ``images`` and ``device`` of a :class:`Record`'s ``of`` are
    shown."""
    import matplotlib

    matplotlib.use('agg')
    import matplotlib.pyplot as plt

    drawn = [column for column in COLUMNS if column.label]
    figure, axes = plt.subplots(
        len(metrics), 2, figsize=(11, 4.2 * len(metrics) + 0.5), squeeze=False, layout='constrained'
    )
    names = [
        f"{number}  {name_of(result)}{' (as in the config)' if result['own'] else ''}"
        for number, result in enumerate(results, start=1)
    ]
    handles: dict = {}  # of the legend
    for metric, row in zip(metrics, axes):
        for column, axis in zip(drawn, row):
            # Three digits: smaller differences are noise.
            points = {
                number: (
                    float(f'{result[column.key] * column.factor:.3g}'),
                    result['metrics'][metric],
                )
                for number, result in enumerate(results, start=1)
                if result.get(column.key) is not None and metric in result['metrics']
            }
            front = pareto(list(points.values()))
            if len(front) > 1:
                (handles['Pareto front'],) = axis.step(
                    *zip(*front), where='post', color='0.55', linestyle='--', zorder=1
                )
            for number, point in points.items():
                handles[names[number - 1]] = draw_point(axis, number, point, results)
            axis.set(xlabel=column.label.format(**of), ylabel=metric)
            axis.margins(0.15)
            axis.grid(alpha=0.3)
    order = [name for name in (*names, 'Pareto front') if name in handles]
    figure.legend(
        [handles[name] for name in order],
        order,
        loc='outside lower center',
        ncols=2,
        fontsize=8,
        frameon=False,
    )
    figure.suptitle(
        f"{Path(of['config']).stem} at other groups, {of['images']} images", fontweight='bold'
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    write_whole(path, buffer.getvalue())


def draw_point(axis, number: int, point: Tuple[float, float], results: Sequence[dict]):
    """Draw one result: colour by group size, marker by definition, black edge if the config's."""
    result = results[number - 1]
    sizes = list(dict.fromkeys(tuple(one['group_size']) for one in results))
    definitions = list(dict.fromkeys(one['lda'] for one in results))
    colour = f"C{sizes.index(tuple(result['group_size'])) % 10}"
    # Points may coincide: each number is written in another direction.
    away = 14 * np.exp(2.4j * number)
    axis.annotate(
        str(number),
        point,
        (away.real, away.imag),
        ha='center',
        va='center',
        textcoords='offset points',
        fontsize=9,
        color=colour,
        fontweight='bold',
        zorder=4,
    )
    return axis.scatter(
        *point,
        s=200 if result['own'] else 70,
        zorder=2 if result['own'] else 3,
        marker='osD^'[definitions.index(result['lda'])],
        alpha=0.85,
        linewidths=2,
        color=colour,
        edgecolors='black' if result['own'] else 'white',
    )
