"""Write the tables of docs/position_bias_study.md from results.json, between their markers.

python benchmarks/position_bias/page.py

`study.py` does so, too, when it writes the results that are kept here.
"""

import json
import re
import sys
from pathlib import Path
from typing import Callable, Dict, List

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools'), str(Path(__file__).resolve().parent)]

from report import AT_HOME, Scores, difference, less, rows_of, spread  # noqa: E402
from study import EXPERIMENTS, OPTIONS, TRAININGS, Test  # noqa: E402

from crossformer_mm.engine.command_line import write_whole  # noqa: E402
from crossformer_mm.engine.errors import fail  # noqa: E402

PAGE = ROOT / 'docs' / 'position_bias_study.md'
RESULTS = Path(__file__).resolve().parent / 'results' / 'results.json'
SEEDS = 5
# Where only positions count: what a column is called, its experiment and option.
COLUMNS = {
    '`dynamic`': ('pairs', 'dynamic'),
    '`dynamic_residual`': ('pairs', 'dynamic_residual'),
    '`relative`, x 20': ('pairs_fast', 'relative'),
    '`relative`, x 5': ('pairs', 'relative'),
    '`absolute`, x 20': ('pairs_fast', 'absolute'),
    '`absolute`, x 5': ('pairs', 'absolute'),
    '`none`': ('pairs', 'none'),
}
PAIRS_TESTS = [
    test.name
    for test in (
        *(Test('scaled', factor) for factor in (1, 0.5, 2, 3)),
        Test('scaled', 2, 2),
        *(Test('canvas', factor) for factor in (0.5, 2, 3)),
        Test('canvas', 3, 1, 3),
        *(Test('scaled', 1, factor) for factor in (0.5, 2)),
        Test('scaled', without_position=True),
    )
]
KEY_TESTS = [test.name for test in (Test('canvas', 3), Test('scaled', 3), Test('scaled', 2, 2))]
SHAPES_TESTS = [
    test.name
    for test in (
        *(Test('scaled', factor) for factor in (1, 0.5, 2, 3)),
        *(Test('canvas', factor) for factor in (0.5, 3)),
    )
]


def mean(values: Dict[int, float]) -> float:
    return float(np.mean(list(values.values())))


def with_change(values: Dict[int, float], base: Dict[int, float]) -> str:
    """Mean and standard deviation, and the mean of the differences to ``base``."""
    pairs = less(values, base)
    return spread(values) + (f' ({mean(pairs):+.1f})' if pairs else '')


def seeds_of(counts: Dict[str, int]) -> str:
    """A sentence on how many seeds stand behind each column."""
    if len(set(counts.values())) == 1:
        return f'{next(iter(counts.values()))} seeds of each.'
    return 'Seeds: ' + ', '.join(f'{name} {count}' for name, count in counts.items()) + '.'


def pairs_table(scores: Scores, training: str) -> List[str]:
    """Scores where only positions count, with their change from the training size."""
    columns = {name: key for name, key in COLUMNS.items() if has(scores, training, *key)}

    def cell(test: str, column: str) -> str:
        experiment, option = columns[column]
        values = scores(experiment, training, option, test)
        at_home = scores(experiment, training, option, AT_HOME)
        return spread(values) if test == AT_HOME else with_change(values, at_home)

    counts = {
        name: len(scores(experiment, training, option, AT_HOME))
        for name, (experiment, option) in columns.items()
    }
    return [*rows_of('test', PAIRS_TESTS, columns, cell), seeds_of(counts)]


def has(scores: Scores, training: str, experiment: str, option: str) -> bool:
    return bool(scores(experiment, training, option, AT_HOME))


def left(scores: Scores) -> List[str]:
    """How much of what positions are worth at the training size is left at other sizes."""
    columns = {
        name: key
        for name, key in COLUMNS.items()
        if has(scores, 'single', *key) and key[1] != 'none'
    }
    none = {test: mean(scores('pairs', 'single', 'none', test)) for test in (AT_HOME, *KEY_TESTS)}

    def worth(test: str, column: str) -> float:
        experiment, option = columns[column]
        return mean(scores(experiment, 'single', option, test)) - none[test]

    # Of an option that learnt nothing of positions there is nothing to be left.
    columns = {name: key for name, key in columns.items() if worth(AT_HOME, name) > 10}
    return rows_of(
        'test',
        KEY_TESTS,
        columns,
        lambda test, column: f'{100 * worth(test, column) / worth(AT_HOME, column):.0f} %',
    )


def beside_dynamic(scores: Scores) -> List[str]:
    """Changes from the training size, of each option and beside that of `dynamic`."""

    def change(experiment: str, option: str, test: str) -> Dict[int, float]:
        at_home = scores(experiment, 'single', option, AT_HOME)
        return less(scores(experiment, 'single', option, test), at_home)

    def cell(test: str, column: str) -> str:
        dynamic, table = (
            change(*COLUMNS[name], test) for name in ('`dynamic`', '`relative`, x 20')
        )
        zero = dict.fromkeys(range(SEEDS), 0.0)
        values, base = {
            '`dynamic`': (dynamic, zero),
            '`relative`, x 20': (table, zero),
            'table minus `dynamic`': (table, dynamic),
        }[column]
        return difference(values, base)

    columns = ['`dynamic`', '`relative`, x 20', 'table minus `dynamic`']
    return rows_of('change from the training size', KEY_TESTS, columns, cell)


def mixed_minus_single(scores: Scores) -> List[str]:
    """What training at mixed sizes does to the score, and to the change from the training size."""
    columns = {name: key for name, key in COLUMNS.items() if has(scores, 'mixed', *key)}
    scaled = [Test('scaled', factor).name for factor in (0.5, 3)]
    rows = [AT_HOME, *(f'change at {test}' for test in (*scaled, Test('canvas', 3).name))]

    def cell(row: str, column: str) -> str:
        test = row.replace('change at ', '')
        mixed, single = (
            less(
                scores(columns[column][0], training, columns[column][1], test),
                scores(columns[column][0], training, columns[column][1], AT_HOME)
                if row != AT_HOME
                else dict.fromkeys(range(SEEDS), 0.0),
            )
            for training in ('mixed', 'single')
        )
        return difference(mixed, single)

    return rows_of('mixed minus single', rows, columns, cell)


def shapes_table(scores: Scores, experiment: str) -> List[str]:
    """Scores on shapes of trainings at mixed sizes, and the difference to those at one size."""
    options = {
        f'`{option}`': option for option in OPTIONS if scores(experiment, 'mixed', option, AT_HOME)
    }

    def cell(test: str, column: str) -> str:
        mixed, single = (
            scores(experiment, kind, options[column], test) for kind in ('mixed', 'single')
        )
        return with_change(mixed, single)

    counts = {
        name: len(scores(experiment, 'mixed', option, AT_HOME)) for name, option in options.items()
    }
    return [*rows_of(f'`{experiment}`', SHAPES_TESTS, options, cell), seeds_of(counts)]


def count(scores: Scores) -> List[str]:
    planned = SEEDS * len(TRAININGS) * sum(len(kind.options) for kind in EXPERIMENTS.values())
    return [f'{len(scores.runs)} of the {planned} trainings are reported here.']


TABLES: Dict[str, Callable[[Scores], List[str]]] = {
    'pairs': lambda scores: pairs_table(scores, 'single'),
    'left': left,
    'beside dynamic': beside_dynamic,
    'pairs at mixed sizes': lambda scores: pairs_table(scores, 'mixed'),
    'mixed minus single': mixed_minus_single,
    'semantic at mixed sizes': lambda scores: shapes_table(scores, 'semantic'),
    'instance at mixed sizes': lambda scores: shapes_table(scores, 'instance'),
    'count': count,
}


def filled(page: str, results: dict) -> str:
    """The page with every table written anew.

    Raises:
        SystemExit: a table has no markers, or markers have no table.
    """
    scores, found = Scores(results['runs']), []

    def table(markers: re.Match) -> str:
        found.append(markers[2])
        lines = '\n'.join(TABLES[markers[2]](scores)).strip() if markers[2] in TABLES else ''
        return f'{markers[1]}\n\n{lines}\n\n{markers[4]}'

    page = re.sub(r'(<!-- begin: ([^>]*?) -->)(.*?)(<!-- end -->)', table, page, flags=re.DOTALL)
    if sorted(found) != sorted(TABLES):
        fail(f"'{PAGE.name}' has markers of {sorted(found)}, there are tables {sorted(TABLES)}.")
    return page


def main() -> None:
    results = json.loads(RESULTS.read_text())
    write_whole(PAGE, filled(PAGE.read_text(encoding='utf-8'), results).encode())


if __name__ == '__main__':
    main()
