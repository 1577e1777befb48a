"""Exports from a config to a checked file."""

import io
import json
import os
import timeit
from collections import Counter
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from statistics import median
from typing import Callable, List, NamedTuple, Sequence, Tuple

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..errors import UserError
from ..without_torch.model import Model, start_onnxruntime
from . import compare, metadata, smaller
from .any_size import export_any_size, exportable
from .build import build
from .fixed_size import export_fixed_size, exportable_for
from .from_files import check_from_files
from .models import WholeDetector
from .networks import Outputs
from .onnx_file import count_operators, leave_out, to_onnx, write_onnx
from .options import Options


class Report(NamedTuple):
    """Facts of an exported file: its operators, outputs, and milliseconds for one image."""

    operators: Counter
    outputs: List[str]
    file_ms: float
    torch_ms: float


@torch.no_grad()
def export_file(cfg: Config, options: Options) -> Report:
    """Export a model, check the file, and print the steps.

    The file gets its name after it was checked; if anything fails, there is none.

    Args:
        cfg: config of the model; for int8 and float16 also of the test data.
        options: checked ones.

    Raises:
        UserError: the model cannot be exported, or the file differs from PyTorch.
    """
    module, content = build(cfg, options)
    data = None
    if options.int8 or options.float16:
        with redirect_stdout(io.StringIO()):
            data = smaller.test_data(cfg)
    inputs = partial(compare.example, module, metadata.channels_of(cfg), options.input_type)
    fixed = options.fixed_shape
    names = list(module(*inputs(1, *(fixed or (64, 64)))))
    wanted = [name for name in names if name != 'candidate_scores']
    described = describe(cfg, options, module, content, wanted)
    out = Path(options.out)
    part = out.with_name(f'.{out.stem}.{os.getpid()}{out.suffix}')
    try:
        program = trace(module, inputs, options)
        print(f'2/4 writing {options.format}', flush=True)
        if options.format == 'onnx':
            proto = to_onnx(program, compare.input_names(module, bool(fixed)), names, described)
            operators = count_operators(proto)
            write_onnx(proto, part)
            exported = read_onnx(part, options.threads)
        else:
            operators = write_torch(program, described, part)
            exported = read_torch(part)
        sizes = [(1, *fixed)] if fixed else compare.SIZES
        untraced = '' if fixed else ' that were not traced'
        print(f'3/4 comparing it with PyTorch on {len(sizes)} sizes{untraced}', flush=True)
        compare.check(module, exported, sizes, inputs)
        pipeline = metadata.test_dataset(cfg).get('pipeline')
        if options.what == 'model' and pipeline:
            check_from_files(module, pipeline, Model(str(part)))
            print("   image files are prepared as by the config's test pipeline", flush=True)
        if wanted != names:
            leave_out(proto, set(names) - set(wanted))
            write_onnx(proto, part)
        if data is not None:
            make_smaller(part, cfg.default_scope, data, options)
        if wanted != names or data is not None:
            exported = read_onnx(part, options.threads)
        print('4/4 measuring', flush=True)
        given = inputs(1, *(fixed or options.shape))
        report = Report(
            operators, wanted, milliseconds(exported, given), milliseconds(module, given)
        )
        part.replace(out)
    except compare.Differs as error:
        print()
        raise UserError(
            f"'{options.out}' of config '{options.config}' was not written: {error}."
        ) from None
    finally:
        part.unlink(missing_ok=True)
    return report


def describe(
    cfg: Config, options: Options, module: nn.Module, content: dict, outputs: List[str]
) -> dict:
    """Return the metadata of the file."""
    if options.what != 'model':
        return metadata.of_network(cfg, str(options.what))
    return metadata.of_whole_model(cfg, options, content, outputs, module.preprocess.fill)


def trace(module: nn.Module, inputs: Callable, options: Options) -> ExportedProgram:
    """Trace a module for one size or for any."""
    if options.fixed_shape:
        print('1/4 tracing, for one size', flush=True)
        given = inputs(1, *options.fixed_shape)
        return export_fixed_size(exportable_for(module, given), given)
    print('1/4 tracing, with sizes left open', flush=True)
    return export_any_size(
        exportable(module, module.any_size, by_operators=options.format == 'onnx'),
        any_batch=not isinstance(module, WholeDetector),
        inputs=inputs(2, 170, 203),
    )


def write_torch(program: ExportedProgram, described: dict, path: Path) -> Counter:
    """Write a program for ``torch.export.load``, and count its operators."""
    torch.export.save(program, path, extra_files={'description.json': json.dumps(described)})
    return Counter(str(node.target) for node in program.graph.nodes if node.op == 'call_function')


def read_onnx(path: Path, threads: int) -> Callable[..., Outputs]:
    """Load an ONNX file as a function of tensors."""
    inputs, outputs, compute, _ = start_onnxruntime(str(path), 'cpu', threads)
    return lambda *given: {
        name: torch.from_numpy(out)
        for name, out in zip(outputs, compute({key: x.numpy() for key, x in zip(inputs, given)}))
    }


def read_torch(path: Path) -> Callable[..., Outputs]:
    """Load a program as a function of tensors."""
    return torch.export.load(path).module()


def milliseconds(function: Callable, given: Sequence[Tensor]) -> float:
    """Return the median time of three runs, after one to warm up."""
    function(*given)
    return 1000 * median(timeit.repeat(lambda: function(*given), number=1, repeat=3))


def make_smaller(file: Path, scope: str, data, options: Options) -> None:
    """Store weights in fewer bits, and print the metric on test data before and after."""

    def metric() -> Tuple[str, float]:
        model = Model(str(file), threads=options.threads)
        with redirect_stdout(io.StringIO()):  # the tables of the metrics
            return smaller.metric_of(scope, data, lambda data: model(model.decode(data)))

    size, (name, before) = file.stat().st_size, metric()
    (smaller.to_int8 if options.int8 else smaller.to_float16)(file)
    _, after = metric()
    print(
        f'   {"int8" if options.int8 else "float16"}: {name} {before:.3f} before, {after:.3f} '
        f'after ({after - before:+.3f}), on {min(len(data), smaller.MAX_IMAGES)} images of '
        f'the test data; {size / 1e6:.1f} MB before, {file.stat().st_size / 1e6:.1f} MB after'
    )
