"""CPU time and peak memory of exported backbones, beside PyTorch and Swin-T.

    python benchmarks/deployment.py --out benchmarks/deployment/NAME --size 800x1216

Every way runs in a process of its own, three times, after it has loaded; the ways take turns, so
that whatever else the machine does falls on all alike. CPU time is that of all threads of the
median run. Leaves results.json, table.md and deployment.png in --out; --redraw makes the last two
again, --only measures some ways anew beside those that are there.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from backbone import size_of
from processor import processor, product_rates

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Of each way: the model, the file it needs (or None: PyTorch itself) and what runs it.
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

    torch.manual_seed(0)
    if model == 'swin':
        from mmdet.models.backbones import SwinTransformer

        built = SwinTransformer(depths=(2, 2, 6, 2))
    else:
        from crossformer_mm import CrossFormer

        built = CrossFormer('s')
    built.train(False)  # which returns nothing in MMDetection's
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
    """A function of an array (1, 3, H, W)."""
    if runtime == 'torch':
        import torch

        torch.set_num_threads(threads)
        module = build(model)
        return lambda image: module(torch.from_numpy(image))
    if runtime == 'openvino':
        import openvino

        core = openvino.Core()
        options = {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': threads}
        compiled = core.compile_model(core.read_model(file), 'CPU', options)
        return lambda image: compiled([image])
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    return lambda image: session.run(None, dict(image=image))


def work(case: dict) -> None:
    """Load, then run once for each line that comes in; answer with a line of JSON."""
    import numpy as np

    image = np.random.default_rng(0).standard_normal((1, 3, *case['size'])).astype(np.float32)
    run = starter(case['file'], case['runtime'], case['model'], case['threads'])
    run(image)
    for _ in sys.stdin:
        start, begin = time.perf_counter(), time.process_time()
        run(image)
        seconds, cpu = time.perf_counter() - start, time.process_time() - begin
        status = Path('/proc/self/status').read_text()
        peak = int(status.split('VmHWM:')[1].split()[0]) * 1024
        print(json.dumps(dict(seconds=seconds, cpu=cpu, peak=peak)), flush=True)


def measure(size: tuple, threads: int, repeats: int, folder: Path, names: list) -> list:
    results = []
    for name in names:
        model, kind, runtime = WAYS[name]
        if find_spec(runtime) is None:
            print(f'   {name}: left out, {runtime} is not installed', flush=True)
            continue
        file = folder / f'{model}_{kind}_{size[0]}x{size[1]}.onnx'
        if kind and not file.is_file():
            print(f'   writing {file}', flush=True)
            write(model, kind, size, file)
        case = dict(file=str(file), runtime=runtime, model=model, size=size, threads=threads)
        results.append(
            dict(case, name=name, file_size=file.stat().st_size if kind else None, cpu=[])
        )
        results[-1]['seconds'] = []
    for _ in range(repeats):
        for result in results:  # a process a turn: no two are in memory at a time
            done = subprocess.run(
                [sys.executable, '-W', 'ignore', __file__, '--worker', json.dumps(result)],
                input='\n\n',
                capture_output=True,
                text=True,
                env={**os.environ, 'OMP_NUM_THREADS': str(threads)},
            )
            lines = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == '{']
            if not lines:
                sys.exit(f"error: {result['name']} failed: {done.stderr.strip()[-300:]}")
            result['cpu'] += [round(line['cpu'], 3) for line in lines]
            result['seconds'] += [round(line['seconds'], 3) for line in lines]
            result['peak'] = max(result.get('peak', 0), lines[-1]['peak'])
    for result in results:
        result.pop('file')
    return results


def table_of(record: dict) -> str:
    lines = [f'    {record["command"]}', '', record['machine'], '']
    lines += [
        'Products of two matrices, GFLOP/s: '
        + ', '.join(f'{name} {rate:.0f}' for name, rate in record['rates'].items()),
        '',
        '| way | CPU time | time | CPU time / Swin-T so exported | peak memory | file |',
        '|---|---|---|---|---|---|',
    ]
    cpu = {result['name']: statistics.median(result['cpu']) for result in record['results']}
    for result in record['results']:
        name, size = result['name'], result['file_size']
        beside = {
            'PyTorch': 'Swin-T, PyTorch',
            'fixed size, ONNX Runtime': 'Swin-T fixed size, ONNX Runtime',
            'fixed size, OpenVINO': 'Swin-T fixed size, OpenVINO',
        }.get(name)
        lines.append(
            f'| {name}{" *" * result.get("anew", False)} | {cpu[name]:.2f} s | '
            + f'{statistics.median(result["seconds"]):.2f} s | '
            + (f'{cpu[name] / cpu[beside]:.2f}' if beside in cpu else '–')
            + f' | {result["peak"] / 2**30:.2f} GiB | '
            + (f'{size / 1e6:.0f} MB |' if size else '– |')
        )
    if any(result.get('anew') for result in record['results']):
        lines += ['', '\\* measured in a later run, by `--only`']
    return '\n'.join(lines) + '\n'


def draw(record: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    results = record['results'][::-1]
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.9 + 0.45 * len(results)), sharey=True)
    for axis, values, title, unit in (
        (axes[0], [statistics.median(r['cpu']) for r in results], 'CPU time of all threads', 's'),
        (axes[1], [r['peak'] / 2**30 for r in results], 'Peak memory of the process', 'GiB'),
    ):
        colours = ['C7' if r['model'] == 'swin' else 'C0' for r in results]
        bars = axis.barh([r['name'] for r in results], values, color=colours)
        axis.bar_label(bars, [f'{value:.2f} {unit}' for value in values], padding=3)
        axis.set(title=title, xlim=(0, 1.2 * max(values)))
        axis.spines[['top', 'right']].set_visible(False)
    size, machine = 'x'.join(map(str, results[0]['size'])), record['machine']
    figure.suptitle(f'CrossFormer-S exported, one image of {size} ({machine})', fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--size', type=size_of, default=(800, 1216), metavar='HxW')
    parser.add_argument('--threads', type=int, default=2, help='of the CPU (default: 2)')
    parser.add_argument('--repeats', type=int, default=2, help='turns of each (default: 2)')
    parser.add_argument('--files', help='folder of the exported files (default: that of --out)')
    parser.add_argument('--out', default='work_dirs/deployment', help='folder for what is left')
    parser.add_argument(
        '--only',
        nargs='+',
        choices=list(WAYS),
        metavar='WAY',
        help='measure these rows of the table anew, and keep the others of results.json',
    )
    parser.add_argument(
        '--redraw', action='store_true', help='only make table and picture again from results.json'
    )
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(json.loads(args.worker))
        return
    if min(args.threads, args.repeats) < 1:
        parser.error('--threads and --repeats must be 1 or more.')
    folder = Path(args.out)
    file = folder / 'results.json'
    if args.redraw or args.only:
        if not file.is_file():
            sys.exit(f"error: --{'redraw' if args.redraw else 'only'}: '{file}' does not exist.")
        record = json.loads(file.read_text())
    if not args.redraw:
        import torch

        folder.mkdir(parents=True, exist_ok=True)
        files = Path(args.files or folder)
        files.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(args.threads)
        if not args.only:
            record = dict(
                command='python benchmarks/deployment.py --size {}x{}'.format(*args.size),
                machine=f'{processor()}, {args.threads} threads, PyTorch {torch.__version__}, '
                f'Python {platform.python_version()}',
                rates={name: round(rate, 1) for name, rate in product_rates().items()},
            )
        names = args.only or list(WAYS)
        with torch.no_grad():
            results = measure(args.size, args.threads, args.repeats, files, names)
        if args.only:
            new = {result['name']: dict(result, anew=True) for result in results}
            record['results'] = [new.get(one['name'], one) for one in record['results']]
        else:
            record['results'] = results
        file.write_text(json.dumps(record, indent=1) + '\n')
    (folder / 'table.md').write_text(table_of(record))
    draw(record, folder / 'deployment.png')
    print(table_of(record), f'\nleft in {folder}: results.json, table.md, deployment.png')


if __name__ == '__main__':
    main()
