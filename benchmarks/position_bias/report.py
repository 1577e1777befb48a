"""Gather the results of the study's trainings: one file of figures, a table, pictures."""

import json
from pathlib import Path
from typing import Dict, List

import numpy as np
from experiments import EXPERIMENTS, OPTIONS, TRAININGS, Test
from scipy import stats

from crossformer_mm.engine.errors import fail

BASE = 'dynamic'  # what the others are compared with
AT_HOME = Test('scaled').name
COLOURS = dict(zip(OPTIONS, ('#d62728', '#ff9f1c', '#1f77b4', '#2ca02c', '#7f7f7f')))
WAYS = {'scaled': 'image and objects scaled', 'canvas': 'larger or smaller canvas, same objects'}
TRAINED = {'single': 'trained at one size', 'mixed': 'trained at 0.5 to 1.5'}


class Scores:
    """``scores(experiment, training, option, test)``: the metric by seed."""

    def __init__(self, runs: List[dict]):
        self.runs = {
            (run['experiment'], run['training'], run['option'], run['seed']): run for run in runs
        }

    def __call__(self, experiment: str, training: str, option: str, test: str) -> Dict[int, float]:
        return {
            key[3]: run['scores'][test]
            for key, run in sorted(self.runs.items())
            if key[:3] == (experiment, training, option) and test in run['scores']
        }

    def beside(self, experiment: str, training: str, option: str, test: str) -> Dict[int, float]:
        """The same, or that of the experiment beside where this one leaves an option out."""
        return self(experiment, training, option, test) or self(
            EXPERIMENTS[experiment].beside, training, option, test
        )

    def has(self, *start: str) -> bool:
        return any(key[: len(start)] == start for key in self.runs)

    def tests(self, experiment: str) -> List[str]:
        return list(
            next(run['scores'] for key, run in sorted(self.runs.items()) if key[0] == experiment)
        )


def gather(out: Path) -> dict:
    """What the trainings have left in a folder."""
    files = sorted((out / 'jobs').glob('[!.]*.json'))
    if not files:
        fail(f"--out: '{out}' holds no results yet.")
    return dict(
        plan=json.loads((out / 'plan.json').read_text()),
        runs=[json.loads(file.read_text()) for file in files],
    )


def less(values: Dict[int, float], base: Dict[int, float]) -> Dict[int, float]:
    """``values - base`` of each seed that both have."""
    return {seed: values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())}


def spread(values: Dict[int, float]) -> str:
    """Mean and standard deviation over seeds."""
    values = list(values.values())
    if not values:
        return ''
    return f'{np.mean(values):.1f}' + (f' ± {np.std(values, ddof=1):.1f}' if values[1:] else '')


def difference(values: Dict[int, float], base: Dict[int, float]) -> str:
    """Mean difference to ``base`` over common seeds, with its 95 % interval of Student's t.

    In bold where the interval leaves 0 out.
    """
    pairs = list(less(values, base).values())
    if not pairs:
        return ''
    mean = np.mean(pairs)
    if len(pairs) < 2:
        return f'{mean:+.1f}'
    half = stats.t.ppf(0.975, len(pairs) - 1) * np.std(pairs, ddof=1) / len(pairs) ** 0.5
    mark = '**' if abs(mean) > half else ''
    return f'{mark}{mean:+.1f}{mark} [{mean - half:+.1f}, {mean + half:+.1f}]'


def rows_of(heading: str, tests: List[str], options, cell) -> List[str]:
    return [
        f'| {heading} | {" | ".join(options)} |',
        '|---' * (len(options) + 1) + '|',
        *(f'| {test} | {" | ".join(cell(test, option) for option in options)} |' for test in tests),
        '',
    ]


def table(scores: Scores) -> str:
    lines = [
        '# Scores of every training',
        '',
        'Mean ± standard deviation over seeds; then the mean difference to `dynamic` with the '
        "same seed and its 95 % interval (Student's t), in bold where that leaves 0 out; then "
        'the same of the change from the training size. No correction for the number of '
        'comparisons: one in twenty is bold by chance. Written by `study.py --report`.',
        '',
        *used(scores),
    ]
    for experiment, training in ((e, t) for e in EXPERIMENTS for t in TRAININGS):
        if not scores.has(experiment, training):
            continue
        options = [option for option in OPTIONS if scores.has(experiment, training, option)]
        tests = scores.tests(experiment)

        def values(test, option):
            return scores(experiment, training, option, test)

        counts = ', '.join(f'{option} {len(values(tests[0], option))}' for option in options)
        lines += [
            f'## {EXPERIMENTS[experiment].label}, {TRAINED[training]}',
            '',
            f'Seeds: {counts}.',
            '',
        ]
        lines += rows_of('test', tests, options, lambda test, option: spread(values(test, option)))
        others = [option for option in options if option != BASE]

        def beside(test, option):
            return scores.beside(experiment, training, option, test)

        if beside(AT_HOME, BASE) and others:
            lines += rows_of(
                f'minus {BASE}',
                tests,
                others,
                lambda test, option: difference(beside(test, option), beside(test, BASE)),
            )

            def change(test, option):
                return less(beside(test, option), beside(AT_HOME, option))

            lines += rows_of(
                f'change from {AT_HOME}, minus that of {BASE}',
                [test for test in tests if test != AT_HOME],
                others,
                lambda test, option: difference(change(test, option), change(test, BASE)),
            )
    return '\n'.join(lines)


def used(scores: Scores) -> List[str]:
    """What taking the positions away costs each option."""

    def cell(kind, option):
        with_positions, without = (
            scores(*kind.split(', '), option, test.name)
            for test in (Test('scaled'), Test('scaled', without_position=True))
        )
        return difference(with_positions, without)

    kinds = [
        f'{experiment}, {training}'
        for experiment in EXPERIMENTS
        for training in TRAININGS
        if scores.has(experiment, training)
    ]
    options = [
        option
        for option in OPTIONS
        if option != 'none' and any(run[2] == option for run in scores.runs)
    ]
    return [
        '## What positions contribute',
        '',
        'Score at the training size minus that of the same '
        'model whose position bias, or map, is taken away for the test.',
        '',
        *rows_of('', kinds, options, cell),
    ]


def draw_line(axes, option: str, x: List[float], values: List[Dict[int, float]]) -> None:
    """Means with a band of one standard deviation over seeds."""
    points = [(a, list(v.values())) for a, v in zip(x, values) if v]
    if not points:
        return
    mean = np.array([np.mean(v) for _, v in points])
    half = np.array([np.std(v, ddof=1) if len(v) > 1 else 0 for _, v in points])
    x = [a for a, _ in points]
    axes.plot(
        x,
        mean,
        marker='o',
        markersize=3,
        linewidth=1.5,
        color=COLOURS[option],
        label=f'{option} ({min(len(v) for _, v in points)})',
    )
    axes.fill_between(x, mean - half, mean + half, color=COLOURS[option], alpha=0.13, linewidth=0)


def label(axes, ticks: List[float], below: str, title: str) -> None:
    axes.set_xscale('log')
    axes.minorticks_off()
    axes.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
    axes.set_xlabel(below)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)


def draw(scores: Scores, plan: dict, folder: Path) -> None:
    """For each experiment, curves against size; for all, curves against the group size."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    experiments = [name for name in EXPERIMENTS if scores.has(name)]
    for experiment in experiments:
        trainings = [training for training in TRAININGS if scores.has(experiment, training)]
        figure, grid = plt.subplots(
            len(trainings),
            2,
            figsize=(11, 4 * len(trainings)),
            sharey=True,
            squeeze=False,
            layout='constrained',
        )
        for row, training in zip(grid, trainings):
            for axes, way in zip(row, WAYS):
                for option in OPTIONS:
                    names = [
                        Test('scaled' if factor == 1 else way, factor).name
                        for factor in plan['factors']
                    ]
                    draw_line(
                        axes,
                        option,
                        plan['factors'],
                        [scores.beside(experiment, training, option, name) for name in names],
                    )
                label(
                    axes,
                    plan['factors'],
                    'test size / training size',
                    f'{TRAINED[training]}: {WAYS[way]}',
                )
            row[0].set_ylabel(EXPERIMENTS[experiment].label.rsplit(', ', 1)[1])
            row[0].legend(title='option (seeds)', fontsize=8, title_fontsize=8)
        figure.suptitle(f'{EXPERIMENTS[experiment].label}; mean and standard deviation over seeds')
        figure.savefig(folder / f'{experiment}.png', dpi=90)
        plt.close(figure)

    sizes = sorted([*plan['group_factors'], 1])
    figure, (row,) = plt.subplots(
        1,
        len(experiments),
        figsize=(4.5 * len(experiments), 4),
        squeeze=False,
        layout='constrained',
    )
    for axes, experiment in zip(row, experiments):
        for option in OPTIONS:
            names = [Test('scaled', 1, size).name for size in sizes]
            draw_line(
                axes,
                option,
                sizes,
                [scores.beside(experiment, 'single', option, name) for name in names],
            )
        label(axes, sizes, 'group size in the test / in training', EXPERIMENTS[experiment].label)
    row[0].legend(title='option (seeds)', fontsize=8, title_fontsize=8)
    figure.suptitle('Trained at one size and tested at it, with other group sizes')
    figure.savefig(folder / 'group_sizes.png', dpi=90)
    plt.close(figure)


def write_report(out: Path, folder: Path) -> None:
    """results.json, table.md and pictures from what the trainings have left in ``out``."""
    from crossformer_mm.engine.command_line import check_writable, write_whole

    results = gather(out)
    check_writable('--report-to', folder)
    lines = ',\n'.join(json.dumps(run) for run in results['runs'])
    write_whole(
        folder / 'results.json',
        f'{{"plan": {json.dumps(results["plan"])},\n"runs": [\n{lines}\n]}}\n'.encode(),
    )
    scores = Scores(results['runs'])
    write_whole(folder / 'table.md', (table(scores) + '\n').encode())
    draw(scores, results['plan'], folder)
    print(f"{len(results['runs'])} trainings gathered in '{folder}'")
