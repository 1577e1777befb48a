"""Time and memory of the backbone, next to the backbones that users would choose instead.

    for run in 1 2 3; do python benchmarks/backbone.py --out benchmarks/cpu/NAME --add; done

Time: every model runs in a process of its own, with the system's own allocator. The processes take
turns, one step each, so that other load on the machine affects all alike. Ratios are to models of
the same run; the table has their median and range over runs. Memory: the peak of a
further process for each model, which returns freed memory to the system at once, so that the
figure is what is in use. ``crossformer_s-floor`` is CrossFormer-S without its attention core:
linear layers, convolutions and norms.

Leaves results.json, table.md, time.png and memory.png in --out.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, nullcontext
from pathlib import Path
from unittest import mock

from common import (
    ROOT,
    Worker,
    draw_curves,
    machine,
    peak_memory,
    product_rates,
    read_record,
    size_of,
    swin,
)

# Options of CrossFormer('s').
OURS = {
    'crossformer_s': {},
    'crossformer_s-floor': {},
    'crossformer_s-block': dict(lda='block'),
    'crossformer_s-with_cp': dict(with_cp=True),
    'crossformer_s-plain': dict(attention_path='plain'),
    'crossformer_s-fused': dict(attention_path='fused'),
}
SWIN = dict(swin_t=(2, 2, 6, 2), swin_s=(2, 2, 18, 2))
MODELS = (*OURS, 'mask_and_pad', *SWIN, 'resnet_50')
DEFAULT = [name for name in MODELS if name != 'crossformer_s-fused']
MODES = dict(infer='Inference', train='Training step')
# glibc returns freed blocks of a megabyte or more to the system.
GIVE_BACK = {'MALLOC_MMAP_THRESHOLD_': '1000000', 'MALLOC_TRIM_THRESHOLD_': '1000000'}


# One model, in a process of its own


def build(name: str):
    """Build a backbone; ``mask_and_pad`` is the plain formulation of the tests."""
    if name == 'resnet_50':
        from mmdet.models.backbones import ResNet

        return ResNet(50)
    if name in SWIN:
        return swin(SWIN[name])
    from crossformer_mm import CrossFormer

    model = CrossFormer('s', **OURS.get(name, {}))
    if name.endswith('floor'):
        for module in model.modules():
            if hasattr(module, 'attend'):
                module.attend = values_only
    if name == 'mask_and_pad':
        from tests.oracle import plain_features

        model.forward = lambda image: plain_features(dict(model.named_parameters()), image)
    return model


def values_only(qkv, *_):
    """Stand for attention: return the values as they are."""
    return qkv[..., -qkv.shape[-1] // 3 :].contiguous()


def count_flops(name: str, size: tuple, batch: int) -> int:
    """Count the operations of a forward pass, 2 for a multiply-accumulate."""
    import torch

    from crossformer_mm.flops import operation_counter

    model = build(name).to('meta')
    model.eval()  # returns nothing in MMDetection's
    with torch.no_grad(), operation_counter(model) as counter:
        model(torch.empty(batch, 3, *size, device='meta'))
    return counter.get_total_flops()


def work(case: dict) -> dict:
    """Return functions of one case: seconds of a step, peak memory, FLOPs, seconds by part."""
    import torch

    sys.path.insert(0, str(ROOT))
    torch.manual_seed(0)
    if case['threads']:
        torch.set_num_threads(case['threads'])
    device, train = torch.device(case['device']), case['mode'] == 'train'
    model = build(case['model']).to(device)
    model.train(train)
    image = torch.randn(case['batch'], 3, *case['size'], device=device)
    dtype = getattr(torch, case['dtype'])
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

    def step() -> float:
        start = time.perf_counter()
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(train), autocast:
            features = model(image)
            loss = sum(feature.float().mean() for feature in features) if train else None
        if train:
            loss.backward()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return dict(
        step=step,
        peak=torch.cuda.max_memory_allocated if device.type == 'cuda' else peak_memory,
        flops=lambda: count_flops(case['model'], case['size'], case['batch']),
        parts=lambda: time_of_parts(model, step),
    )


def time_of_parts(model, step) -> dict:
    """Return the seconds of one step of a CrossFormer by kind of layer."""
    import torch

    from crossformer_mm import attention, embedding, layers

    kinds = {
        embedding.CrossScaleConvs: 'embedding and merging',
        attention.GroupAttention: 'attention in groups',
        layers.Mlp: 'MLP',
        torch.nn.LayerNorm: 'LayerNorm',
    }
    seconds, running = defaultdict(float), []

    def begin(*_) -> None:
        running.append([time.perf_counter(), 0.0])

    def end(kind: str) -> None:
        start, inside = running.pop()
        took = time.perf_counter() - start
        seconds[kind] += took - inside
        if running:
            running[-1][1] += took

    def timed(function, kind):
        def run(*args):
            begin()
            out = function(*args)
            end(kind)
            return out

        return run

    # Hooks of these would turn their faster ways off.
    functions = dict(linear='projections (q k v, out)', position_table='position bias')
    with ExitStack() as stack:
        for name, kind in functions.items():
            function = timed(getattr(attention, name), kind)
            stack.enter_context(mock.patch.object(attention, name, function))
        for name, module in model.named_modules():
            kind = kinds.get(type(module))
            if kind and '.pos.' not in name:
                stack.callback(module.register_forward_pre_hook(begin).remove)
                hook = module.register_forward_hook(lambda *_, kind=kind: end(kind))
                stack.callback(hook.remove)
        total = step()
    seconds['rest'] = total - sum(seconds.values())
    return dict(seconds)


# All models in turn


def measure_time(cases: list, repeats: int) -> list:
    """Time cases of one size, in turn; one result for each that runs."""
    results = []
    for worker in [Worker(work, case) for case in cases]:
        try:
            worker.ask('step')  # warms up
            results.append((worker, {**worker.case, 'seconds': []}))
        except RuntimeError as error:
            report(worker.case, f'left out, {error}')
            worker.close()
    for _ in range(repeats):
        for worker, result in results:
            result['seconds'].append(round(worker.ask('step'), 4))
    for worker, result in results:
        result['median'] = round(statistics.median(result['seconds']), 4)
        if result['model'] == 'crossformer_s' and result['mode'] == 'infer':
            result['parts'] = worker.ask('parts')
        worker.close()
        report(result, f'{result["median"]:8.3f} s')
    return [result for _, result in results]


def measure_memory(cases: list) -> list:
    """Measure peak memory of cases, and count FLOPs; one result for each that runs."""
    results = []
    for worker in (Worker(work, case, **GIVE_BACK) for case in cases):
        try:
            for _ in range(2):
                worker.ask('step')
            result = {**worker.case, 'peak_memory': worker.ask('peak')}
            if result['model'] != 'mask_and_pad':
                result['flops'] = worker.ask('flops')
            results.append(result)
            report(result, f'{result["peak_memory"] / 2**30:8.2f} GiB')
        except RuntimeError as error:
            report(worker.case, f'left out, {error}')
        worker.close()
    return results


def report(case: dict, figure: str) -> None:
    print(f'   {case["model"]:24} {case["mode"]:6} {case["dtype"]:9} {figure}', flush=True)


# Table and pictures


def slope(points: list) -> float:
    """Fit the exponent of growth; 1 is linear in the area."""
    import numpy as np

    return float(np.polyfit(*np.log(np.array(points).T), 1)[0])


def series(results: list, quantity: str) -> list:
    """Return (model, mode, dtype, [(pixels, quantity)]) of single images of several sizes."""
    found = defaultdict(lambda: defaultdict(list))
    for r in results:
        if r['batch'] == 1 and quantity in r:
            area = r['size'][0] * r['size'][1]
            found[r['model'], r['mode'], r['dtype']][area].append(r[quantity])
    return [
        (*key, sorted((area, statistics.median(values)) for area, values in points.items()))
        for key, points in found.items()
        if len(points) > 1
    ]


def over_runs(values: list, unit: str = '', digits: int = 2) -> str:
    """Return the median of a figure of several runs, and its range."""
    if not values:
        return '–'
    low, median, high = (
        f'{value:.{digits}f}' for value in (min(values), statistics.median(values), max(values))
    )
    return f'{median}{unit} ({low} to {high})' if len(values) > 1 else f'{median}{unit}'


def ratios(results: list, bases: list, quantity: str) -> list:
    """Return the ratio of two models in each run that has both."""
    base = {r['run']: r[quantity] for r in bases if quantity in r}
    return [r[quantity] / base[r['run']] for r in results if quantity in r and r['run'] in base]


def table_of(record: dict) -> str:
    """Write a section of Markdown for each size, batch, mode and type."""
    commands = Counter(record['commands'])
    lines = [*(f'    {command}  # {count}x' for command, count in commands.items()), '']
    lines += [record['machine'], '']
    if record['rates']:
        rates = {name: [rate[name] for rate in record['rates']] for name in record['rates'][0]}
        said = ', '.join(f'{name} {over_runs(rate, "", 0)}' for name, rate in rates.items())
        lines += [f'Products of two matrices, GFLOP/s: {said}.', '']
    lines += [
        "Times are those of the system's own allocator, medians of a run's turns. Each figure is "
        'the median of the runs, with their range; ratios are to models of the same run. '
        'Floor is CrossFormer-S without its attention core. GFLOP/s counts convolutions, linear '
        'layers and products of attention, a training step as three forward passes.',
        '',
    ]
    groups = defaultdict(lambda: defaultdict(list))
    for r in record['results']:
        groups[tuple(r['size']), r['batch'], r['mode'], r['dtype']][r['model']].append(r)
    for ((height, width), batch, mode, dtype), models in sorted(groups.items()):
        lines += [
            f'**{height}x{width}, batch {batch}, {mode}, {dtype}**',
            '',
            '| model | time | GFLOP/s | peak memory | time / Swin-T | time / floor '
            '| memory / Swin-T |',
            '|---' * 7 + '|',
        ]
        swin_t, floor = (models.get(name, []) for name in ('swin_t', 'crossformer_s-floor'))
        for name, rs in models.items():
            flops = [r['flops'] / 1e9 * (3 if mode == 'train' else 1) for r in rs if 'flops' in r]
            times = [r['median'] for r in rs if 'median' in r]
            memory = [r['peak_memory'] / 2**30 for r in rs if 'peak_memory' in r]
            cells = [
                name,
                over_runs(times, ' s', 3),
                over_runs([flops[0] / time for time in times] if flops else [], '', 0),
                over_runs(memory, ' GiB'),
                over_runs(ratios(rs, swin_t, 'median')),
                over_runs(ratios(rs, floor, 'median')),
                over_runs(ratios(rs, swin_t, 'peak_memory')),
            ]
            lines.append(f'| {" | ".join(cells)} |')
        lines.append('')
        full = groups.get(((height, width), batch, mode, 'float32'), {})
        for name, rs in models.items():
            if dtype != 'float32' and name in full:
                lines.append(
                    f'- {name}, {mode}, {height}x{width}: {dtype} takes '
                    f'{over_runs(ratios(rs, full[name], "median"))} of the time of float32'
                )
        parts = [r['parts'] for rs in models.values() for r in rs if 'parts' in r]
        if parts:
            shares = [{part: t / sum(of.values()) for part, t in of.items()} for of in parts]
            means = {part: statistics.mean(of[part] for of in shares) for part in sorted(shares[0])}
            said = ', '.join(f'{part} {share:.0%}' for part, share in means.items())
            lines += [f'Time of a forward of CrossFormer-S by part: {said}', '']
    for name, mode, dtype, points in series(record['results'], 'median'):
        lines.append(
            f'- {name}, {mode}, {dtype}: time grows with area to the power {slope(points):.2f}'
        )
    return '\n'.join(lines) + '\n'


def draw(results: list, quantity: str, unit: str, scale: float, file: Path) -> None:
    """Draw a quantity against the image area, for each mode with several sizes."""
    panels, models = [], list(dict.fromkeys(r['model'] for r in results))
    for mode, title in MODES.items():
        lines = []
        for name, of, dtype, points in series(results, quantity):
            if of != mode:
                continue
            lines.append(
                dict(
                    x=[area / 1e6 for area, _ in points],
                    y=[y * scale for _, y in points],
                    label=f'{name}, {dtype} (slope {slope(points):.2f})',
                    color=f'C{models.index(name) % 10}',
                    linestyle='-' if dtype == 'float32' else '--',
                    marker='o',
                )
            )
        axes = dict(title=title, xlabel='image area, megapixels', ylabel=unit)
        panels.append(dict(axes, xscale='log', yscale='log', lines=lines))
    panels = [panel for panel in panels if panel['lines']]
    if panels:
        draw_curves(file, panels, len(panels))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--models', nargs='+', choices=MODELS, default=DEFAULT)
    add('--modes', nargs='+', choices=MODES, default=list(MODES))
    add(
        '--dtypes',
        nargs='+',
        choices=('float32', 'bfloat16', 'float16'),
        default=['float32'],
        help='types other than float32 are used by autocast',
    )
    sizes = [(224, 224), (512, 512), (800, 1216)]
    add('--sizes', nargs='+', type=size_of, metavar='HxW', default=sizes)
    add('--batch', type=int, default=1)
    add('--repeats', type=int, default=5, help='timed steps of each, at least 2')
    add('--only', choices=('time', 'memory'), help='instead of both')
    add('--threads', type=int, default=2, help='of the CPU; 0: as PyTorch chooses')
    add('--device', default='cpu', help='cpu or cuda')
    add('--out', type=Path, default='work_dirs/benchmark', help='folder for the results')
    add('--add', action='store_true', help='a further run next to those of results.json in --out')
    add('--redraw', action='store_true', help='only write table and pictures of results.json anew')
    args = parser.parse_args()
    if args.repeats < 2 or args.batch < 1:
        parser.error('--repeats must be 2 or more, --batch 1 or more.')
    return args


def run(args, file: Path) -> dict:
    """Measure all cases; the file is written after each size and mode."""
    import torch

    gpu = args.device.startswith('cuda')
    if gpu and not torch.cuda.is_available():
        sys.exit('error: --device cuda: PyTorch sees no GPU.')
    name = machine(args.threads, torch.cuda.get_device_name() if gpu else '')
    record = dict(commands=[], machine=name, rates=[], results=[])
    if args.add and file.is_file():
        record = json.loads(file.read_text())
        if record['machine'] != name:
            sys.exit(f"error: --add: '{file}' is of {record['machine']}; this is {name}.")
    number = len(record['commands'])
    record['commands'].append('python ' + shlex.join([os.path.relpath(__file__), *sys.argv[1:]]))
    if not gpu:
        torch.set_num_threads(args.threads or torch.get_num_threads())
        record['rates'].append(product_rates())
        print('GFLOP/s of products:', record['rates'][-1], flush=True)
    rest = dict(batch=args.batch, threads=args.threads, device=args.device)
    for size in args.sizes:
        for mode in args.modes:
            print(f'== {size[0]}x{size[1]}, {mode}', flush=True)
            cases = [
                dict(model=model, mode=mode, dtype=dtype, size=list(size), **rest)
                for dtype in args.dtypes
                for model in args.models
                if not (mode == 'infer' and model.endswith('with_cp'))
            ]
            measured = [] if args.only == 'memory' else measure_time(cases, args.repeats)
            measured += [] if args.only == 'time' else measure_memory(cases)
            record['results'] += [dict(r, run=number) for r in measured]
            file.write_text(json.dumps(record, indent=1) + '\n')
    if not record['results']:
        sys.exit('error: none of the models could be run.')
    return record


def main() -> None:
    args = parse_args()
    file = args.out / 'results.json'
    args.out.mkdir(parents=True, exist_ok=True)
    record = read_record(file, '--redraw') if args.redraw else run(args, file)
    (args.out / 'table.md').write_text(table_of(record))
    draw(record['results'], 'median', 'seconds', 1, args.out / 'time.png')
    draw(record['results'], 'peak_memory', 'GiB', 2**-30, args.out / 'memory.png')
    print(table_of(record), f'\nleft in {args.out}: results.json, table.md and pictures')


if __name__ == '__main__':
    main()
