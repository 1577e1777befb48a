"""Time and memory of the backbone beside those that a user would pick instead.

    python benchmarks/backbone.py --out benchmarks/cpu/NAME --sizes 224x224 512x512 800x1216

Every model runs in a process of its own. The processes take turns, one step each, so that
whatever else the machine does falls on all of them alike: compare figures of one run, not of
two. ``crossformer_s-floor`` is CrossFormer-S with the attention core left out: what its linear
layers, convolutions and norms take by themselves. Peak memory is that of a further process of the
same kind, in which freed memory goes back to the system, so that the figure is what is in use and
not what the C library keeps for later.

Leaves results.json, table.md and the pictures time.png, memory.png, parts.png in --out.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Optional

from processor import processor, product_rates

ROOT = Path(__file__).resolve().parent.parent

# Options of CrossFormer('s'), or what builds another.
OURS = {
    'crossformer_s': {},
    'crossformer_s-block': dict(lda='block'),
    'crossformer_s-with_cp': dict(with_cp=True),
    'crossformer_s-plain': dict(attention_path='plain'),
    'crossformer_s-fused': dict(attention_path='fused'),
    'crossformer_s-floor': {},
}
OTHERS = ('mask_and_pad', 'swin_t', 'swin_s', 'resnet_50')
MODELS = (*OURS, *OTHERS)
DEFAULT = (
    'crossformer_s',
    'crossformer_s-floor',
    'crossformer_s-block',
    'crossformer_s-with_cp',
    'crossformer_s-plain',
    *OTHERS,
)
MODES = ('infer', 'train')
DTYPES = ('float32', 'bfloat16', 'float16')

# glibc: blocks of a megabyte or more are given back to the system when freed.
GIVE_BACK = {'MALLOC_MMAP_THRESHOLD_': '1000000', 'MALLOC_TRIM_THRESHOLD_': '1000000'}


# One model, in a process of its own


def build(name: str):
    """The backbone as a module; ``mask_and_pad`` is the plain formulation of the tests."""
    import torch

    if name == 'resnet_50':
        from mmdet.models.backbones import ResNet

        return ResNet(50)
    if name.startswith('swin'):
        from mmdet.models.backbones import SwinTransformer

        depths = dict(swin_t=(2, 2, 6, 2), swin_s=(2, 2, 18, 2))[name]
        return SwinTransformer(depths=depths, drop_path_rate=0.2)
    from crossformer_mm import CrossFormer

    if name in OURS:
        model = CrossFormer('s', **OURS[name])
        if name.endswith('floor'):
            for module in model.modules():
                if hasattr(module, 'attend'):
                    module.attend = values_alone
        return model
    from tests.oracle import plain_features

    class MaskAndPad(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = CrossFormer('s')

        def forward(self, image):
            return plain_features(dict(self.weights.named_parameters()), image)

    return MaskAndPad()


def values_alone(qkv, *_):
    """In the place of attention: the values as they are."""
    return qkv[..., -qkv.shape[-1] // 3 :].contiguous()


def flops(name: str, size: tuple, batch: int) -> int:
    """Of one forward pass, 2 for a multiplication with its addition."""
    import torch

    from crossformer_mm.flops import operation_counter

    model = build(name).to('meta')
    model.eval()  # which returns nothing in mmdet's
    with torch.no_grad(), operation_counter(model) as counter:
        model(torch.empty(batch, 3, *size, device='meta'))
    return counter.get_total_flops()


def work(case: dict) -> None:
    """Run a step for each line that comes in, answer with a line of JSON."""
    import torch

    sys.path.insert(0, str(ROOT))
    torch.manual_seed(0)
    if case['threads']:
        torch.set_num_threads(case['threads'])
    device = torch.device(case['device'])
    train = case['mode'] == 'train'
    model = build(case['model']).to(device)
    model.train(train)  # which returns nothing in mmdet's
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

    def peak() -> int:
        if device.type == 'cuda':
            return torch.cuda.max_memory_allocated()
        status = Path('/proc/self/status').read_text()
        return int(status.split('VmHWM:')[1].split()[0]) * 1024

    answers = dict(
        step=lambda: dict(seconds=step()),
        peak=lambda: dict(bytes=peak()),
        flops=lambda: dict(flops=flops(*(case[key] for key in ('model', 'size', 'batch')))),
        parts=lambda: time_of_parts(model, step),
    )
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


def time_of_parts(model, step) -> dict:
    """Seconds of one step of CrossFormer by kind of layer; the rest is what is left."""
    import torch

    from crossformer_mm.attention import GroupAttention
    from crossformer_mm.embedding import CrossScaleConvs
    from crossformer_mm.linear import Linear, Mlp
    from crossformer_mm.position_bias import DynamicPositionBias

    kinds = {
        CrossScaleConvs: 'embedding and merging',
        GroupAttention: 'attention in groups',
        Mlp: 'MLP',
        DynamicPositionBias: 'position bias',
        torch.nn.LayerNorm: 'LayerNorm',
        Linear: 'projections (q k v, out)',
    }
    seconds, running, hooks = defaultdict(float), [], []

    def begin(module, args):
        running.append([time.perf_counter(), 0.0])

    def end(module, args, out):
        start, inside = running.pop()
        took = time.perf_counter() - start
        seconds[kinds[type(module)]] += took - inside
        if running:
            running[-1][1] += took

    for name, module in model.named_modules():
        if type(module) in kinds and '.mlp.' not in name and '.pos.' not in name:
            hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    total = step()
    for hook in hooks:
        hook.remove()
    seconds['rest'] = total - sum(seconds.values())
    return dict(seconds)


class Worker:
    """A process that answers."""

    def __init__(self, case: dict, **environment):
        env = {**os.environ, **environment}
        if case['threads']:
            env['OMP_NUM_THREADS'] = str(case['threads'])
        self.case = case
        self.process = subprocess.Popen(
            [sys.executable, '-W', 'ignore', __file__, '--worker', json.dumps(case)],
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def ask(self, question: str) -> dict:
        """Raises RuntimeError with the last line of what the process said if it died."""
        try:
            self.process.stdin.write(question + '\n')
            self.process.stdin.flush()
            for line in self.process.stdout:
                if line.startswith('{'):
                    return json.loads(line)
        except BrokenPipeError:
            pass
        lines = self.process.stderr.read().strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f'exit status {self.process.wait()}')

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


# All of them in turn


def measure(cases: list, repeats: int) -> list:
    """Alternating steps of the cases, all of one size; one result for each that runs."""
    results = []
    workers = [Worker(case) for case in cases]
    for worker in list(workers):
        try:
            worker.ask('step')  # warms up
            results.append({**worker.case, 'seconds': []})
        except RuntimeError as error:
            print(f"   {worker.case['model']} {worker.case['mode']}: left out, {error}", flush=True)
            workers.remove(worker)
            worker.close()
    for _ in range(repeats):
        for worker, result in zip(workers, results):
            result['seconds'].append(round(worker.ask('step')['seconds'], 4))
    for worker, result in zip(workers, results):
        low, median, high = statistics.quantiles(result['seconds'], n=4)
        result.update(median=round(median, 4), spread=round(high - low, 4))
        if result['model'] == 'crossformer_s' and result['mode'] == 'infer':
            result['parts'] = worker.ask('parts')
        worker.close()
    for result, worker in zip(results, workers):
        alone = Worker(worker.case, **GIVE_BACK)
        for _ in range(2):
            alone.ask('step')
        result['peak_memory'] = alone.ask('peak')['bytes']
        if worker.case['model'] != 'mask_and_pad':
            result['flops'] = alone.ask('flops')['flops']
        alone.close()
        print(
            f"   {result['model']:24} {result['mode']:6} {result['dtype']:9} "
            f"{result['median']:8.3f} s  +- {result['spread']:.3f}  "
            f"{result['peak_memory'] / 2**30:6.2f} GiB",
            flush=True,
        )
    return results


# What is left of it


def slope(points: list) -> float:
    """Of the straight line through logarithms: 1 is linear in the area."""
    import numpy as np

    return float(np.polyfit(*np.log(np.array(sorted(points)).T), 1)[0])


def table_of(record: dict) -> str:
    """Markdown: each size, mode and type a section, each model a line, relative to Swin-T's."""
    lines = [*(f'    {command}' for command in record['commands']), '', record['machine'], '']
    for rates in record.get('rates', []):
        lines += [
            '- Products of two matrices, GFLOP/s: '
            + ', '.join(f'{name} {rate:.0f}' for name, rate in rates.items())
        ]
    lines += [
        '',
        'Ratios are to models of the same run; floor is CrossFormer-S without its '
        'attention core. GFLOP/s counts convolutions, linear layers and products of '
        'attention, a training step as three forward passes.',
        '',
    ]
    groups = defaultdict(list)
    for result in record['results']:
        groups[tuple(result['size']), result['batch'], result['mode'], result['dtype']].append(
            result
        )
    for ((height, width), batch, mode, dtype), results in sorted(groups.items()):
        models = {r['model']: r for r in results}
        swin, floor = models.get('swin_t'), models.get('crossformer_s-floor')
        lines += [
            f'**{height}x{width}, batch {batch}, {mode}, {dtype}**',
            '',
            '| model | median | spread | GFLOP/s | peak memory | time / Swin-T | '
            'time / floor | memory / Swin-T |',
            '|---|---|---|---|---|---|---|---|',
        ]
        for r in results:
            cells = [
                r['model'],
                f"{r['median']:.3f} s",
                f"{r['spread']:.3f} s",
                rate_of(r),
                f"{r['peak_memory'] / 2**30:.2f} GiB",
                ratio(r, swin, 'median'),
                ratio(r, floor, 'median'),
                ratio(r, swin, 'peak_memory'),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append('')
    exact = {
        (tuple(r['size']), r['mode'], r['model']): r['median']
        for r in record['results']
        if r['dtype'] == 'float32'
    }
    for r in record['results']:
        full = exact.get((tuple(r['size']), r['mode'], r['model']))
        if full and r['dtype'] != 'float32':
            lines.append(
                '- {}, {}, {}x{}: {} takes {:.2f} of the time of float32'.format(
                    r['model'], r['mode'], *r['size'], r['dtype'], r['median'] / full
                )
            )
    for name, mode, dtype, points in series(record, 'median'):
        if len(points) > 1:
            lines.append(
                f'- {name}, {mode}, {dtype}: time grows with area to the power {slope(points):.2f}'
            )
    return '\n'.join(lines) + '\n'


def rate_of(result: dict) -> str:
    """GFLOP/s, if the model's operations were counted."""
    if 'flops' not in result:
        return '–'
    passes = 3 if result['mode'] == 'train' else 1
    return f"{passes * result['flops'] / result['median'] / 1e9:.0f}"


def ratio(result: dict, base: Optional[dict], quantity: str) -> str:
    return '–' if base is None else f'{result[quantity] / base[quantity]:.2f}'


def series(record: dict, quantity: str):
    """(model, mode, dtype, [(pixels, quantity)]) of each that was measured."""
    found = defaultdict(list)
    for r in record['results']:
        area = r['batch'] * r['size'][0] * r['size'][1]
        found[r['model'], r['mode'], r['dtype']].append((area, r[quantity]))
    return [(*key, sorted(points)) for key, points in found.items()]


def draw(record: dict, folder: Path) -> None:
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    colours = {name: f'C{index % 10}' for index, name in enumerate(DEFAULT)}
    modes = [mode for mode in MODES if any(r['mode'] == mode for r in record['results'])]
    titles = dict(infer='Inference', train='Training step')
    for quantity, unit, scale, file in (
        ('median', 'seconds', 1, 'time.png'),
        ('peak_memory', 'GiB', 2**-30, 'memory.png'),
    ):
        figure, axes = plt.subplots(1, len(modes), figsize=(6 * len(modes), 5), squeeze=False)
        for mode, axis in zip(modes, axes[0]):
            lines = [line for line in series(record, quantity) if line[1] == mode]
            if any(len(points) > 1 for *_, points in lines):  # what has one size is in the table
                lines = [line for line in lines if len(line[3]) > 1]
            for name, _, dtype, points in lines:
                label = name if dtype == 'float32' else f'{name}, {dtype}'
                if len(points) > 1:
                    label += f'  (slope {slope(points):.2f})'
                axis.loglog(
                    [area / 1e6 for area, _ in points],
                    [y * scale for _, y in points],
                    'o-' if dtype == 'float32' else 's--',
                    label=label,
                    color=colours.get(name),
                    linewidth=3 if name == 'crossformer_s' else 1.3,
                )
            axis.set(title=titles[mode], xlabel='image area, megapixels', ylabel=unit)
            axis.grid(True, which='both', alpha=0.3)
            axis.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(folder / file, dpi=130)
        plt.close(figure)

    parts = sorted(
        (r for r in record['results'] if 'parts' in r and r['dtype'] == 'float32'),
        key=lambda r: (tuple(r['size']), r['batch']),
    )
    if parts:
        figure, axis = plt.subplots(figsize=(9, 1.2 + 0.6 * len(parts)))
        names = sorted(parts[-1]['parts'], key=lambda part: -parts[-1]['parts'][part])
        for row, r in enumerate(parts):
            left, total = 0.0, sum(r['parts'].values())
            for index, part in enumerate(names):
                share = 100 * r['parts'].get(part, 0.0) / total
                axis.barh(row, share, left=left, color=f'C{index}', label=part if not row else None)
                if share > 5:
                    axis.text(
                        left + share / 2,
                        row,
                        f'{share:.0f}',
                        ha='center',
                        va='center',
                        color='white',
                    )
                left += share
        axis.set(
            yticks=range(len(parts)),
            xlim=(0, 100),
            xlabel='% of the time of one forward',
            yticklabels=[
                '{}x{}'.format(*r['size']) + (f' x {r["batch"]}' if r['batch'] > 1 else '')
                for r in parts
            ],
            title='Where the time of a CrossFormer-S forward goes',
        )
        axis.legend(fontsize=8, ncol=4, loc='upper center', bbox_to_anchor=(0.5, -0.35))
        figure.savefig(folder / 'parts.png', dpi=130, bbox_inches='tight')
        plt.close(figure)


def same_case(a: dict, b: dict) -> bool:
    keys = ('model', 'mode', 'dtype', 'batch', 'threads', 'device')
    return all(a[key] == b[key] for key in keys) and tuple(a['size']) == tuple(b['size'])


def size_of(text: str) -> tuple:
    try:
        height, width = map(int, text.split('x'))
        assert height > 0 and width > 0
    except (ValueError, AssertionError):
        raise argparse.ArgumentTypeError(
            f'{text!r} is no size: write HEIGHTxWIDTH, as in 800x1216'
        ) from None
    return height, width


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', choices=MODELS, default=DEFAULT)
    parser.add_argument('--modes', nargs='+', choices=MODES, default=MODES)
    parser.add_argument(
        '--dtypes',
        nargs='+',
        choices=DTYPES,
        default=['float32'],
        help='others than float32 by autocast',
    )
    parser.add_argument(
        '--sizes',
        nargs='+',
        type=size_of,
        metavar='HxW',
        default=[(224, 224), (512, 512), (800, 1216)],
    )
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--repeats', type=int, default=5, help='steps of each, 2 at least')
    parser.add_argument('--threads', type=int, default=2, help='of the CPU; 0: as PyTorch chooses')
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    parser.add_argument('--out', default='work_dirs/benchmark', help='folder for what is left')
    parser.add_argument(
        '--add', action='store_true', help='keep what results.json in --out has of other cases'
    )
    parser.add_argument(
        '--redraw',
        action='store_true',
        help='only make table and pictures again from results.json in --out',
    )
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.repeats < 2 or args.batch < 1:
        parser.error('--repeats must be 2 or more, --batch 1 or more.')
    return args


def main() -> None:
    args = parse_args()
    if args.worker:
        work(json.loads(args.worker))
        return
    folder = Path(args.out)
    file = folder / 'results.json'
    if args.redraw:
        if not file.is_file():
            sys.exit(f"error: --redraw: '{file}' does not exist.")
        record = json.loads(file.read_text())
    else:
        import torch

        if args.device.startswith('cuda') and not torch.cuda.is_available():
            sys.exit('error: --device cuda: PyTorch sees no GPU.')
        folder.mkdir(parents=True, exist_ok=True)
        name = (
            torch.cuda.get_device_name()
            if args.device.startswith('cuda')
            else f'{processor()}, {args.threads or os.cpu_count()} threads'
        )
        record = dict(
            commands=[],
            machine=f'{name}, PyTorch {torch.__version__}, Python {platform.python_version()}',
            rates=[],
            results=[],
        )
        if args.add and file.is_file():
            record = json.loads(file.read_text())
        record['commands'].append(
            'python ' + shlex.join([os.path.relpath(__file__), *sys.argv[1:]])
        )
        torch.set_num_threads(args.threads or torch.get_num_threads())
        if args.device == 'cpu':
            record.setdefault('rates', []).append(
                {name: round(rate, 1) for name, rate in product_rates().items()}
            )
            print('GFLOP/s of products:', record['rates'][-1], flush=True)
        for size in args.sizes:
            for mode in args.modes:
                print(f'== {size[0]}x{size[1]}, {mode}', flush=True)
                measured = measure(
                    [
                        dict(
                            model=model,
                            mode=mode,
                            dtype=dtype,
                            size=size,
                            batch=args.batch,
                            threads=args.threads,
                            device=args.device,
                        )
                        for dtype in args.dtypes
                        for model in args.models
                        if not (mode == 'infer' and model.endswith('with_cp'))
                    ],
                    args.repeats,
                )
                record['results'] = [
                    r for r in record['results'] if not any(same_case(r, new) for new in measured)
                ] + measured
                file.write_text(json.dumps(record, indent=1) + '\n')
        if not record['results']:
            sys.exit('error: none of the models could be run.')
    (folder / 'table.md').write_text(table_of(record))
    draw(record, folder)
    print(table_of(record), f'\nleft in {folder}: results.json, table.md and pictures')


if __name__ == '__main__':
    main()
