"""Predict objects or label maps of images and videos, and draw them.

    python tools/predict.py configs/mask_rcnn/cf_s_1x.py \\
        work_dirs/mask_rcnn/cf_s_1x/epoch_12.pth photos

writes into the folder of --out:

    pictures/      each image, or video, with its results drawn on it
    images.json    names, sizes and ids of images and categories, and the skipped files
    results.bbox.json, results.segm.json
                   of a detector: boxes, and masks if it has any, in COCO's format of results
    labels/        of a segmentor: label maps as PNG, with the values that the dataset's own have

Files that cannot be read or written are listed at the end; the exit status is then 1.
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device

from crossformer_mm.cli import add_cfg_options, run
from crossformer_mm.engine.config import DENSE, load_config
from crossformer_mm.engine.mixed_precision import check_bfloat16
from crossformer_mm.engine.preflight import check_file
from crossformer_mm.errors import UserError
from crossformer_mm.prediction import build_predictor, predict_files, sources_of
from crossformer_mm.without_torch.files import find_files
from crossformer_mm.without_torch.options import add_result_options, check_result_options


def parse_args():
    parser = argparse.ArgumentParser(
        description='Predict objects or label maps of images and videos, and draw them'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        'images', nargs='+', help="images, videos, folders of them, or globs such as 'photos/*.jpg'"
    )
    parser.add_argument(
        '--batch-size',
        type=int,
        default=1,
        metavar='N',
        help='most images at a time; a batch has images of one size only, so that it does not '
        'change predictions (default: %(default)s)',
    )
    parser.add_argument(
        '--device', help="such as cpu, cuda or cuda:1 (default: a GPU if there's one)"
    )
    parser.add_argument(
        '--bf16',
        action='store_true',
        help='compute in bfloat16: backbone and neck of a detector, all of a segmentor',
    )
    add_result_options(parser)
    add_cfg_options(parser)
    return parser.parse_args()


def check_options(args: argparse.Namespace, cfg: Config) -> torch.device:
    """Check the options and return the device."""
    detection = cfg.default_scope == 'mmdet'
    if args.batch_size < 1:
        raise UserError(f'--batch-size must be at least 1, got {args.batch_size}.')
    if args.score_thr is not None and not detection:
        raise UserError('--score-thr is of detectors; label maps have no scores.')
    if args.ann_file and not detection:
        raise UserError("--ann-file is of detectors; label maps have no ids.")
    if not cfg.get('test_dataloader'):
        raise UserError(
            f"config '{args.config}' has no test_dataloader, whose pipeline prepares the images."
        )
    check_file('checkpoint', args.checkpoint)
    check_result_options(args)
    name = args.device or get_device().replace('mps', 'cpu')  # MMCV has no operators for MPS
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        message = f"--device: '{name}' cannot be used: {str(error).splitlines()[0]}"
        raise UserError(message) from None
    if args.bf16:
        check_bfloat16('--bf16', device.type)
    return device


def main():
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options, DENSE)
    device = check_options(args, cfg)
    out = Path(args.out)
    sources = sources_of(find_files(args.images, out, videos=True), out)
    # Remarks of the libraries on losses and palettes do not matter here.
    warnings.filterwarnings('ignore', category=UserWarning, module=r'mm(det|seg|engine|cv)\b')
    try:
        predictor = build_predictor(cfg, args.config, args.checkpoint, device)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from None
    results = predict_files(
        predictor, sources, out, args.ann_file, args.batch_size, args.bf16, args.score_thr
    )
    print(
        f"{len(results.images)} images predicted, see '{out}'; {len(results.skipped)} files skipped"
    )
    for one in results.skipped:
        print(f"error: '{one['file_name']}' was skipped: {one['reason']}.", file=sys.stderr)
    sys.exit(1 if results.skipped else 0)


if __name__ == '__main__':
    run(main)
