"""Do position biases differ in how they take images of other sizes than those of the training?

    python benchmarks/position_bias/study.py

Trains small models with each position option on generated images of one size, or of mixed sizes,
and tests them at 0.5 to 3 times that size, with objects scaled along or not, and with other group
sizes. Each finished training leaves one file; run again, the command resumes, and ``--report`` only
gathers these files. README.md has the results.
"""

import argparse
import contextlib
import copy
import functools
import itertools
import json
import logging
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple, Tuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, init_default_scope
from mmengine.runner import Runner, TestLoop

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tools'), str(HERE)]

import make_shapes  # noqa: E402
import pairs_of_disks  # noqa: E402
from experiments import EXPERIMENTS, MIXED, OPTIONS, SIDE, TRAININGS, Experiment, Test  # noqa: E402
from report import write_report  # noqa: E402

from crossformer_mm.cli import run  # noqa: E402
from crossformer_mm.engine.config import prepare_for_cpu, replace_data_root  # noqa: E402
from crossformer_mm.errors import UserError  # noqa: E402
from crossformer_mm.files import check_writable, write_whole  # noqa: E402
from crossformer_mm.position_bias import NoPositionBias  # noqa: E402

SCENES = {'shapes': make_shapes.scene, 'pairs': pairs_of_disks.scene}


class Plan(NamedTuple):
    """Sizes and numbers that the results depend on, next to the configs."""

    iterations: Tuple[Tuple[str, int], ...] = (
        ('semantic', 200),
        ('instance', 130),
        ('pairs', 250),
        ('pairs_fast', 250),
    )
    train_images: int = 800
    test_images: int = 24
    factors: Tuple[float, ...] = (0.5, 0.75, 1, 1.5, 2, 3)
    group_factors: Tuple[float, ...] = (0.5, 0.75, 1.5, 2)


SHORT = Plan(tuple((name, 4) for name in EXPERIMENTS), 16, 4, (1, 1.5), (0.75,))


def tests(plan: Plan) -> list:
    """List the evaluations of a trained model."""
    sizes = [Test('scaled', factor) for factor in plan.factors]
    sizes += [Test('canvas', factor) for factor in plan.factors if factor != 1]
    groups = [Test('scaled', 1, factor) for factor in plan.group_factors]
    # Groups that grow with the objects, and intervals that grow with the canvas.
    groups += [Test('scaled', 2, 2)] if 2 in plan.factors else []
    groups += [Test('canvas', factor, 1, factor) for factor in plan.factors if factor in (2, 3)]
    without = [
        Test('scaled', without_position=True),
        Test('canvas', max(plan.factors), without_position=True),
    ]
    return sizes + groups + without


class Job(NamedTuple):
    """One training with its evaluations."""

    seed: int
    experiment: str
    training: str
    option: str

    @property
    def name(self) -> str:
        return f'{self.experiment}-{self.training}-{self.option}-{self.seed}'


def data_folder(out: Path, images: str, side: int) -> Path:
    return out / 'data' / f'{images}_{side}'


def make_data(out: Path, plan: Plan, images: str) -> None:
    """Write training images, and test images of each size with objects of the same size."""
    draw = functools.partial(SCENES[images], unit=SIDE)
    for factor in plan.factors:
        folder = data_folder(out, images, round(SIDE * factor))
        if (folder / 'made').exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        if factor == 1:
            make_shapes.write_split(folder, 'train', plan.train_images, SIDE, 0, draw)
        # About as many objects at every size, in fewer or more images.
        count = min(max(round(plan.test_images / factor**2), 4), 2 * plan.test_images)
        make_shapes.write_split(folder, 'val', count, round(SIDE * factor), 0, draw)
        (folder / 'made').touch()


def read_config(out: Path, plan: Plan, job: Job) -> Config:
    """Return the config of a training."""
    experiment = EXPERIMENTS[job.experiment]
    cfg = Config.fromfile(HERE / experiment.config)
    cfg.launcher = 'none'
    prepare_for_cpu(cfg)
    point_at(cfg, data_folder(out, experiment.images, SIDE))
    cfg.model.backbone.position_bias = job.option
    if experiment.lr_mult:
        for key in cfg.optim_wrapper.paramwise_cfg.custom_keys.values():
            key.lr_mult = experiment.lr_mult
    iterations = dict(plan.iterations)[job.experiment]
    cfg.train_cfg.max_iters = iterations
    warm_up, decay = cfg.param_scheduler
    warm_up.end = decay.begin = min(warm_up.end, iterations // 2)
    decay.end = iterations
    if job.training == 'mixed':
        cfg.custom_hooks = [dict(type='MixedSizes', sides=[round(SIDE * f) for f in MIXED])]
    cfg.default_hooks.checkpoint = None
    cfg.default_hooks.logger.interval = 50
    cfg.log_level = 'ERROR'
    cfg.randomness = dict(seed=job.seed)
    cfg.work_dir = str(out / 'logs' / job.name)
    cfg.experiment_name = f'{job.name}-{time.time_ns()}'
    cfg.visualizer = dict(type='mmengine.Visualizer', name=cfg.experiment_name, vis_backends=[])
    return cfg


def point_at(cfg: Config, folder: Path) -> None:
    """Use data and metrics of a folder that make_shapes has written."""
    replace_data_root(cfg, str(folder / ('coco' if cfg.default_scope == 'mmdet' else 'ade')))


@HOOKS.register_module(force=True)
class MixedSizes(Hook):
    """Give the images of each batch one of several sizes; needs ``num_workers=0``."""

    def __init__(self, sides):
        self.sides = sides

    def before_train(self, runner) -> None:
        self.random = np.random.default_rng(runner.seed)
        pipeline = runner.train_dataloader.dataset.pipeline.transforms
        (self.resize,) = [part for part in pipeline if type(part).__name__ == 'Resize']
        self.after_train_iter(runner, 0)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        side = int(self.random.choice(self.sides))
        self.resize.scale = (side, side)


@contextlib.contextmanager
def no_position(backbone):
    """Give attention no bias and the first embedding no map inside this context."""
    attentions = [block.attn for stage in backbone.layers for block in stage.blocks]
    kept, position = [attention.pos for attention in attentions], backbone.absolute_pos
    backbone.absolute_pos = torch.nn.Identity()
    for attention in attentions:
        attention.pos = NoPositionBias(attention.num_heads).to(attention.qkv.weight)
    yield
    backbone.absolute_pos = position
    for attention, pos in zip(attentions, kept):
        attention.pos = pos


def evaluate(runner, out: Path, experiment: Experiment, test: Test) -> float:
    """Return the metric of a trained model at other sizes and with other groups."""
    cfg = copy.deepcopy(runner.cfg)
    side = round(SIDE * test.factor)
    point_at(cfg, data_folder(out, experiment.images, SIDE if test.way == 'scaled' else side))
    (resize,) = [part for part in cfg.test_dataloader.dataset.pipeline if part.type == 'Resize']
    resize.scale = (side, side)
    backbone, trained = runner.model.backbone, cfg.model.backbone
    for stage, group_size, interval in zip(backbone.layers, trained.group_size, trained.interval):
        stage.group_size = round(group_size * test.group_factor)
        stage.interval = round(interval * test.interval_factor)
    with no_position(backbone) if test.without_position else contextlib.nullcontext():
        metrics = TestLoop(runner, cfg.test_dataloader, cfg.test_evaluator).run()
    return round(float(metrics[experiment.metric]) * experiment.scale, 2)


def run_job(out: Path, plan: Plan, job: Job) -> float:
    """Train, evaluate and write the job's file; return the CPU seconds that it took."""
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    start, experiment = time.process_time(), EXPERIMENTS[job.experiment]
    with (
        open(os.devnull, 'w') as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        cfg = read_config(out, plan, job)
        init_default_scope(cfg.default_scope)
        runner = Runner.from_cfg(cfg)
        runner.train()
        trained = time.process_time() - start
        loss = runner.message_hub.get_scalar('train/loss').mean(50)
        logging.disable(logging.WARNING)
        scores = {test.name: evaluate(runner, out, experiment, test) for test in tests(plan)}
        logging.disable(logging.NOTSET)
    took = time.process_time() - start
    result = dict(
        job._asdict(),
        loss=round(float(loss), 4),
        train_seconds=round(trained, 1),
        seconds=round(took, 1),
        scores=scores,
    )
    write_whole(out / 'jobs' / f'{job.name}.json', json.dumps(result).encode())
    shutil.rmtree(cfg.work_dir, ignore_errors=True)
    return took


def run_all(out: Path, plan: Plan, jobs: list) -> None:
    """Run the jobs whose files are not there yet."""
    check_writable('--out', out)
    stamp, said = out / 'plan.json', json.dumps(plan._asdict())
    if stamp.is_file() and stamp.read_text() != said:
        raise UserError(
            f"--out: '{out}' holds results of another plan, {stamp.read_text()}; name another "
            'folder.'
        )
    write_whole(stamp, said.encode())
    left = [job for job in jobs if not (out / 'jobs' / f'{job.name}.json').is_file()]
    print(f'{len(jobs)} trainings, {len(jobs) - len(left)} of them done', flush=True)
    for images in sorted({EXPERIMENTS[job.experiment].images for job in left}):
        make_data(out, plan, images)
    start = time.time()
    for done, job in enumerate(left, 1):
        seconds = run_job(out, plan, job)
        minutes = (time.time() - start) / done * (len(left) - done) / 60
        print(
            f'[{done}/{len(left)}] {job.name}: {seconds:.0f} s of CPU, {minutes:.0f} minutes to go',
            flush=True,
        )


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--out', type=Path, help='folder for data and results (default: work_dirs/position_bias)')
    add(
        '--report-to', type=Path, help='folder for the report (default: results, next to this file)'
    )
    add('--report', action='store_true', help='gather what is there, no training')
    add('--short', action='store_true', help='try the study: few images, iterations and sizes')
    add('--seeds', type=int, default=5, help='trainings of each kind')
    for name, known in (
        ('experiments', tuple(EXPERIMENTS)),
        ('trainings', TRAININGS),
        ('options', OPTIONS),
    ):
        said = f'of {", ".join(known)}'
        add(f'--{name}', nargs='+', choices=known, default=known, metavar='NAME', help=said)
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error('--seeds must be at least 1')
    args.out = args.out or Path('work_dirs/position_bias' + '_short' * args.short)
    args.report_to = args.report_to or (args.out if args.short else HERE) / 'results'
    return args


def main():
    args = parse_args()
    plan = SHORT if args.short else Plan()
    # One size, then mixed sizes; every seed for all before the next.
    jobs = [
        Job(seed, experiment, training, option)
        for training, seed, experiment, option in itertools.product(
            args.trainings, range(args.seeds), args.experiments, args.options
        )
        if option in EXPERIMENTS[experiment].options
    ]
    if not jobs:
        raise UserError(
            f'--options: {", ".join(args.options)} is not part of --experiments '
            f'{", ".join(args.experiments)}.'
        )
    if not args.report:
        run_all(args.out, plan, jobs)
    write_report(args.out, args.report_to)


if __name__ == '__main__':
    run(main)
