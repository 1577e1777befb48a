"""Time by operator of backbones exported at a fixed size, and their products in GFLOP.

    python benchmarks/deployment_operators.py FOLDER

FOLDER has the files that `deployment.py --out FOLDER` left. Prints Markdown tables. A node's time
is the shortest of three runs, in a process of its own, by the runtime's own profiler.
"""

import argparse
import json
from collections import Counter
from math import prod
from pathlib import Path

from common import Worker, machine, size_of
from deployment import compile_openvino, start_onnxruntime

MODELS = dict(crossformer='CrossFormer-S', swin='Swin-T')


def products(file: Path) -> Counter:
    """Count the GFLOP of a file's products: of weights, in attention and of convolutions."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(file), data_prop=True).graph
    shapes = {one.name: [*one.dims] for one in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        shapes[value.name] = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    found: Counter = Counter()
    for node in graph.node:
        if node.op_type not in ('Conv', 'MatMul', 'Gemm'):
            continue
        first, second = (shapes[name] for name in node.input[:2])
        if node.op_type == 'Conv':
            kind, terms = 'convolutions', prod(second[1:])
        else:
            kind, terms = ('attention' if len(second) > 2 else 'weights'), first[-1]
        found[kind] += 2 * prod(shapes[node.output[0]]) * terms / 1e9
    return found


def profile_onnxruntime(file: Path, image, threads: int, folder: Path) -> list:
    """Return (operator, node, seconds) of each node and run."""
    session = start_onnxruntime(file, threads, profile=str(folder / 'profile'))
    for _ in range(3):
        session.run(None, dict(image=image))
    written = Path(session.end_profiling())
    events = json.loads(written.read_text())
    written.unlink()
    return [
        (event['args']['op_name'], event['name'], event['dur'] / 1e6)
        for event in events
        if event['name'].endswith('_kernel_time')
    ]


def profile_openvino(file: Path, image, threads: int, folder: Path) -> list:
    """Return (operator, node, seconds) of each node and run."""
    found = []
    request = compile_openvino(file, threads, PERF_COUNT=True).create_infer_request()
    for _ in range(3):
        request.infer([image])
        for node in request.profiling_info:
            found.append((node.node_type, node.node_name, node.real_time.total_seconds()))
    return found


RUNTIMES = {'ONNX Runtime': profile_onnxruntime, 'OpenVINO': profile_openvino}


def work(case: dict) -> dict:
    """Return a function of the milliseconds of each operator."""
    import numpy as np

    file = Path(case['file'])
    image = np.random.default_rng(0).standard_normal((1, 3, *case['size'])).astype(np.float32)

    def profile() -> dict:
        shortest: dict = {}
        nodes = RUNTIMES[case['runtime']](file, image, case['threads'], file.parent)
        for operator, node, seconds in nodes:
            shortest[operator, node] = min(seconds, shortest.get((operator, node), seconds))
        total: Counter = Counter()
        for (operator, _), seconds in shortest.items():
            total[operator] += 1000 * seconds
        return total

    return dict(profile=profile)


def print_table(title: str, columns: dict) -> None:
    """Print columns of numbers by row, the largest first, and their sums."""
    names = {name for column in columns.values() for name in column}
    largest = {name: max(column.get(name, 0) for column in columns.values()) for name in names}
    print(f'\n| {title} | {" | ".join(columns)} |\n|---|{"---|" * len(columns)}')
    for name in sorted(largest, key=lambda name: -largest[name]):
        if largest[name] >= 1:
            print(f'| {name} | {" | ".join(f"{c.get(name, 0):.0f}" for c in columns.values())} |')
    print(f'| all | {" | ".join(f"{sum(c.values()):.0f}" for c in columns.values())} |')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('--size', type=size_of, default=(800, 1216), metavar='HxW')
    parser.add_argument('--threads', type=int, default=2, help='of the CPU (default: 2)')
    args = parser.parse_args()
    print(machine(args.threads))
    files = {
        name: args.folder / f'{model}_fixed_size_{args.size[0]}x{args.size[1]}.onnx'
        for model, name in MODELS.items()
    }
    print_table('GFLOP of products', {name: products(file) for name, file in files.items()})
    for runtime in RUNTIMES:
        columns = {}
        for name, file in files.items():
            case = dict(file=str(file), size=args.size, threads=args.threads, runtime=runtime)
            worker = Worker(work, case)
            columns[name] = worker.ask('profile')
            worker.close()
        print_table(f'{runtime}, ms', columns)


if __name__ == '__main__':
    main()
