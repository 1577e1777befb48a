"""Evaluate a trained model at other group sizes and intervals, beside what they cost.

    python tools/sweep_groups.py configs/mask_rcnn/cf_s_1x.py \\
        work_dirs/mask_rcnn/cf_s_1x/epoch_12.pth --group-size 7,7,7,7 14,14,7,7 \\
        --interval 8,4,2,1 16,8,2,1 --max-images 500

No weight depends on the group size, the interval or the definition of long distance attention, for
the dynamic position bias is a function of offsets of any length. So one checkpoint gives a model
for each setting, without training: this tool measures all combinations of those given, and the
config's own, and writes into the folder of --out (default: sweep in the folder of a training):

    sweep.json    for each setting all metrics, time, memory and FLOPs
    sweep.png     the metrics against time and against memory
    log.txt       what the library says meanwhile

Each setting runs in a process of its own. The time is that of the model from an image to its
predictions, without loading, the median of all images; the memory is the largest that was in use
meanwhile: of the process on a CPU, of PyTorch's tensors on a GPU. What sweep.json has of the same
model and data is not measured again, so that the same command goes on after an interruption, and
another one adds settings.
"""

import argparse
import contextlib
import hashlib
import inspect
import io
import itertools
import json
import numbers
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, init_default_scope
from mmengine.utils import ProgressBar

from crossformer_mm import CrossFormer
from crossformer_mm.checkpoint import use_safe_loading
from crossformer_mm.engine.coco_checks import annotations_checked
from crossformer_mm.engine.command_line import (
    build_runner,
    check_dataset,
    check_file,
    check_writable,
    fail,
    innermost,
    kind_of,
    load_config,
    prepare_for_cpu,
    replace_data_root,
    run,
    sentences_for,
    write_whole,
)
from crossformer_mm.engine.data_checks import check_files, explained_data
from crossformer_mm.engine.option_checks import add_cfg_options
from crossformer_mm.engine.whole_files import name_of_config
from crossformer_mm.flops import count
from crossformer_mm.grouping import LDA_DEFINITIONS

# Shown without --metric, as far as the evaluator has them.
METRICS = ('coco/bbox_mAP', 'coco/segm_mAP', 'mIoU')
SETTING = ('group_size', 'interval', 'lda')


# Which settings


def of_stages(text: str) -> tuple:
    """'7,7,7,7' as numbers."""
    try:
        return tuple(int(number) for number in text.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not one whole number for each stage, as in 7,7,7,7"
        ) from None


def settings_of(args: argparse.Namespace, cfg: Config) -> List[dict]:
    """The config's own setting, then all combinations; ends the program if one cannot be built."""
    defaults = inspect.signature(CrossFormer).parameters
    options = {key: value for key, value in cfg.model.backbone.items() if key != 'type'}
    with torch.device('meta'), sentences_for(ValueError, TypeError):
        CrossFormer(**options)
        own = {key: options.get(key, defaults[key].default) for key in SETTING}
        own.update(group_size=tuple(own['group_size']), interval=tuple(own['interval']))
        sizes, intervals = args.group_size, args.interval
        if not (sizes or intervals or args.lda):
            # The first stages, whose maps are large, are what costs.
            sizes = [own['group_size'], first_half(own['group_size'], lambda size: 2 * size)]
            intervals = [
                own['interval'],
                first_half(own['interval'], lambda apart: 2 * apart),
                first_half(own['interval'], lambda apart: max(apart // 2, 1)),
            ]
        found = [own]
        for values in itertools.product(
            sizes or [own['group_size']], intervals or [own['interval']], args.lda or [own['lda']]
        ):
            setting = dict(zip(SETTING, values))
            if setting not in found:
                CrossFormer(**{**options, **setting})  # says what is wrong
                found.append(setting)
    return found


def first_half(numbers: tuple, change) -> tuple:
    half = len(numbers) // 2
    return (*map(change, numbers[:half]), *numbers[half:])


def name_of(setting: dict) -> str:
    """As 'G 7·7·7·7, I 8·4·2·1, interval'."""
    sizes, intervals = ('·'.join(map(str, setting[key])) for key in SETTING[:2])
    return f"G {sizes}, I {intervals}, {setting['lda']}"


def caution(backbone: dict) -> Optional[str]:
    """What a user should know of a model whose position bias has a size."""
    bias = backbone.get('position_bias', 'dynamic')
    if bias.startswith('dynamic'):
        return None
    return (
        f"note: the model's position_bias is '{bias}'; only a dynamic one is made for groups "
        'of other sizes than in training.'
    )


# One setting, in a process of its own


class Watch(Hook):
    """What a model costs while a runner tests it, and how far this is.

    Args:
        setting: that the trained model is given.
        metrics: that the evaluator must have, which is seen to before all images are evaluated.
    """

    def __init__(self, setting: dict, metrics: Sequence[str]):
        self.setting, self.metrics = setting, metrics
        self.seconds: List[float] = []  # of one image each
        self.backbone: List[float] = []
        self.memory: Optional[int] = None  # in bytes, at its highest
        self.shapes = Counter()
        self.inside = self.entered = 0.0

    def before_test(self, runner) -> None:
        loop, self.model = runner.test_loop, runner.model
        # Not in the config: position biases other than the dynamic one have parameters of a size.
        sizes, intervals, lda = (self.setting[key] for key in SETTING)
        for stage, size, interval in zip(self.model.backbone.layers, sizes, intervals):
            stage.group_size, stage.interval, stage.lda = size, interval, lda
        for metric in loop.evaluator.metrics:
            if hasattr(metric, 'img_ids'):  # MMDetection's would miss the images left out
                data = loop.dataloader.dataset
                metric.img_ids = [data.get_data_info(i)['img_id'] for i in range(len(data))]
        if self.metrics:
            self.check_metrics(loop)
        self.test_step, self.model.test_step = self.model.test_step, self.step
        self.model.backbone.register_forward_pre_hook(self.enter)
        self.model.backbone.register_forward_hook(self.leave)
        self.progress = ProgressBar(len(loop.dataloader), bar_width=30, file=sys.__stdout__)

    @torch.no_grad()
    def check_metrics(self, loop) -> None:
        """End the program if the evaluator, given the first images, has no metric of a name."""
        self.model.eval()
        batch = next(iter(loop.dataloader))
        loop.evaluator.process(data_samples=self.model.test_step(batch), data_batch=batch)
        check_names(self.metrics, loop.evaluator.evaluate(len(batch['inputs'])))

    def step(self, batch: dict):
        self.inside = 0.0
        reset_peak()
        start = now()
        out = self.test_step(batch)
        images = len(batch['inputs'])
        self.seconds.append((now() - start) / images)
        self.backbone.append(self.inside / images)
        self.memory = max(filter(None, (self.memory, peak())), default=None)
        return out

    def enter(self, module, inputs) -> None:
        self.shapes[tuple(inputs[0].shape[2:])] += 1
        self.entered = now()

    def leave(self, *_) -> None:
        self.inside += now() - self.entered

    def after_test_iter(self, *_, **__) -> None:
        self.progress.update()

    def result(self) -> dict:
        """Medians, without the first images, with which a model warms up."""
        return dict(
            seconds=statistics.median(self.seconds[1:] or self.seconds),
            backbone_seconds=statistics.median(self.backbone[1:] or self.backbone),
            peak_memory=self.memory,
        )


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak() -> None:
    """Forget the highest use of memory so far, as far as the system lets us."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')


def peak() -> Optional[int]:
    """The highest use of memory, in bytes; None where the system does not say."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        status = Path('/proc/self/status').read_text()
    except OSError:
        return None
    return int(status.split('VmHWM:')[1].split()[0]) * 1024


def check_names(asked: Sequence[str], metrics: dict) -> None:
    for name in asked:
        if metrics and name not in metrics:  # there are none where nothing is found
            fail(
                f"--metric: the config's evaluator has no '{name}', but "
                f"{', '.join(map(repr, metrics))}."
            )


def measure(cfg: Config, setting: dict, asked: Sequence[str]) -> dict:
    """Metrics and costs of the trained model of a config, at a setting, on its test data."""
    # The libraries' messages go to the log; only the bar is for the terminal.
    with contextlib.redirect_stdout(sys.stderr):
        runner = build_runner(cfg)
        watch = Watch(setting, asked)
        runner.register_hook(watch)
        metrics = runner.test()
        shape = watch.shapes.most_common(1)[0][0]
        cfg.model.backbone.update(setting)
        parts = count(cfg, shape)['parts']
    flops = sum(part['flops'] for name, part in parts.items() if name.startswith('backbone.'))
    return dict(
        metrics={
            name: float(value) for name, value in metrics.items() if isinstance(value, numbers.Real)
        },
        **watch.result(),
        backbone_flops=flops,
        shape=shape,
    )


def measure_apart(setting: dict, images: Optional[int], asked: Sequence[str], log: Path) -> dict:
    """:func:`measure` in a new process; of one that dies, the reason alone.

    Args:
        images: how many are evaluated; None: all.
        asked: metrics that must be there.
    """
    with tempfile.TemporaryDirectory() as folder, log.open('a+', encoding='utf-8') as said_there:
        print(f'\n== {name_of(setting)}', file=said_there, flush=True)
        start = said_there.tell()
        task = dict(setting=setting, images=images, asked=asked, folder=folder)
        status = subprocess.run(
            [sys.executable, '-W', 'ignore', __file__, *sys.argv[1:], '--task', json.dumps(task)],
            stderr=said_there,
        ).returncode
        print()
        if not status:
            return json.loads(Path(folder, 'result.json').read_text(encoding='utf-8'))
        said_there.seek(start)
        lines = said_there.read().strip().splitlines()
    if status < 0:
        reason = f'it was ended by signal {-status}' + (
            ', which is what happens when memory is full' if status == -9 else ''
        )
    else:
        reason = lines[-1].removeprefix('error: ') if lines else f'exit status {status}'
    return dict(error=reason.rstrip('.'), refused=status == 2)


# What is left of it


def pareto(points: Sequence[tuple]) -> List[tuple]:
    """Of (cost, value), those than which none is better in both, by cost."""
    best = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or value > best[-1][1]:
            best.append((cost, value))
    return best


def shown_metrics(asked: Sequence[str], results: Sequence[dict]) -> List[str]:
    """The metrics of table and picture."""
    there = next((list(result['metrics']) for result in results if result.get('metrics')), [])
    return [name for name in asked or METRICS if name in there] or there[:1]


def table(results: Sequence[dict], metrics: Sequence[str]) -> str:
    """For people: a line for each setting, a star at the config's own."""
    width = max(len(name_of(result)) for result in results)
    lines = [
        f"{'':6}{'setting':{width}}"
        + ''.join(f'{name:>15}' for name in metrics)
        + f"{'time':>11}{'of backbone':>13}{'memory':>11}{'FLOPs of backbone':>19}"
    ]
    for number, result in enumerate(results, start=1):
        line = f"{number:3} {'*' if result['own'] else ' '} {name_of(result):{width}}"
        if 'error' in result:
            lines.append(f"{line}  failed: {result['error']}")
            continue
        memory = result['peak_memory']
        lines.append(
            line
            + ''.join(f"{result['metrics'].get(name, float('nan')):15.4g}" for name in metrics)
            + f"{1000 * result['seconds']:8.1f} ms{1000 * result['backbone_seconds']:10.1f} ms"
            + (f'{memory / 2**20:7.0f} MiB' if memory else f"{'–':>11}")
            + f"{result['backbone_flops'] / 1e9:17.2f} G"
        )
    return '\n'.join([*lines, '* as in the config'])


def draw(results: Sequence[dict], metrics: Sequence[str], of: dict, path: Path) -> None:
    """Each metric against time and memory; the numbers are those of the table."""
    import matplotlib

    matplotlib.use('agg')
    import matplotlib.pyplot as plt

    costs = [
        ('seconds', 1000, 'milliseconds per image'),
        ('peak_memory', 2**-20, f"peak memory in MiB, {of['device']}"),
    ]
    sizes = list(dict.fromkeys(tuple(result['group_size']) for result in results))
    markers = dict(zip(dict.fromkeys(result['lda'] for result in results), 'osD^'))
    figure, axes = plt.subplots(
        len(metrics), 2, figsize=(11, 4.2 * len(metrics) + 0.5), squeeze=False, layout='constrained'
    )
    handles = {}
    for metric, row in zip(metrics, axes):
        for (cost, unit, label), axis in zip(costs, row):
            # To three digits: a difference of less is noise, and no trade.
            points = {
                number: (float(f'{result[cost] * unit:.3g}'), result['metrics'][metric])
                for number, result in enumerate(results, start=1)
                if result.get(cost) is not None and metric in result['metrics']
            }
            front = pareto(points.values())
            if len(front) > 1:
                (handles['Pareto front'],) = axis.step(
                    *zip(*front),
                    where='post',
                    color='0.55',
                    linestyle='--',
                    linewidth=1.2,
                    zorder=1,
                )
            for number, point in points.items():
                result = results[number - 1]
                colour = f"C{sizes.index(tuple(result['group_size'])) % 10}"
                handles[number] = axis.scatter(
                    *point,
                    s=200 if result['own'] else 70,
                    zorder=2 if result['own'] else 3,
                    marker=markers[result['lda']],
                    alpha=0.85,
                    linewidths=2,
                    color=colour,
                    edgecolors='black' if result['own'] else 'white',
                )
                # Around the point, each number elsewhere: points may lie on each other.
                away = 14 * np.exp(2.4j * number)
                axis.annotate(
                    str(number),
                    point,
                    (away.real, away.imag),
                    ha='center',
                    va='center',
                    textcoords='offset points',
                    fontsize=9,
                    color=colour,
                    fontweight='bold',
                    zorder=4,
                )
            axis.set(xlabel=label, ylabel=metric)
            axis.margins(0.15)
            axis.grid(alpha=0.3)
    names = {
        number: f"{number}  {name_of(result)}{' (as in the config)' if result['own'] else ''}"
        for number, result in enumerate(results, start=1)
    }
    order = sorted(key for key in handles if key in names) + [
        key for key in handles if key not in names
    ]
    figure.legend(
        [handles[key] for key in order],
        [names.get(key, key) for key in order],
        loc='outside lower center',
        ncols=2,
        fontsize=8,
        frameon=False,
    )
    figure.suptitle(
        f"{Path(of['config']).stem} at other groups, {of['images']} images", fontweight='bold'
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    write_whole(path, buffer.getvalue())


def read_record(file: Path, of: dict) -> Dict[str, dict]:
    """What was measured before of the same model and data, by setting."""
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding='utf-8'))
        if record['of'] != of:
            fail(
                f"--out: '{file}' is of another model, other data or another machine; name "
                'another folder, or remove it.'
            )
        return {name_of(result): result for result in record['settings']}
    except (ValueError, KeyError, TypeError):
        fail(f"--out: '{file}' is no result of this tool; name another folder, or remove it.")


def parse_args():
    parser = argparse.ArgumentParser(
        description='Evaluate a trained model at other group sizes and intervals, and draw its '
        'metrics against time and memory'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--group-size',
        type=of_stages,
        nargs='+',
        metavar='G,G,G,G',
        help="group sizes, one number for each stage (default: the config's; "
        'without this, --interval and --lda: a grid around the config)',
    )
    parser.add_argument(
        '--interval',
        type=of_stages,
        nargs='+',
        metavar='I,I,I,I',
        help="the same for intervals; measured are all combinations, and the config's own",
    )
    parser.add_argument(
        '--lda',
        nargs='+',
        choices=LDA_DEFINITIONS,
        help="definitions of long distance attention (default: the config's)",
    )
    parser.add_argument(
        '--metric',
        nargs='+',
        default=[],
        metavar='NAME',
        help='metrics of table and picture (default: '
        f"{', '.join(METRICS)}, if there); sweep.json has all",
    )
    parser.add_argument(
        '--max-images',
        type=int,
        metavar='N',
        help='evaluate on the first N images alone (default: all)',
    )
    parser.add_argument('--data-root', help="the dataset's folder, in place of the config's")
    parser.add_argument(
        '--out', metavar='DIR', help='folder to write (default: sweep in the folder of a training)'
    )
    add_cfg_options(parser)
    parser.add_argument('--task', help=argparse.SUPPRESS)
    return parser.parse_args()


def read_config(args: argparse.Namespace) -> Config:
    """The config with the arguments applied; ends the program where that cannot work."""
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher, cfg.load_from, cfg.resume = 'none', args.checkpoint, False
    if not torch.cuda.is_available():
        prepare_for_cpu(cfg)
    if not cfg.get('test_dataloader'):
        fail(f"config '{args.config}' has no test_dataloader.")
    if args.data_root:
        replace_data_root(cfg, args.data_root)
    kind = kind_of(cfg.model.get('backbone') or {}) or 'none'
    if kind != 'CrossFormer':
        fail(f"config '{args.config}' has the backbone {kind}, no CrossFormer.")
    return cfg


def work(args: argparse.Namespace, task: dict) -> None:
    """What one process does."""
    cfg = read_config(args)
    if task['images'] is not None:
        innermost(cfg.test_dataloader.dataset).indices = task['images']
    cfg.work_dir = task['folder']
    use_safe_loading()
    result = measure(cfg, task['setting'], task['asked'])
    Path(task['folder'], 'result.json').write_text(json.dumps(result), encoding='utf-8')


def number_of_images(cfg: Config) -> int:
    """How many there are; ends the program if the data cannot be used."""
    init_default_scope(cfg.default_scope)
    # pycocotools is talkative
    with contextlib.redirect_stdout(sys.stderr), explained_data(), annotations_checked():
        dataset = DATASETS.build(innermost(cfg.test_dataloader.dataset))
    check_files(dataset)
    return len(dataset)


def main():
    args = parse_args()
    if args.task:
        work(args, json.loads(args.task))
        return
    if find_spec('matplotlib') is None:
        fail('the package matplotlib is needed, which is not installed.')
    cfg = read_config(args)
    check_file('checkpoint', args.checkpoint)
    if args.max_images is not None and args.max_images < 1:
        fail(f'--max-images must be at least 1, got {args.max_images}.')
    settings = settings_of(args, cfg)
    check_dataset(cfg, 'test')
    out = Path(args.out or Path('work_dirs') / name_of_config(args.config) / 'sweep')
    check_writable('--out', out)
    there = number_of_images(cfg)
    images = min(args.max_images or there, there)
    file, log = out / 'sweep.json', out / 'log.txt'
    cuda = torch.cuda.is_available()
    digest = hashlib.sha256(repr(cfg.to_dict()).encode()).hexdigest()[:16]
    of = dict(
        config=args.config,
        digest=digest,
        checkpoint=args.checkpoint,
        written=os.stat(args.checkpoint).st_mtime,
        images=images,
        device=torch.cuda.get_device_name() if cuda else 'CPU',
        threads=torch.get_num_threads(),
    )
    known = read_record(file, of)
    if caution(cfg.model.backbone):
        print(caution(cfg.model.backbone))

    for number, setting in enumerate(settings, start=1):
        name = name_of(setting)
        print(f'{number}/{len(settings)} {name}', flush=True)
        if 'metrics' in known.get(name, {}):
            check_names(args.metric, known[name]['metrics'])
            print(f"   measured before, see '{file}'")
            continue
        own = number == 1
        try:
            result = measure_apart(
                setting, images if images < there else None, args.metric if own else [], log
            )
        except KeyboardInterrupt:
            fail(f"interrupted; '{file}' keeps {len(known)} settings, the same command goes on.")
        if result.pop('refused', False) and own:
            fail(f"{result['error']}.")
        known[name] = {**setting, 'own': own, **result}
        write_whole(file, json.dumps(dict(of=of, settings=list(known.values())), indent=1).encode())
    results = list(known.values())
    metrics = shown_metrics(args.metric, results)
    print(table(results, metrics))
    if not metrics:
        fail(f"nothing could be measured, see '{log}'.")
    draw(results, metrics, of, out / 'sweep.png')
    print(f"see '{out / 'sweep.png'}' and '{file}'")
    sys.exit(1 if any('error' in result for result in results) else 0)


if __name__ == '__main__':
    run(main)
