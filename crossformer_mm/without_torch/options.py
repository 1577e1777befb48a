"""Options of the commands that predict: the folder of results, their ids, their pictures."""

import argparse
from pathlib import Path

from .errors import UserError

SCORE_THR = 0.3  # lowest score of objects in pictures, unless it is given


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """Add the options ``--out``, ``--score-thr`` and ``--ann-file``."""
    parser.add_argument(
        '--out', default='predictions', metavar='DIR', help='folder to write (default: %(default)s)'
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        metavar='SCORE',
        help=f'lowest score of objects in pictures (default: {SCORE_THR}); the .json files have '
        'all objects',
    )
    parser.add_argument(
        '--ann-file',
        metavar='FILE.json',
        help='take ids of images and categories from these COCO annotations, by name; '
        'otherwise ids start at 1',
    )


def check_result_options(args: argparse.Namespace) -> None:
    """Check ``--out`` and ``--score-thr``, and set the default of the latter.

    Raises:
        UserError: one cannot be used.
    """
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"--out: '{args.out}' is a file.")
    if args.score_thr is None:
        args.score_thr = SCORE_THR
    if not 0 <= args.score_thr <= 1:
        raise UserError(f'--score-thr must be from 0 to 1, got {args.score_thr}.')
