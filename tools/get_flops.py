"""Count the parameters and the multiply-accumulates of a model and of its parts.

    python tools/get_flops.py configs/mask_rcnn/cf_s_1x.py --shape 800 1280

crossformer_mm/flops.py lists what is counted.
"""

import argparse
import json
from typing import Dict

from crossformer_mm.cli import run
from crossformer_mm.engine.config import load_config
from crossformer_mm.errors import UserError
from crossformer_mm.flops import SHAPES, count


def table(counted: Dict) -> str:
    """Format counts as text, one line for each part."""
    rows = {**counted['parts'], 'whole model': counted}
    height, width = counted['shape']
    lines = [f'{f"image {height} x {width}":28}{"parameters":>13}{"multiply-accumulates":>23}']
    lines += [
        f'{name:28}{row["params"] / 1e6:11.3f} M{row["flops"] / 1e9:21.3f} G'
        for name, row in rows.items()
    ]
    return '\n'.join(lines)


def parse_args():
    parser = argparse.ArgumentParser(
        description='Count the parameters and the multiply-accumulates of a model'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='height and width of the image (default: '
        f'{" ".join(map(str, SHAPES["mmdet"]))} for a detector, '
        f'{" ".join(map(str, SHAPES["mmseg"]))} for a segmentor, '
        f'{" ".join(map(str, SHAPES["mmpretrain"]))} for a classifier, none for other models)',
    )
    parser.add_argument(
        '--json',
        action='store_true',
        help='print one line of JSON with plain numbers instead of the table',
    )
    return parser.parse_args()


def main():
    args = parse_args()
    cfg = load_config(args.config, scopes=None)
    shape = args.shape or SHAPES.get(cfg.default_scope)
    if shape is None:
        raise UserError(f'--shape H W is needed for a model of {cfg.default_scope}.')
    if min(shape) < 1:
        raise UserError(f'--shape must be two numbers of at least 1, got {shape[0]} {shape[1]}.')
    try:
        counted = count(cfg, shape)
    except Exception as error:  # whatever a config's model may object to
        raise UserError(
            f"the model of config '{args.config}' could not be counted at {shape[0]} x "
            f'{shape[1]}: {type(error).__name__}: {error}'
        ) from None
    print(json.dumps(counted) if args.json else table(counted))


if __name__ == '__main__':
    run(main)
