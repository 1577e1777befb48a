"""Evaluate a trained model at other group sizes and intervals, next to their cost.

    python tools/sweep_groups.py configs/mask_rcnn/cf_s_1x.py \\
        work_dirs/mask_rcnn/cf_s_1x/epoch_12.pth --group-size 7,7,7,7 14,14,7,7 \\
        --interval 8,4,2,1 16,8,2,1 --max-images 500

The dynamic position bias is a function of offsets of any length, so no weight depends on the group
size, the interval or the definition of long distance attention: one checkpoint gives a model for
each setting, without training. All combinations of the given values, plus the config's own setting,
are measured, each in a process of its own. The folder of --out gets

    sweep.json    all metrics, time, memory and FLOPs of each setting
    sweep.png     the metrics against time and against memory
    log.txt       the messages of the libraries

Time is the median over images of the model's time from an image to its predictions, without
loading. Memory is the peak: of the process on a CPU, of PyTorch's tensors on a GPU. Settings in
sweep.json of the same model and data are not measured again: the same command resumes after an
interruption, and other values add settings.
"""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from mmengine.config import Config

from crossformer_mm.cli import add_cfg_options, run
from crossformer_mm.config_parts import kind_of
from crossformer_mm.engine.config import (
    load_config,
    name_of_config,
    prepare_for_cpu,
    replace_data_root,
)
from crossformer_mm.engine.preflight import check_dataset, check_file
from crossformer_mm.errors import UserError
from crossformer_mm.files import check_writable
from crossformer_mm.grouping import LDA_DEFINITIONS
from crossformer_mm.sweep.measure import check_names, measure_apart, number_of_images, run_task
from crossformer_mm.sweep.report import METRICS, Record, draw, identity, shown_metrics, table
from crossformer_mm.sweep.settings import caution, name_of, settings_of


def numbers(text: str) -> tuple:
    """Parse '7,7,7,7'."""
    try:
        return tuple(int(number) for number in text.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not one whole number for each stage, as in 7,7,7,7"
        ) from None


def parse_args():
    parser = argparse.ArgumentParser(
        description='Evaluate a trained model at other group sizes and intervals, and draw its '
        'metrics against time and memory'
    )
    add = parser.add_argument
    add('config', help='config file')
    add('checkpoint', help='checkpoint file')
    add(
        '--group-size',
        type=numbers,
        nargs='+',
        metavar='G,G,G,G',
        help="group sizes, one number for each stage (default: the config's; "
        'without this, --interval and --lda: a grid around the config)',
    )
    add(
        '--interval',
        type=numbers,
        nargs='+',
        metavar='I,I,I,I',
        help="intervals, likewise; all combinations, plus the config's own setting, are measured",
    )
    add(
        '--lda',
        nargs='+',
        choices=LDA_DEFINITIONS,
        help="definitions of long distance attention (default: the config's)",
    )
    add(
        '--metric',
        nargs='+',
        default=[],
        metavar='NAME',
        help=f"metrics of table and picture (default: {', '.join(METRICS)}, if there); "
        'sweep.json has all',
    )
    add('--max-images', type=int, metavar='N', help='evaluate the first N only (default: all)')
    add('--data-root', help="the dataset's folder, instead of the config's")
    add('--out', metavar='DIR', help='folder to write (default: sweep in the folder of a training)')
    add_cfg_options(parser)
    add('--task', type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def read_config(args: argparse.Namespace) -> Config:
    """Read the config with the arguments applied."""
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher, cfg.load_from, cfg.resume = 'none', args.checkpoint, False
    if not torch.cuda.is_available():
        prepare_for_cpu(cfg)
    if not cfg.get('test_dataloader'):
        raise UserError(f"config '{args.config}' has no test_dataloader.")
    if args.data_root:
        replace_data_root(cfg, args.data_root)
    kind = kind_of(cfg.model.get('backbone') or {}) or 'none'
    if kind != 'CrossFormer':
        raise UserError(f"config '{args.config}' has the backbone {kind}, no CrossFormer.")
    return cfg


def main():
    args = parse_args()
    if args.task:
        run_task(args.task, lambda: read_config(args))
        return
    if find_spec('matplotlib') is None:
        raise UserError('the package matplotlib is needed, which is not installed.')
    cfg = read_config(args)
    check_file('checkpoint', args.checkpoint)
    if args.max_images is not None and args.max_images < 1:
        raise UserError(f'--max-images must be at least 1, got {args.max_images}.')
    settings = settings_of(cfg.model.backbone, args.group_size, args.interval, args.lda)
    check_dataset(cfg, 'test')
    out = Path(args.out or Path('work_dirs') / name_of_config(args.config) / 'sweep')
    check_writable('--out', out)
    there = number_of_images(cfg)
    images = min(args.max_images or there, there)
    record = Record(out / 'sweep.json', identity(cfg, args.config, args.checkpoint, images))
    if note := caution(cfg.model.backbone):
        print(note)

    for number, setting in enumerate(settings, start=1):
        print(f'{number}/{len(settings)} {name_of(setting)}', flush=True)
        own, known = number == 1, record.measured(setting)
        if known is not None:
            check_names(args.metric, known)
            print(f"   measured before, see '{record.file}'")
            continue
        count, asked = images if images < there else None, args.metric if own else []
        try:
            result = measure_apart(sys.argv, setting, count, asked, out / 'log.txt')
        except KeyboardInterrupt:
            raise UserError(
                f"interrupted; '{record.file}' keeps {len(record.results)} settings, the same "
                'command goes on.'
            ) from None
        if result.pop('refused', False) and own:
            raise UserError(result['error'])
        record.add({**setting, 'own': own, **result})
    results = list(record.results.values())
    metrics = shown_metrics(args.metric, results)
    print(table(results, metrics))
    if not metrics:
        raise UserError(f"nothing could be measured, see '{out / 'log.txt'}'.")
    draw(results, metrics, record.of, out / 'sweep.png')
    print(f"see '{out / 'sweep.png'}' and '{record.file}'")
    sys.exit(1 if any('error' in result for result in results) else 0)


if __name__ == '__main__':
    run(main)
