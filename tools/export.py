"""Export a model as a file that runs without PyTorch, and check what was written.

    python tools/export.py configs/mask_rcnn/cf_s_1x.py \\
        work_dirs/mask_rcnn/cf_s_1x/epoch_12.pth --out model.onnx

The file takes RGB images as they are, of any size, and returns
    of a detector:    boxes, scores, labels and, if it has any, masks
    of a segmentor:   labels of each pixel or, with --logits, logits
    of a classifier:  scores
in the size that the model was trained for, or with --resize-inside in their own. What it has to be
told and how to read what it returns stands in its metadata; tools/run_onnx.py does both. With
--what head or backbone it takes normalised images and returns what these return:
    of a backbone:                 its features
    of a segmentor:                logits of the image's size, or with --label-map the classes
    of a classifier:               logits
    of a one-stage detector:       scores and boxes of its head on each level, not decoded
    of a two-stage detector:       the same of its region proposal network, and the neck's features
With --fixed-shape it is for one image of one size, and smaller and faster.
Before the file gets its name it is run next to PyTorch on images of five other sizes, and image
files are read and resized by tools/run_onnx.py and by the config's test pipeline; any difference is
an error.
"""

import argparse
import io
import json
import logging
import os
import sys
import time
import warnings
from collections import Counter
from contextlib import redirect_stdout
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median
from typing import Callable, Dict, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from crossformer_mm.checkpoint import fit_checkpoint, load_backbone, read_checkpoint
from crossformer_mm.compat import EXPORT, missing_torch
from crossformer_mm.engine.command_line import (
    check_file,
    fail,
    load_config,
    replace_data_root,
    run,
    sentences_for,
)
from crossformer_mm.engine.option_checks import add_cfg_options

if missing_torch(EXPORT):
    fail(f'export: {missing_torch(EXPORT)}.')

from crossformer_mm.export import export_any_size, exportable, metadata, smaller  # noqa: E402
from crossformer_mm.export.fixed_size import export_fixed_size, exportable_for  # noqa: E402
from crossformer_mm.export.from_files import Differs, check_from_files  # noqa: E402
from crossformer_mm.export.models import (  # noqa: E402
    UnknownModel,
    WholeClassifier,
    WholeDetector,
    WholeSegmentor,
    any_size_upsampling,
)
from crossformer_mm.export.onnx_file import NEEDED, count_operators, leave_out, to_onnx, write_onnx  # noqa: E402

# Batch, height, width: odd sides, sides smaller than the largest stride and than a group, multiples
# of 32. None is the one that was traced.
CHECKED = ((1, 97, 131), (2, 64, 96), (3, 17, 30), (1, 224, 160), (2, 33, 200))
TOLERANCE = 1e-4  # of the largest value of an output
SUFFIXES = {'onnx': '.onnx', 'torch-export': '.pt2'}
WHOLE = (WholeDetector, WholeSegmentor, WholeClassifier)
# What a file of ONNX holds at most, less what a graph and its tables take.
MOST_BYTES = 2**31 - 2**27
Outputs = Dict[str, Tensor]


class Network(nn.Module):
    """Around a model, to return what is exported of it by names."""

    any_size: dict = {}  # modules to be replaced: see any_size_upsampling

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


class Backbone(Network):
    """Image (B, 3, H, W) to features."""

    def forward(self, image: Tensor) -> Outputs:
        return {
            f'feature_{stage}': feature
            for stage, feature in zip(self.model.out_indices, self.model(image))
        }


class Segmentor(Network):
    """Image (B, 3, H, W) to logits (B, classes, H, W) or, as label map, to (B, H, W)."""

    def __init__(self, model: nn.Module, label_map: bool):
        super().__init__(model)
        self.label_map = label_map

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
        return any_size_upsampling(self)


class Detector(Network):
    """Image (B, 3, H, W) to what its head, or region proposal network and neck, return."""

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


class Classifier(Network):
    """Image (B, 3, H, W) to logits (B, classes)."""

    def forward(self, image: Tensor) -> Outputs:
        return dict(logits=self.model(image, mode='tensor'))


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
        choices=['model', 'head', 'backbone'],
        help='model: from the image as it is to boxes, masks, labels or scores; head: from the '
        'normalised image to logits, or to the raw outputs of a detection head or of a region '
        'proposal network and neck; backbone: to features (default: model, of torch-export head)',
    )
    parser.add_argument(
        '--input-type',
        choices=['uint8', 'float32'],
        help='type of the image that a whole model takes, values from 0 to 255 (default: uint8; '
        'float32 if the test pipeline loads with to_float32)',
    )
    parser.add_argument(
        '--resize-inside',
        action='store_true',
        help='of a whole detector or segmentor: take images of any size and resize them in the '
        "file as the config's test pipeline does; boxes, masks and labels are those of the image",
    )
    parser.add_argument(
        '--fixed-shape',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='write a graph for one image of this size alone, which is smaller and takes less '
        'memory and time (default: any batch and size)',
    )
    parser.add_argument(
        '--int8',
        action='store_true',
        help='weights of linear layers in 8 bits; the metric before and after is printed',
    )
    parser.add_argument(
        '--float16',
        action='store_true',
        help='weights in 16 bits, computed with in 32; the metric before and after is printed',
    )
    parser.add_argument(
        '--data-root', help="folder of the test data for that, in place of the config's"
    )
    parser.add_argument(
        '--logits', action='store_true', help='of a whole segmentor logits in place of labels'
    )
    parser.add_argument(
        '--label-map',
        action='store_true',
        help='with --what head of a segmentor the class of each pixel in place of logits',
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


def check_arguments(args: argparse.Namespace, scope: str) -> None:
    """End the program with a sentence on what cannot work."""
    out, suffix = Path(args.out), SUFFIXES[args.format]
    if out.suffix != suffix:
        fail(f"--out: '{args.out}' must end in {suffix} for --format {args.format}.")
    if not out.parent.is_dir():
        fail(f"--out: folder '{out.parent}' does not exist.")
    if min(args.shape) < 1:
        fail(f'--shape must be two numbers of at least 1, got {args.shape[0]} {args.shape[1]}.')
    if args.fixed_shape and min(args.fixed_shape) < 1:
        fail(f'--fixed-shape must be two numbers of at least 1, got {args.fixed_shape}.')
    if args.fixed_shape and args.format != 'onnx':
        fail('--fixed-shape is for --format onnx only.')
    if args.int8 and args.float16:
        fail('--int8 and --float16 are two ways to store the same weights; give one.')
    if (args.int8 or args.float16) and (args.format != 'onnx' or args.what not in ('model', None)):
        fail('--int8 and --float16 are of whole models as ONNX.')
    if args.threads < 1:
        fail(f'--threads must be at least 1, got {args.threads}.')
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent and args.format == 'onnx':
        fail(
            f"--format {args.format} needs {', '.join(absent)}, which is not installed "
            f"(pip install {' '.join(absent)})."
        )
    if args.what is None:
        args.what = 'model' if args.format == 'onnx' else 'head'
    if args.what == 'model' and args.format != 'onnx':
        fail(f'--format {args.format} has no operators for whole models; give --what head.')
    if args.label_map and (scope != 'mmseg' or args.what != 'head'):
        fail('--label-map is for --what head of segmentors only.')
    if args.logits and (scope != 'mmseg' or args.what != 'model'):
        fail('--logits is for whole segmentors only.')
    if args.resize_inside and (args.what != 'model' or scope == 'mmpretrain' or args.fixed_shape):
        fail('--resize-inside is for whole detectors and segmentors of any size.')
    if args.input_type and args.what != 'model':
        fail(f'--input-type is of whole models; --what {args.what} takes normalised images.')
    if args.checkpoint:
        check_file('checkpoint', args.checkpoint)


def check_images(cfg: Config, args: argparse.Namespace) -> None:
    """Settle the type of a whole model's images; end the program if it takes none of 8 bits in
    colour."""
    channels = metadata.channels_of(cfg)
    if channels != 3:
        fail(
            f"config '{args.config}': a whole model takes images of 3 channels, and the backbone "
            f'has in_channels={channels}; --what head or --what backbone exports it for normalised '
            'images.'
        )
    with sentences_for(ValueError):
        prepared = metadata.preparation(metadata.test_dataset(cfg).get('pipeline') or ())
    if prepared['load']['to_float32'] and args.input_type == 'uint8':
        fail(
            '--input-type uint8: the test pipeline loads images with to_float32, and their resized '
            'values are no whole numbers; give float32 or leave the option out.'
        )
    if args.input_type is None:
        args.input_type = 'float32' if prepared['load']['to_float32'] else 'uint8'


def build(cfg: Config, args: argparse.Namespace) -> Tuple[nn.Module, dict]:
    """The module to export, its weights read, and the checkpoint; ends the program where that
    cannot be."""
    scope = cfg.default_scope
    init_default_scope(scope)
    if args.what == 'model':
        check_images(cfg, args)
    try:
        model = MODELS.build(cfg.model.backbone if args.what == 'backbone' else cfg.model)
    except (ValueError, FileNotFoundError) as error:
        fail(
            f"the model of config '{args.config}' could not be built: {type(error).__name__}: "
            f'{error}'
        )
    content: dict = {}
    if not args.checkpoint:
        print('warning: no checkpoint is given, so the file gets random weights.', file=sys.stderr)
    elif args.what == 'backbone':
        load_backbone(model, args.checkpoint)
    else:
        content = read_checkpoint(args.checkpoint)
        fit_checkpoint(model, content, args.checkpoint)
    model = revert_sync_batchnorm(model).eval().requires_grad_(False)
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    if args.format == 'onnx' and size > MOST_BYTES:
        fail(
            f"config '{args.config}': the model's weights take {size / 1e9:.1f} GB, and an ONNX "
            f'file holds at most {MOST_BYTES / 1e9:.1f} GB of them; --format torch-export has no '
            'such limit.'
        )
    if args.what == 'backbone':
        return Backbone(model), content
    if args.what == 'model':
        with sentences_for(ValueError):
            rule = metadata.rule_for_inside(cfg) if args.resize_inside else None
        try:
            if scope == 'mmdet':
                return WholeDetector(model, rule), content
            if scope == 'mmseg':
                return WholeSegmentor(model, args.logits, rule), content
            return WholeClassifier(model), content
        except UnknownModel as error:
            fail(f"config '{args.config}': {error}.")
    if args.label_map and model.out_channels == 1:
        fail('--label-map needs a segmentor of two or more output channels, this one has 1.')
    if scope == 'mmseg':
        return Segmentor(model, args.label_map), content
    return (Detector if scope == 'mmdet' else Classifier)(model), content


def example(module: nn.Module, args, batch: int, height: int, width: int) -> List[Tensor]:
    """Inputs of random values."""
    if not isinstance(module, WHOLE):
        return [torch.randn(batch, args.channels, height, width)]
    if isinstance(module, WholeDetector):
        batch = 1
    dtype = getattr(torch, args.input_type)
    # Larger than pixels: what networks look for has more than one of them.
    coarse = torch.randint(256, (batch, 3, height // 8 + 1, width // 8 + 1)).float()
    image = F.interpolate(coarse, (height, width), mode='bilinear').to(dtype)
    if takes_size(module):
        return [image, torch.tensor([height // 2 + 1, 2 * width])]
    return [image]


def takes_size(module: nn.Module) -> bool:
    """Whether a module has to be told the size of what it returns."""
    return isinstance(module, WholeSegmentor) and module.resize.rule is None


def input_names(module: nn.Module, args: argparse.Namespace) -> Dict[str, Dict[int, str]]:
    """Names of a module's inputs and of their open dimensions."""
    image = {} if args.fixed_shape else {2: 'height', 3: 'width'}
    if image and not isinstance(module, WholeDetector):
        image = {0: 'batch', **image}
    return dict(image=image, **({'size': {}} if takes_size(module) else {}))


def write_torch(program, described: dict, path: Path) -> Counter:
    torch.export.save(program, path, extra_files={'description.json': json.dumps(described)})
    return Counter(str(node.target) for node in program.graph.nodes if node.op == 'call_function')


def load_run_onnx():
    """tools/run_onnx.py as a module."""
    spec = spec_from_file_location('run_onnx', Path(__file__).with_name('run_onnx.py'))
    run_onnx = module_from_spec(spec)
    spec.loader.exec_module(run_onnx)
    return run_onnx


def read_onnx(path: Path, threads: int) -> Callable[..., Outputs]:
    inputs, outputs, compute, _ = load_run_onnx().start_onnxruntime(str(path), 'cpu', threads)
    return lambda *given: {
        name: torch.from_numpy(out)
        for name, out in zip(outputs, compute({key: x.numpy() for key, x in zip(inputs, given)}))
    }


def read_torch(path: Path) -> Callable[..., Outputs]:
    return torch.export.load(path).module()


def difference(module: nn.Module, given: Sequence[Tensor], results: Outputs) -> float:
    """The largest relative difference of a file's outputs from PyTorch's.

    A label map differs by as much as the logits of its classes are below the largest ones. Of
    detectors see :func:`of_boxes`.
    """
    expected = module(*given)
    if isinstance(module, WholeDetector):
        return of_boxes(results, expected)
    shapes, wanted = (
        {name: out.shape for name, out in outputs.items()} for outputs in (results, expected)
    )
    if shapes != wanted:
        raise Differs(f'it returns shapes {shapes} in place of {wanted}')
    labels = results.get('labels', results.get('label_map'))
    if labels is not None:
        logits = module.logits(*given)
        if logits.shape[1] == 1:
            logits = torch.cat([module.model.decode_head.threshold - logits.sigmoid()] * 2, 1)
            logits[:, 1] *= -1
        chosen = logits.gather(1, labels[:, None].long())
        results, expected = dict(largest=chosen), dict(largest=logits.amax(1, keepdim=True))
    return largest_difference(results, expected)


def largest_difference(results: Outputs, expected: Outputs) -> float:
    """Relative to the largest value of each; NaN if any is."""
    return (
        torch.stack(
            [
                (results[name] - out).abs().max() / out.abs().max().clamp(min=1e-6)
                for name, out in expected.items()
                if out.numel()
            ]
        )
        .max()
        .item()
    )


def of_boxes(results: Outputs, expected: Outputs) -> float:
    """The largest difference of candidates' scores and of boxes that both have.

    Where two boxes have almost the same score, rounding decides which one suppresses the other: of
    a hundred boxes, some may not have a partner, not more than a tenth.
    """
    name = 'candidate_scores'
    worst = largest_difference({name: results[name]}, {name: expected[name]})
    ours, theirs = results['boxes'], expected['boxes']
    if not len(ours) and not len(theirs):
        return worst
    scale = theirs.abs().max().clamp(min=1) if len(theirs) else 1.0
    apart = (ours[:, None] - theirs[None]).abs().amax(2) / scale
    apart = apart + (results['labels'][:, None] != expected['labels'][None]).float()
    apart = apart + (results['scores'][:, None] - expected['scores'][None]).abs()
    if 'masks' in expected:
        apart = apart + (results['masks'][:, None] - expected['masks'][None]).abs().amax((2, 3))
    near = apart.amin(1) if len(theirs) else torch.ones(len(ours))
    alone = int((near > TOLERANCE).sum()) + max(0, len(theirs) - len(ours))
    if alone > 0.1 * max(len(ours), len(theirs), 20):
        raise Differs(
            f'{alone} of {max(len(ours), len(theirs))} boxes are not among those of PyTorch'
        )
    return max([worst, *near[near <= TOLERANCE].tolist()])


def milliseconds(function: Callable, given: Sequence[Tensor], runs: int = 3) -> float:
    function(*given)  # warms up
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function(*given)
        times.append(time.perf_counter() - start)
    return 1000 * median(times)


def check(module: nn.Module, exported: Callable, args: argparse.Namespace) -> None:
    """Compare on the sizes above.

    Raises:
        Differs: they differ.
    """
    for size in args.sizes:
        given = example(module, args, *size)
        batch, _, *sides = given[0].shape
        print(f'   {batch} x {sides[0]} x {sides[1]}: ', end='', flush=True)
        results = exported(*given)
        differs = difference(module, given, results)
        found = f', {len(results["boxes"])} boxes' if 'boxes' in results else ''
        print(f'relative difference {differs:.1e}{found}', flush=True)
        if not differs <= TOLERANCE:  # NaN is not
            raise Differs(
                f'it differs from PyTorch by {differs:.1e} on a batch of {batch} of '
                f'{sides[0]} x {sides[1]}, allowed is {TOLERANCE:.0e}'
            )


def make_smaller(file: Path, cfg: Config, args: argparse.Namespace) -> None:
    """Store weights in fewer bits, and say what that does to the metric on the test data."""
    run_onnx = load_run_onnx()

    def metric() -> Tuple[str, float]:
        model = run_onnx.Model(str(file), threads=args.threads)
        with redirect_stdout(io.StringIO()):  # the tables of the metrics
            return smaller.metric_of(
                cfg.default_scope, args.data, lambda data: model(model.decode(data))
            )

    size, (name, before) = file.stat().st_size, metric()
    (smaller.to_int8 if args.int8 else smaller.to_float16)(file)
    _, after = metric()
    print(
        f'   {"int8" if args.int8 else "float16"}: {name} {before:.3f} before, {after:.3f} '
        f'after ({after - before:+.3f}), on {min(len(args.data), smaller.MOST_IMAGES)} images of '
        f'the test data; {size / 1e6:.1f} MB before, {file.stat().st_size / 1e6:.1f} MB after'
    )


@torch.no_grad()
def main():
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    check_arguments(args, cfg.default_scope)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    warnings.simplefilter('ignore')  # of the exporters, about themselves
    for name in ('torch.onnx', 'torch.export', 'torch._export', 'onnx_ir', 'onnxscript'):
        logging.getLogger(name).setLevel(logging.ERROR)
    module, content = build(cfg, args)
    if args.int8 or args.float16:
        if args.data_root:
            replace_data_root(cfg, args.data_root)
        with redirect_stdout(io.StringIO()):
            args.data, reason = smaller.test_data(cfg)
        if args.data is None:
            fail(
                f'--int8 and --float16 print what they cost, but {reason}; name its folder with '
                '--data-root.'
            )
    args.channels = metadata.channels_of(cfg)
    args.sizes = CHECKED
    if args.fixed_shape:
        args.shape, args.sizes = args.fixed_shape, [(1, *args.fixed_shape)]
    names = list(module(*example(module, args, 1, *(args.fixed_shape or (64, 64)))))
    wanted = [name for name in names if name != 'candidate_scores']
    if args.what == 'model':
        with sentences_for(ValueError):
            described = metadata.of_whole_model(
                cfg, args.config, args.checkpoint, content, wanted, args.resize_inside
            )
        crop = json.loads(described.get('crop', 'null'))
        if args.fixed_shape and crop not in (None, args.fixed_shape):
            fail(f'--fixed-shape must be {crop[0]} {crop[1]}, to which the test pipeline crops.')
        if args.fixed_shape:
            described['fixed_shape'] = json.dumps(args.fixed_shape)
            described['fill'] = json.dumps(module.preprocess.fill)
    else:
        described = metadata.of_network(cfg, args.what)

    out = Path(args.out)
    # Under its name there is a checked file or none, even if this is interrupted.
    part = out.with_name(f'.{out.stem}.{os.getpid()}{out.suffix}')
    try:
        onnx = args.format == 'onnx'
        if args.fixed_shape:
            print('1/4 tracing, for one size', flush=True)
            given = example(module, args, 1, *args.fixed_shape)
            program = export_fixed_size(exportable_for(module, given), given)
        else:
            print('1/4 tracing, with sizes left open', flush=True)
            program = export_any_size(
                exportable(module, module.any_size, by_operators=onnx),
                any_batch=not isinstance(module, WholeDetector),
                inputs=example(module, args, 2, 170, 203),
            )
        print(f'2/4 writing {args.format}', flush=True)
        if onnx:
            proto = to_onnx(program, input_names(module, args), names, described)
            operators = count_operators(proto)
            write_onnx(proto, part)
            exported = read_onnx(part, args.threads)
        else:
            operators = write_torch(program, described, part)
            exported = read_torch(part)
        print(
            f'3/4 checking it beside PyTorch on {len(args.sizes)} sizes'
            + ' that were not traced' * (not args.fixed_shape),
            flush=True,
        )
        check(module, exported, args)
        pipeline = metadata.test_dataset(cfg).get('pipeline')
        if args.what == 'model' and pipeline:
            check_from_files(module, pipeline, load_run_onnx().Model(str(part)))
            print("   from image files: what the config's test pipeline makes of them", flush=True)
        if wanted != names:
            leave_out(proto, set(names) - set(wanted))
            write_onnx(proto, part)
        if args.int8 or args.float16:
            make_smaller(part, cfg, args)
        if wanted != names or args.int8 or args.float16:
            exported = read_onnx(part, args.threads)
        print('4/4 measuring', flush=True)
        given = example(module, args, 1, *args.shape)
        theirs, ours = milliseconds(exported, given), milliseconds(module, given)
        part.replace(out)
    except Differs as error:
        print()
        fail(f"'{args.out}' of config '{args.config}' was not written: {error}.")
    finally:
        part.unlink(missing_ok=True)

    runtime = 'ONNX Runtime' if args.format == 'onnx' else 'the exported program'
    print(f'{out}: {out.stat().st_size / 1e6:.1f} MB, {sum(operators.values())} operators')
    print('outputs: ' + ', '.join(wanted))
    print('operators: ' + ', '.join(f'{name} {count}' for name, count in operators.most_common()))
    print(
        f'one image of {args.shape[0]} x {args.shape[1]}, {args.threads} thread'
        f'{"s" * (args.threads > 1)}: {runtime} {theirs:.0f} ms, PyTorch {ours:.0f} ms'
    )


if __name__ == '__main__':
    run(main)
