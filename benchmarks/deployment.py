"""CPU time and peak memory of exported backbones, next to PyTorch and Swin-T.

    python benchmarks/deployment.py --out benchmarks/deployment/NAME --size 800x1216

Every way runs in a process of its own, one at a time; the ways take turns, so that other load on
the machine affects all alike. CPU time is that of all threads, the median over runs. Leaves
results.json, table.md and deployment.png in --out; --only measures some ways again and keeps the
results of the others, --redraw only writes table and picture of results.json anew.
"""

import argparse
import json
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from common import ROOT, Worker, machine, peak_memory, product_rates, read_record, size_of, swin

sys.path.insert(0, str(ROOT))
# Ways by name: the model, the exported file that it needs (None: PyTorch's), and the runtime.
WAYS = {
    'PyTorch': ('crossformer', None, 'torch'),
    'any size, ONNX Runtime': ('crossformer', 'any_size', 'onnxruntime'),
    'any size, OpenVINO': ('crossformer', 'any_size', 'openvino'),
    'fixed size, ONNX Runtime': ('crossformer', 'fixed_size', 'onnxruntime'),
    'fixed size, OpenVINO': ('crossformer', 'fixed_size', 'openvino'),
    'Swin-T, PyTorch': ('swin', None, 'torch'),
    'Swin-T fixed size, ONNX Runtime': ('swin', 'fixed_size', 'onnxruntime'),
    'Swin-T fixed size, OpenVINO': ('swin', 'fixed_size', 'openvino'),
}


def build(model: str):
    import torch

    from crossformer_mm import CrossFormer

    torch.manual_seed(0)
    built = swin() if model == 'swin' else CrossFormer('s')
    built.train(False)  # returns nothing in MMDetection's
    return built.requires_grad_(False)


def write(model: str, kind: str, size: tuple, file: Path) -> None:
    """Export a backbone."""
    import torch

    from crossformer_mm.export import export_any_size, exportable
    from crossformer_mm.export.fixed_size import export_fixed_size, exportable_for
    from crossformer_mm.export.onnx_file import to_onnx, write_onnx

    module, image = build(model), torch.randn(1, 3, *size)
    names, sides = [f'feature_{index}' for index in range(4)], {}
    if kind == 'any_size':
        sides = {0: 'batch', 2: 'height', 3: 'width'}
        program = export_any_size(exportable(module, by_operators=True))
    else:
        program = export_fixed_size(exportable_for(module, [image]), [image])
    write_onnx(to_onnx(program, dict(image=sides), names, {}), file)


def starter(file: Path, runtime: str, model: str, threads: int):
    """Return a function that runs a file, or a model, on an array (1, 3, H, W)."""
    if runtime == 'torch':
        import torch

        torch.set_num_threads(threads)
        module = build(model)
        return lambda image: module(torch.from_numpy(image))
    if runtime == 'openvino':
        compiled = compile_openvino(file, threads)
        return lambda image: compiled([image])
    session = start_onnxruntime(file, threads)
    return lambda image: session.run(None, dict(image=image))


def compile_openvino(file: Path, threads: int, **options):
    """Compile a file as it is measured; ``options`` are further properties."""
    import openvino

    core = openvino.Core()
    options.update(INFERENCE_PRECISION_HINT='f32', INFERENCE_NUM_THREADS=threads)
    return core.compile_model(core.read_model(file), 'CPU', options)


def start_onnxruntime(file: Path, threads: int, profile: str = ''):
    """Start a session as it is measured; ``profile``: beginning of the path of a profile."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])


def work(case: dict) -> dict:
    """Load a way, run it once, and return a function of the time and memory of a further run."""
    import numpy as np

    image = np.random.default_rng(0).standard_normal((1, 3, *case['size'])).astype(np.float32)
    run = starter(case['file'], case['runtime'], case['model'], case['threads'])
    run(image)

    def timed() -> dict:
        start, begin = time.perf_counter(), time.process_time()
        run(image)
        seconds, cpu = time.perf_counter() - start, time.process_time() - begin
        return dict(seconds=round(seconds, 3), cpu=round(cpu, 3), peak=peak_memory())

    return dict(run=timed)


def measure(size: tuple, threads: int, repeats: int, folder: Path, names: list) -> list:
    """Measure the ways of these names; ``folder`` has the exported files, or gets them."""
    turns = []
    for name in names:
        model, kind, runtime = WAYS[name]
        if find_spec(runtime) is None:
            print(f'   {name}: left out, {runtime} is not installed', flush=True)
            continue
        file = folder / f'{model}_{kind}_{size[0]}x{size[1]}.onnx'
        if kind:
            print(f"   {'taking' if file.is_file() else 'writing'} {file}", flush=True)
        if kind and not file.is_file():
            write(model, kind, size, file)
        case = dict(runtime=runtime, model=model, size=size, threads=threads)
        result = dict(case, name=name, file_size=file.stat().st_size if kind else None, peak=0)
        turns.append((dict(case, file=str(file)), dict(result, cpu=[], seconds=[])))
    for _ in range(repeats):
        for case, result in turns:  # one process in memory at a time
            worker = Worker(work, case)
            try:
                for _ in range(2):
                    answered = worker.ask('run')
                    result['cpu'].append(answered['cpu'])
                    result['seconds'].append(answered['seconds'])
                result['peak'] = max(result['peak'], answered['peak'])
            except RuntimeError as error:
                sys.exit(f"error: {result['name']} failed: {error}")
            worker.close()
    return [result for _, result in turns]


def table_of(record: dict) -> str:
    """Write the results as Markdown."""
    rates = ', '.join(f'{name} {rate:.0f}' for name, rate in record['rates'].items())
    lines = [f'    {record["command"]}', '', record['machine'], '']
    lines += [
        f'Products of two matrices, GFLOP/s: {rates}',
        '',
        '| way | CPU time | time | CPU time / Swin-T so exported | peak memory | file |',
        '|---|---|---|---|---|---|',
    ]
    cpu = {result['name']: statistics.median(result['cpu']) for result in record['results']}
    for result in record['results']:
        name, size = result['name'], result['file_size']
        base = 'Swin-T, PyTorch' if name == 'PyTorch' else f'Swin-T {name}'
        lines.append(
            f'| {name}{" *" * result.get("anew", False)} | {cpu[name]:.2f} s | '
            + f'{statistics.median(result["seconds"]):.2f} s | '
            + (f'{cpu[name] / cpu[base]:.2f}' if base in cpu else '–')
            + f' | {result["peak"] / 2**30:.2f} GiB | '
            + (f'{size / 1e6:.0f} MB |' if size else '– |')
        )
    if any(result.get('anew') for result in record['results']):
        lines += ['', '\\* measured in a later run, by `--only`']
    return '\n'.join(lines) + '\n'


def run(args: argparse.Namespace, file: Path) -> dict:
    """Measure the ways and write their results to a file."""
    import torch

    torch.set_num_threads(args.threads)
    if args.only:
        record = read_record(file, '--only')
    else:
        record = dict(
            command='python benchmarks/deployment.py --size {}x{}'.format(*args.size),
            machine=machine(args.threads),
            rates=product_rates(),
        )
    with torch.no_grad():
        results = measure(args.size, args.threads, args.repeats, args.out, args.only or WAYS)
    if args.only:
        new = {result['name']: dict(result, anew=True) for result in results}
        results = [new.get(one['name'], one) for one in record['results']]
    record['results'] = results
    file.write_text(json.dumps(record, indent=1) + '\n')
    return record


def draw(record: dict, file: Path) -> None:
    """Draw CPU time and peak memory as bars."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    results = record['results'][::-1]  # the first one at the top
    names = [result['name'] for result in results]
    colours = ['#888888' if result['model'] == 'swin' else '#1b6ca8' for result in results]
    cpu = [statistics.median(result['cpu']) for result in results]
    gibs = [result['peak'] / 2**30 for result in results]
    figure, axes = pyplot.subplots(1, 2, sharey=True, figsize=(11, 4.2), layout='constrained')
    for axis, values, title, unit in zip(
        axes, (cpu, gibs), ('CPU time of all threads', 'Peak memory of the process'), ('s', 'GiB')
    ):
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, [f'{value:.2f} {unit}' for value in values], padding=3)
        axis.set(title=title, xticks=[], xlim=(0, 1.17 * max(values)))
        axis.spines[['top', 'right', 'bottom']].set_visible(False)
    size = '{}x{}'.format(*results[0]['size'])
    figure.suptitle(
        f"Exported backbones, one image of {size}: CrossFormer-S blue, Swin-T grey\n"
        f"{record['machine']}",
        fontsize=10,
    )
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--size', type=size_of, default=(800, 1216), metavar='HxW')
    add('--threads', type=int, default=2, help='of the CPU (default: 2)')
    add('--repeats', type=int, default=2, help='turns of each (default: 2)')
    add('--out', type=Path, default='work_dirs/deployment', help='folder for the results')
    add('--only', nargs='+', choices=WAYS, metavar='WAY', help='measure only these ways again')
    add('--redraw', action='store_true', help='only write table and picture of results.json anew')
    args = parser.parse_args()
    if min(args.threads, args.repeats) < 1:
        parser.error('--threads and --repeats must be 1 or more.')
    file = args.out / 'results.json'
    args.out.mkdir(parents=True, exist_ok=True)
    record = read_record(file, '--redraw') if args.redraw else run(args, file)
    (args.out / 'table.md').write_text(table_of(record))
    draw(record, args.out / 'deployment.png')
    print(table_of(record), f'\nleft in {args.out}: results.json, table.md and deployment.png')


if __name__ == '__main__':
    main()
