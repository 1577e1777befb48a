"""Gather the results of the study's trainings in one file and a table."""

import json
from pathlib import Path
from typing import Callable, Dict, List

import numpy as np
from experiments import EXPERIMENTS, OPTIONS, TRAININGS, Test
from scipy import stats

from crossformer_mm.errors import UserError
from crossformer_mm.files import check_writable, write_whole

BASE = 'dynamic'  # compared with the others
AT_HOME = Test('scaled').name
TRAINED = {'single': 'trained at one size', 'mixed': 'trained at 0.5 to 1.5'}
INTRODUCTION = '''# Scores of every training

Mean ± standard deviation over seeds; then the mean difference to `dynamic` with the same seed and \
its 95 % interval (Student's t), in bold where that leaves 0 out; then the same of the change from \
the training size. No correction for the number of comparisons: one in twenty is bold by chance. \
Written by `study.py --report`.

## What positions contribute

Score at the training size minus that of the same model whose position bias, or map, is taken away \
for the test.
'''


class Scores:
    """Metrics of all trainings: ``scores(experiment, training, option, test)`` by seed."""

    def __init__(self, runs: List[dict]):
        keys = ('experiment', 'training', 'option', 'seed')
        self.runs = dict(sorted((tuple(run[key] for key in keys), run['scores']) for run in runs))

    def __call__(self, *key: str) -> Dict[int, float]:
        *start, test = key
        found = {run[3]: scores for run, scores in self.runs.items() if run[:3] == tuple(start)}
        return {seed: scores[test] for seed, scores in found.items() if test in scores}

    def beside(self, experiment: str, *key: str) -> Dict[int, float]:
        """Return the same, or that of the experiment beside if this one leaves an option out."""
        return self(experiment, *key) or self(EXPERIMENTS[experiment].beside, *key)

    def has(self, *start: str) -> bool:
        return any(run[: len(start)] == start for run in self.runs)

    def options(self, *start: str) -> List[str]:
        return [option for option in OPTIONS if self.has(*start, option)]

    def kinds(self) -> List[tuple]:
        return [(e, t) for e in EXPERIMENTS for t in TRAININGS if self.has(e, t)]


def less(values: Dict[int, float], base: Dict[int, float]) -> Dict[int, float]:
    """Return ``values - base`` of each seed that both have."""
    return {seed: values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())}


def spread(values: Dict[int, float]) -> str:
    """Format the mean and the standard deviation over seeds."""
    scores = list(values.values())
    if not scores:
        return ''
    return f'{np.mean(scores):.1f}' + (f' ± {np.std(scores, ddof=1):.1f}' if scores[1:] else '')


def difference(values: Dict[int, float], base: Dict[int, float]) -> str:
    """Format the mean difference to ``base`` over common seeds, with its 95 % interval.

    In bold where the interval, of Student's t, leaves 0 out.
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


def rows_of(heading: str, rows: List[str], options: List[str], cell: Callable) -> List[str]:
    return [
        f'| {heading} | {" | ".join(options)} |',
        '|---' * (len(options) + 1) + '|',
        *(f'| {row} | {" | ".join(cell(row, option) for option in options)} |' for row in rows),
        '',
    ]


def table(scores: Scores) -> str:
    """Write the text of table.md."""

    def contribution(kind: str, option: str) -> str:
        tests = (Test('scaled'), Test('scaled', without_position=True))
        return difference(*(scores(*kind.split(', '), option, test.name) for test in tests))

    kinds = [', '.join(kind) for kind in scores.kinds()]
    there = {run[2] for run in scores.runs} - {'none'}
    lines = [INTRODUCTION, *rows_of('', kinds, [o for o in OPTIONS if o in there], contribution)]
    for kind in scores.kinds():

        def values(test, option, kind=kind):
            return scores(*kind, option, test)

        def beside(test, option, kind=kind):
            return scores.beside(*kind, option, test)

        def change(test, option, beside=beside):
            return less(beside(test, option), beside(AT_HOME, option))

        options = scores.options(*kind)
        others = [option for option in options if option != BASE]
        tests = list(next(s for run, s in scores.runs.items() if run[0] == kind[0]))
        counts = ', '.join(f'{option} {len(values(tests[0], option))}' for option in options)
        title = f'{EXPERIMENTS[kind[0]].label}, {TRAINED[kind[1]]}'
        lines += [f'## {title}', '', f'Seeds: {counts}.', '']
        lines += rows_of('test', tests, options, lambda *cell, v=values: spread(v(*cell)))
        if beside(AT_HOME, BASE) and others:
            for heading, of in (
                (f'minus {BASE}', beside),
                (f'change from {AT_HOME}, minus that of {BASE}', change),
            ):
                rows = [test for test in tests if of is beside or test != AT_HOME]
                lines += rows_of(
                    heading,
                    rows,
                    others,
                    lambda test, option, of=of: difference(of(test, option), of(test, BASE)),
                )
    return '\n'.join(lines) + '\n'


def write_report(out: Path, folder: Path) -> None:
    """Write results.json and table.md from the files of trainings in ``out``."""
    files = sorted((out / 'jobs').glob('[!.]*.json'))
    if not files:
        raise UserError(f"--out: '{out}' holds no results yet.")
    plan, runs = (out / 'plan.json').read_text(), [file.read_text() for file in files]
    check_writable('--report-to', folder)
    lines = ',\n'.join(runs)
    text = f'{{"plan": {plan},\n"runs": [\n{lines}\n]}}\n'
    write_whole(folder / 'results.json', text.encode())
    write_whole(folder / 'table.md', table(Scores(json.loads(text)['runs'])).encode())
    print(f"{len(runs)} trainings gathered in '{folder}'")
