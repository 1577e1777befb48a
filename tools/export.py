"""Export a backbone or a whole model, for images of any size, and check what was written.

    python tools/export.py configs/upernet/cf_s_160k.py \\
        work_dirs/upernet/cf_s_160k/iter_160000.pth --out upernet.onnx

The file takes a normalised image (batch, 3, height, width), every one of the three sizes open, and
returns
    of a backbone:                 its features
    of a segmentor:                logits of the image's size, or with --label-map the classes
    of a one-stage detector:       scores and boxes of its head on each level, not decoded
    of a two-stage detector:       the same of its region proposal network, and the neck's features;
                                   the second stage picks boxes, which is no arithmetic of arrays
Before the file gets its name it is run beside PyTorch on images of five other sizes.
"""

import argparse
import json
import logging
import os
import re
import sys
import time
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Callable, Dict, Sequence

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from crossformer_mm.checkpoint import fit_checkpoint, load_backbone, read_checkpoint
from crossformer_mm.compat import missing_torch
from crossformer_mm.engine.command_line import DENSE, check_file, fail, load_config, run
from crossformer_mm.engine.option_checks import add_cfg_options

if missing_torch('2.6'):
    fail(f'export: {missing_torch("2.6")}.')

from crossformer_mm.exportable import export_any_size, exportable  # noqa: E402

# Batch, height, width: odd sides, sides smaller than the largest stride and than a group, multiples
# of 32. None is the one that was traced.
CHECKED = ((1, 97, 131), (2, 64, 96), (3, 17, 30), (1, 224, 160), (2, 33, 200))
TOLERANCE = 1e-4  # of the largest value of an output
SUFFIXES = {'onnx': '.onnx', 'torch-export': '.pt2'}
Outputs = Dict[str, Tensor]
NEEDED = {'onnx': ('onnx', 'onnxscript', 'onnxruntime'), 'torch-export': ()}


class Backbone(nn.Module):
    """Image (B, 3, H, W) to features."""

    any_size = {}  # see Segmentor

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Outputs:
        return {
            f'feature_{stage}': feature
            for stage, feature in zip(self.model.out_indices, self.model(image))
        }


class Segmentor(nn.Module):
    """Image (B, 3, H, W) to logits (B, classes, H, W) or, as label map, to (B, H, W)."""

    def __init__(self, model: nn.Module, label_map: bool):
        super().__init__()
        self.model, self.label_map = model, label_map

    def logits(self, image: Tensor) -> Tensor:
        return F.interpolate(
            self.model(image, mode='tensor'),
            image.shape[2:],
            mode='bilinear',
            align_corners=self.model.align_corners,
        )

    def forward(self, image: Tensor) -> Outputs:
        logits = self.logits(image)
        return dict(label_map=logits.argmax(1)) if self.label_map else dict(logits=logits)

    @property
    def any_size(self) -> dict:
        """Modules of the library that make sides plain numbers, and what takes their place."""
        from mmseg.models.utils import Upsample

        class AnySizeUpsample(Upsample):  # in the head of Semantic FPN
            def forward(self, x: Tensor) -> Tensor:
                size = [side * int(self.scale_factor) for side in x.shape[-2:]]
                return F.interpolate(x, size, None, self.mode, self.align_corners)

        whole = all(
            not module.size and module.scale_factor == int(module.scale_factor)
            for module in self.modules()
            if isinstance(module, Upsample)
        )
        return {Upsample: AnySizeUpsample} if whole else {}


class Detector(nn.Module):
    """Image (B, 3, H, W) to what its head, or region proposal network and neck, return."""

    any_size = {}

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Outputs:
        features = self.model.extract_feat(image)
        if getattr(self.model, 'with_rpn', False):
            levels = [*self.model.rpn_head(features), features]
            kinds = ['rpn_cls_score', 'rpn_bbox_pred', 'neck']
        else:
            levels = self.model.bbox_head(features)
            kinds = ['cls_score', 'bbox_pred', *(f'head_{i}' for i in range(2, len(levels)))]
        return {
            f'{kind}_{level}': tensor
            for kind, tensors in zip(kinds, levels)
            for level, tensor in enumerate(tensors)
        }


def parse_args():
    parser = argparse.ArgumentParser(
        description='Export a backbone or a whole model with batch, height and width left open, '
        'and check the file on sizes that were not traced'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='checkpoint file; a backbone also takes its '
        'ImageNet weights (default: random weights)',
    )
    parser.add_argument(
        '--format',
        choices=list(SUFFIXES),
        default='onnx',
        help='onnx: for ONNX Runtime and others; torch-export: for '
        'torch.export.load, images of any size too (default: onnx)',
    )
    parser.add_argument(
        '--what',
        choices=['model', 'backbone'],
        default='model',
        help='model: a segmentor whole, a detector up to the raw outputs of its '
        'head or of its region proposal network and neck (default: model)',
    )
    parser.add_argument(
        '--label-map',
        action='store_true',
        help='of a segmentor the class of each pixel in place of logits',
    )
    parser.add_argument(
        '--out',
        required=True,
        metavar='FILE',
        help='file to write, .onnx or .pt2; one that exists is replaced',
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        default=(512, 512),
        help='height and width of the image that speed is measured on (default: 512 512)',
    )
    parser.add_argument(
        '--threads',
        type=int,
        default=torch.get_num_threads(),
        help='threads to measure with (default: those of PyTorch, %(default)s here)',
    )
    add_cfg_options(parser)
    return parser.parse_args()


def check_arguments(args: argparse.Namespace) -> None:
    """End the program with a sentence on what cannot work."""
    out, suffix = Path(args.out), SUFFIXES[args.format]
    if out.suffix != suffix:
        fail(f"--out: '{args.out}' must end in {suffix} for --format {args.format}.")
    if not out.parent.is_dir():
        fail(f"--out: folder '{out.parent}' does not exist.")
    if min(args.shape) < 1:
        fail(f'--shape must be two numbers of at least 1, got {args.shape[0]} {args.shape[1]}.')
    if args.threads < 1:
        fail(f'--threads must be at least 1, got {args.threads}.')
    absent = [name for name in NEEDED[args.format] if find_spec(name) is None]
    if absent:
        fail(
            f"--format {args.format} needs {', '.join(absent)}, which is not installed "
            f"(pip install {' '.join(absent)})."
        )
    if args.checkpoint:
        check_file('checkpoint', args.checkpoint)


def build(cfg: Config, args: argparse.Namespace) -> nn.Module:
    """The module to export, its weights read; ends the program where that cannot be."""
    init_default_scope(cfg.default_scope)
    detection = cfg.default_scope == 'mmdet'
    if args.label_map and (detection or args.what == 'backbone'):
        fail('--label-map is for whole segmentors only.')
    try:
        model = MODELS.build(cfg.model.backbone if args.what == 'backbone' else cfg.model)
    except Exception as error:  # whatever a config's model may object to
        fail(
            f"the model of config '{args.config}' could not be built: {type(error).__name__}: "
            f'{error}'
        )
    if not args.checkpoint:
        print('warning: no checkpoint is given, so the file gets random weights.', file=sys.stderr)
    elif args.what == 'backbone':
        load_backbone(model, args.checkpoint)
    else:
        fit_checkpoint(model, read_checkpoint(args.checkpoint), args.checkpoint)
    model = revert_sync_batchnorm(model).eval().requires_grad_(False)
    if args.what == 'backbone':
        return Backbone(model)
    if not detection and args.label_map and model.out_channels == 1:
        fail('--label-map needs a segmentor of two or more output channels, this one has 1.')
    return Detector(model) if detection else Segmentor(model, args.label_map)


def description(cfg: Config, what: str) -> dict:
    """What a user of the file has to know of its input, as texts."""
    known = cfg.model.get('data_preprocessor', {})
    channels = 'RGB' if known.get('bgr_to_rgb') else 'BGR'
    return dict(
        what=what,
        input=f'{channels} images (batch, {channels}, height, width), normalised: '
        '(value from 0 to 255 - mean) / std',
        mean=json.dumps(known.get('mean')),
        std=json.dumps(known.get('std')),
        model=str(cfg.model.type),
    )


def write_onnx(program, names: Sequence[str], described: dict, path: Path) -> Counter:
    """Convert and write; how often each operator occurs."""
    import onnx

    exported = torch.onnx.export(
        program, input_names=['image'], output_names=list(names), verbose=False
    )
    proto = exported.model_proto
    sides = proto.graph.input[0].type.tensor_type.shape.dim
    symbols = {
        sides[axis].dim_param: name for axis, name in {0: 'batch', 2: 'height', 3: 'width'}.items()
    }
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(
                    '|'.join(symbols), lambda found: symbols[found[0]], dim.dim_param
                )
    onnx.helper.set_model_props(proto, described)
    onnx.save(proto, path)
    return Counter(node.op_type for node in proto.graph.node)


def write_torch(program, described: dict, path: Path) -> Counter:
    torch.export.save(program, path, extra_files={'description.json': json.dumps(described)})
    return Counter(str(node.target) for node in program.graph.nodes if node.op == 'call_function')


def read_onnx(path: Path, threads: int) -> Callable[[Tensor], Outputs]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]
    return lambda image: {
        name: torch.from_numpy(out)
        for name, out in zip(names, session.run(names, {'image': image.numpy()}))
    }


def read_torch(path: Path) -> Callable[[Tensor], Outputs]:
    return torch.export.load(path).module()


def difference(module: nn.Module, image: Tensor, results: Outputs) -> float:
    """The largest relative difference of a file's outputs from PyTorch's.

    A label map differs by as much as the logits of its classes are below the largest ones.
    """
    expected = module(image)
    shapes, wanted = (
        {name: out.shape for name, out in outputs.items()} for outputs in (results, expected)
    )
    if shapes != wanted:
        raise ValueError(f'shapes {shapes} in place of {wanted}')
    if getattr(module, 'label_map', False):
        logits = module.logits(image)
        chosen = logits.gather(1, results['label_map'][:, None].long())
        results, expected = dict(largest=chosen), dict(largest=logits.amax(1, keepdim=True))
    return (
        torch.stack(
            [
                (results[name] - out).abs().max() / out.abs().max().clamp(min=1e-6)
                for name, out in expected.items()
            ]
        )
        .max()
        .item()
    )  # NaN if any is


def milliseconds(function: Callable, image: Tensor, runs: int = 3) -> float:
    function(image)  # warms up
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function(image)
        times.append(time.perf_counter() - start)
    return 1000 * median(times)


def check(module: nn.Module, exported: Callable, channels: int) -> None:
    """Compare on the sizes above; a ValueError says where the two differ."""
    for batch, *sides in CHECKED:
        image = torch.randn(batch, channels, *sides)
        try:
            differs = difference(module, image, exported(image))
        except Exception as error:  # of ONNX Runtime, or a guard of torch.export
            raise ValueError(
                f'it does not run on a batch of {batch} of {sides[0]} x {sides[1]}: '
                f'{first_line(error)}'
            ) from None
        print(f'   {batch} x {sides[0]} x {sides[1]}: relative difference {differs:.1e}')
        if not differs <= TOLERANCE:  # NaN is not
            raise ValueError(
                f'it differs from PyTorch by {differs:.1e} on a batch of {batch} of '
                f'{sides[0]} x {sides[1]}, allowed is {TOLERANCE:.0e}'
            )


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ['no reason given']
    return f'{type(error).__name__}: {lines[0][:300]}'


@torch.no_grad()
def main():
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options, DENSE)
    check_arguments(args)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    warnings.simplefilter('ignore')  # of the exporters, about themselves
    for name in ('torch.onnx', 'torch.export', 'torch._export'):
        logging.getLogger(name).setLevel(logging.ERROR)
    module = build(cfg, args)
    channels = cfg.model.backbone.get('in_channels', 3)
    described = description(cfg, args.what)

    out = Path(args.out)
    # Under its name there is a checked file or none, even if this is interrupted.
    part = out.with_name(f'.{out.stem}.{os.getpid()}{out.suffix}')
    try:
        print('1/4 tracing, with sizes left open', flush=True)
        program = export_any_size(exportable(module, module.any_size), channels)
        names = list(module(torch.zeros(1, channels, 64, 64)))
        print(f'2/4 writing {args.format}', flush=True)
        if args.format == 'onnx':
            operators = write_onnx(program, names, described, part)
            exported = read_onnx(part, args.threads)
        else:
            operators = write_torch(program, described, part)
            exported = read_torch(part)
        print(
            f'3/4 checking it beside PyTorch on {len(CHECKED)} sizes that were not traced',
            flush=True,
        )
        check(module, exported, channels)
        print('4/4 measuring', flush=True)
        image = torch.randn(1, channels, *args.shape)
        theirs, ours = milliseconds(exported, image), milliseconds(module, image)
        part.replace(out)
    except Exception as error:
        said = error if type(error) is ValueError else first_line(error)
        fail(
            f"'{args.out}' was not written, for the export of config '{args.config}' failed: "
            f'{said}.'
        )
    finally:
        part.unlink(missing_ok=True)

    runtime = 'ONNX Runtime' if args.format == 'onnx' else 'the exported program'
    print(f'{out}: {out.stat().st_size / 1e6:.1f} MB, {sum(operators.values())} operators')
    print('outputs: ' + ', '.join(names))
    print('operators: ' + ', '.join(f'{name} {count}' for name, count in operators.most_common()))
    print(
        f'one image of {args.shape[0]} x {args.shape[1]}, {args.threads} thread'
        f'{"s" * (args.threads > 1)}: {runtime} {theirs:.0f} ms, PyTorch {ours:.0f} ms'
    )


if __name__ == '__main__':
    run(main)
