"""Export a model as a file that runs without PyTorch, and check the file.

    python tools/export.py configs/mask_rcnn/cf_s_1x.py \\
        work_dirs/mask_rcnn/cf_s_1x/epoch_12.pth --out model.onnx

The file takes RGB images with values from 0 to 255 and returns
    detector:     boxes, scores, labels and, if the model has them, masks
    segmentor:    labels of all pixels or, with --logits, logits
    classifier:   scores
Images have the size that the model was trained for; with --resize-inside, any size. The metadata
say how to prepare images and to read the outputs; tools/run_onnx.py does both. With --what head or
backbone the file takes normalised images and returns
    backbone:             features
    segmentor:            logits in the image's size or, with --label-map, labels
    classifier:           logits
    one-stage detector:   scores and boxes of its head on each level, not decoded
    two-stage detector:   the same of its region proposal network, and the neck's features
With --fixed-shape the file is for one image of one size, smaller and faster.
Before saving, the exporter compares the file with PyTorch on five image sizes that were not traced,
and the images that tools/run_onnx.py prepares from image files with those of the config's test
pipeline. It fails on any mismatch.
"""

import argparse
import logging
import warnings
from pathlib import Path

import torch

from crossformer_mm.cli import add_cfg_options, run
from crossformer_mm.compat import EXPORT, missing_torch
from crossformer_mm.engine.config import load_config, replace_data_root
from crossformer_mm.engine.preflight import check_file
from crossformer_mm.errors import UserError


def parse_args():
    parser = argparse.ArgumentParser(
        description='Export a model or a backbone for images of any size, and compare the file '
        'with PyTorch on sizes that were not traced'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='checkpoint file; for a backbone also its ImageNet weights (default: random weights)',
    )
    parser.add_argument(
        '--format',
        choices=['onnx', 'torch-export'],
        default='onnx',
        help='onnx: for ONNX Runtime and others; torch-export: for torch.export.load '
        '(default: onnx)',
    )
    parser.add_argument(
        '--what',
        choices=['model', 'head', 'backbone'],
        help='model: raw image to boxes, masks, labels or scores; head: normalised image to '
        'logits, or to the raw outputs of a detection head or of RPN and neck; backbone: '
        'normalised image to features (default: model; with torch-export: head)',
    )
    parser.add_argument(
        '--input-type',
        choices=['uint8', 'float32'],
        help="type of a whole model's images, with values from 0 to 255 (default: uint8; "
        'float32 if the test pipeline loads with to_float32)',
    )
    parser.add_argument(
        '--resize-inside',
        action='store_true',
        help="whole detectors and segmentors: resize images in the file as the config's test "
        'pipeline does; results are in pixels of the original image',
    )
    parser.add_argument(
        '--fixed-shape',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='fix the input to one image of HxW, for a smaller and faster graph (default: any '
        'batch and size)',
    )
    parser.add_argument(
        '--int8',
        action='store_true',
        help='quantise linear layers to int8; prints the metric before and after',
    )
    parser.add_argument(
        '--float16',
        action='store_true',
        help='store weights as float16, compute in float32; prints the metric before and after',
    )
    parser.add_argument(
        '--data-root',
        help="folder of the test data for --int8 and --float16, instead of the config's",
    )
    parser.add_argument(
        '--logits', action='store_true', help='whole segmentors: output logits instead of labels'
    )
    parser.add_argument(
        '--label-map',
        action='store_true',
        help='segmentors with --what head: output labels instead of logits',
    )
    parser.add_argument(
        '--out',
        required=True,
        metavar='FILE',
        help='file to write, .onnx or .pt2; an existing file is replaced',
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        default=(512, 512),
        help='height and width of the image to measure speed with (default: 512 512)',
    )
    parser.add_argument(
        '--threads',
        type=int,
        default=torch.get_num_threads(),
        help="threads to measure with (default: PyTorch's, %(default)s here)",
    )
    add_cfg_options(parser)
    return parser.parse_args()


def main():
    args = vars(parse_args())
    if missing_torch(EXPORT):
        raise UserError(f'export: {missing_torch(EXPORT)}.')
    from crossformer_mm.export.export_file import export_file
    from crossformer_mm.export.options import Options

    data_root, cfg_options = args.pop('data_root'), args.pop('cfg_options')
    options = Options(**args)
    cfg = load_config(options.config, cfg_options)
    options.check(cfg.default_scope)
    if options.checkpoint:
        check_file('checkpoint', options.checkpoint)
    if data_root and (options.int8 or options.float16):
        replace_data_root(cfg, data_root)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.simplefilter('ignore')  # the exporters warn about themselves
    for name in ('torch.onnx', 'torch.export', 'torch._export', 'onnx_ir', 'onnxscript'):
        logging.getLogger(name).setLevel(logging.ERROR)
    report = export_file(cfg, options)

    out, operators = Path(options.out), report.operators
    runtime = 'ONNX Runtime' if options.format == 'onnx' else 'the exported program'
    height, width = options.fixed_shape or options.shape
    print(f'{out}: {out.stat().st_size / 1e6:.1f} MB, {sum(operators.values())} operators')
    print('outputs: ' + ', '.join(report.outputs))
    print('operators: ' + ', '.join(f'{name} {count}' for name, count in operators.most_common()))
    print(
        f'one image of {height} x {width}, {options.threads} thread'
        f'{"s" * (options.threads > 1)}: {runtime} {report.file_ms:.0f} ms, '
        f'PyTorch {report.torch_ms:.0f} ms'
    )


if __name__ == '__main__':
    run(main)
