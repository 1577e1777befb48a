"""Small CrossFormers next to Swin, ConvNeXt and ResNet, from random weights, on real images.

    python benchmarks/real_data/run.py camvid --data DIR [--jobs 2]

Trains every model of models.py at three learning rates with seed 0, then at its best one with
other seeds, and measures on the held-out images after every few epochs. On camvid it trains the
ablation, too, and tests three position biases at other image sizes. Each training runs in a process
of its own with one thread. Stop it at any time: run again, it goes on where it was.
Writes results/SET.json, results/SET.md and results/SET.png.
"""

import argparse
import json
import os
import pprint
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Dict, Iterable, List

import numpy as np
from scipy import stats

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))
from common import draw_curves, processor  # noqa: E402
from models import ABLATION, MODELS  # noqa: E402

from crossformer_mm.engine.config import load_config  # noqa: E402
from crossformer_mm.files import write_whole  # noqa: E402
from crossformer_mm.flops import count  # noqa: E402

# Of each set: name and key of its metric, the image's height and width.
SETS = {
    'bccd': ('box AP', 'coco/bbox_mAP', (144, 192)),
    'nuclei': ('mask AP', 'coco/segm_mAP', (256, 256)),
    'camvid': ('mIoU', 'mIoU', (192, 256)),
}
RATES = (1e-3, 5e-4, 2e-3)
SEEDS = {'CrossFormer': 5, 'Swin': 5}
OTHER_SEEDS = 3
# Same attention and parameters in the linear layers: the rate of CrossFormer serves.
SAME_RATE = ('CrossFormer, block', *ABLATION)
SIZES = (0.75, 1.0, 1.5, 2.0)
SIZED = ('CrossFormer', 'relative position bias', 'no position bias')


def write_config(file: Path, name: str, model: str, rate: float, seed: int) -> None:
    """Write the config of one training, complete but for its base."""
    backbone, channels = {**MODELS, **ABLATION}[model]
    stages = (1, 2, 3) if name == 'bccd' else (0, 1, 2, 3)
    parts = dict(backbone=dict(_delete_=True, out_indices=stages, **backbone))
    if name == 'camvid':
        parts['decode_head'] = dict(in_channels=channels)
        parts['auxiliary_head'] = dict(in_channels=channels[2])
    else:
        parts['neck'] = dict(in_channels=[channels[stage] for stage in stages])
    values = dict(
        _base_=[str(HERE / f'{name}.py')],
        model=parts,
        optim_wrapper=dict(optimizer=dict(lr=rate)),
        randomness=dict(seed=seed),
    )
    if backbone['type'].startswith('mmpretrain.'):
        values['custom_imports'] = dict(imports=['crossformer_mm', 'mmpretrain.models'])
    text = ''.join(f'{key} = {pprint.pformat(value)}\n' for key, value in values.items())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def run_tool(log: Path, tool: str, *arguments) -> float:
    """Run a tool on one thread; return its CPU seconds. RuntimeError: it failed."""
    command = [sys.executable, '-W', 'ignore', str(ROOT / 'tools' / tool), *map(str, arguments)]
    with log.open('ab') as out:
        pid = os.posix_spawn(
            sys.executable,
            command,
            {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
            file_actions=[(os.POSIX_SPAWN_DUP2, out.fileno(), 1), (os.POSIX_SPAWN_DUP2, 1, 2)],
        )
        _, status, used = os.wait4(pid, 0)
    if status:
        raise RuntimeError(f"{tool} failed, its output is in '{log}'")
    return used.ru_utime + used.ru_stime


def curve(work: Path, key: str) -> List[List[float]]:
    """Return step and metric of each validation, over all starts of a training."""
    found = {}
    for file in sorted(work.glob('*/vis_data/scalars.json')):
        rows = map(json.loads, file.read_text().splitlines())
        found.update({row['step']: row[key] for row in rows if key in row})
    return [[step, found[step]] for step in sorted(found)]


class Study:
    """Trainings on one set, and their results.

    Args:
        name (str): one of ``SETS``.
        data (Path): folder of the images and annotations.
        work (Path): folder for logs and checkpoints.
        out (Path): folder for the results.
        jobs (int): trainings at a time.
    """

    def __init__(self, name: str, data: Path, work: Path, out: Path, jobs: int):
        self.name, self.data, self.work = name, data.resolve(), work.resolve() / name
        self.metric, self.key, self.shape = SETS[name]
        self.file, self.lock, self.jobs = out / f'{name}.json', Lock(), jobs
        self.rows: Dict[str, dict] = {}
        if self.file.is_file():
            self.rows = json.loads(self.file.read_text())['runs']

    def train(self, model: str, rate: float, seed: int) -> None:
        """Train and measure one model, unless its result is known."""
        label = f'{model}, {rate:g}, seed {seed}'
        if label in self.rows:
            return
        work = self.work / label.replace(', ', '_').replace(' ', '_')
        config = work / 'run.py'
        write_config(config, self.name, model, rate, seed)
        options = ['--data-root', self.data, '--resume']
        print(f'{self.name}: {label}', flush=True)
        resumed = any(work.glob('*.pth'))
        seconds = run_tool(work / 'log.txt', 'train.py', config, '--work-dir', work, *options)
        scores = curve(work, self.key)
        counted = count(load_config(str(config)), self.shape)
        row = dict(model=model, rate=rate, seed=seed, curve=scores)
        row.update(parameters=counted['params'], flops=counted['flops'])
        row['cpu_seconds'] = None if resumed else round(seconds)
        if self.name == 'camvid' and model in SIZED:
            row['sizes'] = {size: self.at_size(work, config, size) for size in SIZES}
        with self.lock:
            self.rows[label] = row
            record = dict(processor=processor(), metric=self.metric, runs=self.rows)
            text = json.dumps(record, indent=1, sort_keys=True) + '\n'
            write_whole(self.file, text.encode())
        if seed:  # predictions are drawn with the others
            for checkpoint in work.glob('*.pth'):
                checkpoint.unlink()

    def at_size(self, work: Path, config: Path, size: float) -> float:
        """Return the metric of a trained model on images that are resized by a factor."""
        height, width = self.shape
        scale = f'({round(width * size)},{round(height * size)})'
        out, checkpoint = work / f'size_{size}', (work / 'last_checkpoint').read_text()
        change = f'test_dataloader.dataset.pipeline.1.scale={scale}'
        options = ['--data-root', self.data, '--work-dir', out, '--cfg-options', change]
        run_tool(work / 'log.txt', 'test.py', config, checkpoint, *options)
        return json.loads(next(out.glob('*/*.json')).read_text())[self.key]

    def train_all(self, trainings: Iterable[tuple]) -> None:
        with ThreadPoolExecutor(self.jobs) as pool:
            for result in [pool.submit(self.train, *training) for training in trainings]:
                result.result()

    def best_rate(self, model: str) -> float:
        model = 'CrossFormer' if model in SAME_RATE else model
        first = [row for row in self.rows.values() if row['model'] == model and not row['seed']]
        return max(first, key=lambda row: row['curve'][-1][1])['rate']

    def run(self) -> None:
        models = [*MODELS, *(ABLATION if self.name == 'camvid' else ())]
        searched = [model for model in models if model not in SAME_RATE]
        self.train_all((model, rate, 0) for rate in RATES for model in searched)
        counts = {model: SEEDS.get(model, OTHER_SEEDS) for model in models}
        self.train_all(
            (model, self.best_rate(model), seed)
            for seed in range(max(counts.values()))
            for model in models
            if seed < counts[model]
        )

    def results(self, model: str) -> List[dict]:
        """Return the rows of a model at its best rate, one for each seed."""
        rate = self.best_rate(model)
        rows = [row for row in self.rows.values() if (row['model'], row['rate']) == (model, rate)]
        return sorted(rows, key=lambda row: row['seed'])


def interval(values: List[float], unit: float = 1.0) -> str:
    """Format a mean with the half width of its 95 % interval, by Student's t."""
    values = np.array(values) * unit
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f'{values.mean():.1f} ± {half:.1f}'


def report(study: Study) -> str:
    """Describe the results as tables."""
    unit = 1.0 if study.name == 'camvid' else 100.0
    height, width = study.shape
    lines = [
        f'Written by `python benchmarks/real_data/run.py {study.name}` on {processor()}. '
        f'{study.metric} in % on the held-out images after the last step: mean of the seeds and '
        f'its 95 % interval. Multiply-accumulates are of the whole model at {height} x {width}; '
        'CPU seconds are the median of a training, its validations included, on one thread.'
    ]
    for models in (MODELS, ABLATION if study.name == 'camvid' else {}):
        head = 'model | learning rate | seeds | parameters, M | G | CPU seconds'
        lines += ['', f'| {head} | {study.metric} |', '|---' * 7 + '|'] if models else []
        for model in models:
            rows = study.results(model)
            cells = [model, f"{rows[0]['rate']:g}", len(rows)]
            cells += [f"{rows[0]['parameters'] / 1e6:.1f}", f"{rows[0]['flops'] / 1e9:.2f}"]
            cells += [int(np.median([row['cpu_seconds'] for row in rows]))]
            cells += [interval([row['curve'][-1][1] for row in rows], unit)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    if study.name == 'camvid':
        sizes = ' | '.join(f'{size:g}' for size in SIZES)
        lines += ['', f'| tested at, times the size of training | {sizes} |', '|---' * 5 + '|']
        for model in SIZED:
            rows = study.results(model)
            cells = (interval([row['sizes'][str(size)] for row in rows]) for size in SIZES)
            lines.append(f"| {model} | {' | '.join(cells)} |")
    return '\n'.join(lines) + '\n'


def draw(study: Study, file: Path) -> None:
    """Draw the metric after each validation, mean and range of the seeds."""
    unit = 1.0 if study.name == 'camvid' else 100.0
    lines = []
    for model in MODELS:
        curves = np.array([row['curve'] for row in study.results(model)])
        steps, scores = curves[0, :, 0], curves[:, :, 1] * unit
        band = scores.min(0), scores.max(0)
        lines.append(dict(x=steps, y=scores.mean(0), band=band, label=model))
    step = 'iteration' if study.name == 'camvid' else 'epoch'
    panel = dict(title=study.name, xlabel=step, ylabel=f'{study.metric} in %', lines=lines)
    draw_curves(file, [panel], 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('set', choices=SETS)
    add('--data', type=Path, required=True, help='folder of the images and annotations')
    add('--jobs', type=int, default=2, help='trainings at a time, each on one thread')
    add('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'real_data')
    add('--out', type=Path, default=HERE / 'results')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    study = Study(args.set, args.data, args.work_dir, args.out, args.jobs)
    study.run()
    (args.out / f'{args.set}.md').write_text(report(study))
    draw(study, args.out / f'{args.set}.png')


if __name__ == '__main__':
    main()
