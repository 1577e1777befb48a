"""Small CrossFormers next to Swin, ConvNeXt and ResNet, from random weights, on real images.

    python benchmarks/real_data/run.py bccd --data DIR

Trains every model of models.py at three learning rates with seed 0, then at its best one with
other seeds, and evaluates on the held-out images after every few epochs. On camvid it also trains
the ablation, and tests three position biases at other image sizes. Each training runs in a process
of its own with one thread. Stop it at any time: run again, it resumes.
Writes results/SET.json after each training, and at the end results/SET.md, its curves SET.png and,
of a set for detection, SET_predictions.jpg; `--redraw` writes these of what is trained so far.
"""

import argparse
import json
import os
import pprint
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Callable, Dict, Iterable

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from common import processor, read_curve  # noqa: E402
from models import ABLATION, MODELS  # noqa: E402
from predictions import draw_predictions  # noqa: E402
from report import (  # noqa: E402
    OTHER_SEEDS,
    RATES,
    SETS,
    SIZED,
    SIZES,
    best_rate,
    draw,
    searched,
    seeds_of,
    table_of,
)

from crossformer_mm.engine.config import load_config  # noqa: E402
from crossformer_mm.files import write_whole  # noqa: E402
from crossformer_mm.flops import count  # noqa: E402

DRAWN = ('CrossFormer', 'Swin', 'ResNet')
DRAWN_IMAGES = 4


def write_config(file: Path, name: str, model: str, rate: float, seed: int) -> None:
    """Write the config of one training."""
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
    """Run a tool on one thread and return its CPU seconds; RuntimeError: it failed."""
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


class Study:
    """Trainings on one set, and their results.

    Args:
        name (str): one of ``SETS``.
        data (Path): folder of the images and annotations.
        work (Path): folder for logs and checkpoints.
        file (Path): JSON file of the results.
    """

    def __init__(self, name: str, data: Path, work: Path, file: Path):
        self.name, self.data, self.work = name, data.resolve(), work.resolve() / name
        self.file, self.lock = file, Lock()
        self.runs: Dict[str, dict] = json.loads(file.read_text()) if file.is_file() else {}

    def folder(self, model: str, rate: float, seed: int) -> Path:
        return self.work / label_of(model, rate, seed).replace(', ', '_').replace(' ', '_')

    def best(self, model: str, seed: int) -> tuple:
        return model, best_rate(self.runs.values(), model), seed

    def keep(self, label: str, **values) -> None:
        """Add values to the result of a training."""
        with self.lock:
            self.runs[label] = {**self.runs.get(label, {}), **values}
            write_whole(self.file, (json.dumps(self.runs, indent=1) + '\n').encode())

    def train(self, model: str, rate: float, seed: int) -> None:
        """Train and evaluate one model, unless its result is known."""
        label, work = label_of(model, rate, seed), self.folder(model, rate, seed)
        if label in self.runs:
            return
        print(f'{self.name}: {label}', flush=True)
        config, resumed = work / 'run.py', any(work.glob('*.pth'))
        write_config(config, self.name, model, rate, seed)
        options = ['--data-root', self.data, '--work-dir', work, '--resume']
        seconds = run_tool(work / 'log.txt', 'train.py', config, *options)
        counted = count(load_config(str(config)), SETS[self.name].shape)
        self.keep(
            label,
            model=model,
            rate=rate,
            seed=seed,
            parameters=counted['params'],
            flops=counted['flops'],
            # Of a training in several parts it is not known.
            cpu_seconds=None if resumed else round(seconds),
            processor=processor(),
            curve=read_curve(work, SETS[self.name].key),
        )

    def repeat(self, model: str, seed: int) -> None:
        """Train a model at its best learning rate; test it at other sizes where these are asked."""
        training = self.best(model, seed)
        self.train(*training)
        label, work = label_of(*training), self.folder(*training)
        sized = self.name == 'camvid' and model in SIZED and seed < OTHER_SEEDS
        if sized and 'sizes' not in self.runs[label]:
            self.keep(label, sizes={f'{size:g}': self.at_size(work, size) for size in SIZES})
        if seed:  # predictions are drawn with the first
            remove_checkpoints(work)

    def at_size(self, work: Path, size: float) -> float:
        """Return the metric of a trained model on images that are resized by a factor."""
        this = SETS[self.name]
        height, width = (round(side * size) for side in this.shape)
        out, checkpoint = work / f'size_{size}', (work / 'last_checkpoint').read_text()
        change = f'test_dataloader.dataset.pipeline.1.scale=({width},{height})'
        options = ['--data-root', self.data, '--work-dir', out, '--cfg-options', change]
        run_tool(work / 'log.txt', 'test.py', work / 'run.py', checkpoint, *options)
        return round(json.loads(next(out.glob('*/*.json')).read_text())[this.key], 4)

    def run(self, jobs: int) -> None:
        """Do all that has no result yet, some trainings at a time."""
        models, seeds = searched(self.name), seeds_of(self.name)
        in_parallel(jobs, self.train, ((model, rate, 0) for rate in RATES for model in models))
        for model in models:
            for rate in RATES:
                if (model, rate, 0) != self.best(model, 0):
                    remove_checkpoints(self.folder(model, rate, 0))
        in_parallel(
            jobs,
            self.repeat,
            (
                (model, seed)
                for seed in range(max(seeds.values()))
                for model in seeds
                if seed < seeds[model]
            ),
        )

    def draw_predictions(self, file: Path) -> None:
        """Draw what trained models of ``DRAWN`` find on the first held-out images, by name."""
        ann_file = self.data / 'annotations' / 'val.json'
        images = sorted((self.data / 'val').iterdir())[:DRAWN_IMAGES]
        found, trained = {}, {row['model'] for row in self.runs.values()}
        for model in filter(trained.__contains__, DRAWN):
            work = self.folder(*self.best(model, 0))
            out, checkpoint = work / 'predictions', (work / 'last_checkpoint').read_text()
            arguments = [work / 'run.py', checkpoint, *images, '--out', out, '--ann-file', ann_file]
            run_tool(work / 'log.txt', 'predict.py', *arguments)
            found[model] = max(out.glob('results.*.json'))  # of masks, if it has any
        draw_predictions(ann_file, images, found, file)


def label_of(model: str, rate: float, seed: int) -> str:
    return f'{model}, {rate:g}, seed {seed}'


def remove_checkpoints(work: Path) -> None:
    for checkpoint in work.glob('*.pth'):
        checkpoint.unlink()


def in_parallel(jobs: int, function: Callable, calls: Iterable[tuple]) -> None:
    """Call a function in threads; raise its first error after all calls."""
    with ThreadPoolExecutor(jobs) as pool:
        for result in [pool.submit(function, *call) for call in calls]:
            result.result()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('set', choices=SETS)
    add('--data', type=Path, required=True, help='folder of the images and annotations')
    add('--jobs', type=int, default=2, help='trainings at a time, each on one thread')
    add('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'real_data')
    add('--out', type=Path, default=HERE / 'results')
    add(
        '--redraw',
        action='store_true',
        help='train nothing; write tables and pictures of the results so far',
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    study = Study(args.set, args.data, args.work_dir, args.out / f'{args.set}.json')
    if not args.redraw:
        study.run(args.jobs)
    runs = list(study.runs.values())
    if not runs:
        sys.exit(f"error: --redraw: '{study.file}' has no results yet.")
    (args.out / f'{args.set}.md').write_text(table_of(args.set, runs))
    draw(args.set, runs, args.out / f'{args.set}.png')
    if args.set != 'camvid':  # its images may not be used commercially
        study.draw_predictions(args.out / f'{args.set}_predictions.jpg')


if __name__ == '__main__':
    main()
