"""Do position biases differ in how they take images of other sizes than those of the training?

    python benchmarks/position_bias/study.py

Trains small models with each position option on generated images of one size, or of mixed sizes,
and tests them at 0.5 to 3 times that size, with objects scaled along or not, and with other group
sizes. Each finished training leaves one file; the same command again goes on where it was ended.
``--report`` only gathers what is there. README.md has the results.
"""

import argparse
import contextlib
import copy
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple, Tuple

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tools'), str(HERE)]

from experiments import EXPERIMENTS, MIXED, OPTIONS, SIDE, TRAININGS, Experiment, Test  # noqa: E402
from report import write_report  # noqa: E402

from crossformer_mm.engine.errors import fail  # noqa: E402


class Plan(NamedTuple):
    """What the results depend on, next to the configs."""

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
    """Every evaluation of a trained model."""
    sizes = [
        Test(way, factor)
        for way in ('scaled', 'canvas')
        for factor in plan.factors
        if factor != 1 or way == 'scaled'
    ]  # at 1 they are the same
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
    """Training images, and test images of each size, with objects of the same size in pixels."""
    import make_shapes
    import pairs_of_disks

    draw = functools.partial(
        {'shapes': make_shapes.scene, 'pairs': pairs_of_disks.scene}[images], unit=SIDE
    )
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


def read_config(out: Path, plan: Plan, job: Job):
    """The config of a training."""
    from mmengine.config import Config

    from crossformer_mm.engine.command_line import prepare_for_cpu

    experiment = EXPERIMENTS[job.experiment]
    cfg = Config.fromfile(HERE / experiment.config)
    cfg.launcher = 'none'
    prepare_for_cpu(cfg)
    point_at(cfg, data_folder(out, experiment.images, SIDE))
    cfg.model.backbone.position_bias = job.option
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


def point_at(cfg, folder: Path) -> None:
    """Let a config's data and metrics be those of a folder that make_shapes has written."""
    from crossformer_mm.engine.command_line import replace_data_root

    replace_data_root(cfg, str(folder / ('coco' if cfg.default_scope == 'mmdet' else 'ade')))


def register_hook() -> None:
    import numpy as np
    from mmengine.hooks import Hook
    from mmengine.registry import HOOKS

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
    """Meanwhile, attention has no bias and nothing is added to the first embedding."""
    from torch.nn import Identity

    from crossformer_mm.position_bias import NoPositionBias

    attentions = [block.attn for stage in backbone.layers for block in stage.blocks]
    kept, position = [attention.pos for attention in attentions], backbone.absolute_pos
    backbone.absolute_pos = Identity()
    for attention in attentions:
        attention.pos = NoPositionBias(attention.num_heads).to(attention.qkv.weight)
    yield
    backbone.absolute_pos = position
    for attention, pos in zip(attentions, kept):
        attention.pos = pos


def evaluate(runner, out: Path, experiment: Experiment, test: Test) -> float:
    """The metric of a trained model, at other sizes and with other groups."""
    from mmengine.runner import TestLoop

    cfg = copy.deepcopy(runner.cfg)
    side = round(SIDE * test.factor)
    point_at(cfg, data_folder(out, experiment.images, SIDE if test.way == 'scaled' else side))
    (resize,) = [part for part in cfg.test_dataloader.dataset.pipeline if part.type == 'Resize']
    resize.scale = (side, side)
    backbone = runner.model.backbone
    trained = cfg.model.backbone
    for stage, group_size, interval in zip(backbone.layers, trained.group_size, trained.interval):
        stage.group_size = round(group_size * test.group_factor)
        stage.interval = round(interval * test.interval_factor)
    with contextlib.ExitStack() as stack:
        if test.without_position:
            stack.enter_context(no_position(backbone))
        metrics = TestLoop(runner, cfg.test_dataloader, cfg.test_evaluator).run()
    return round(float(metrics[experiment.metric]) * experiment.scale, 2)


def run_job(out: Path, plan: Plan, job: Job) -> float:
    """Train, evaluate and write the job's file; returns the CPU seconds that it took."""
    import logging
    import warnings

    import torch
    from mmengine.registry import init_default_scope
    from mmengine.runner import Runner

    from crossformer_mm.engine.command_line import write_whole

    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    start = time.process_time()
    experiment = EXPERIMENTS[job.experiment]
    register_hook()
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


def check_plan(out: Path, plan: Plan) -> None:
    """End the program if a folder holds results that were obtained otherwise."""
    from crossformer_mm.engine.command_line import check_writable, write_whole

    check_writable('--out', out)
    stamp, said = out / 'plan.json', json.dumps(plan._asdict())
    if stamp.is_file() and stamp.read_text() != said:
        fail(
            f"--out: '{out}' holds results of another plan, {stamp.read_text()}; name another "
            'folder.'
        )
    write_whole(stamp, said.encode())


def outcomes(out: Path, plan: Plan, jobs: list, workers: int):
    """Run jobs, and tell of each, as soon as it has ended, its seconds or its error."""
    if workers == 1:
        for job in jobs:
            try:
                yield job, run_job(out, plan, job), None
            except Exception as error:
                yield job, None, error
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context('spawn')) as pool:
        running = {pool.submit(run_job, out, plan, job): job for job in jobs}
        for future in as_completed(running):
            error = future.exception()
            yield running[future], None if error else future.result(), error


def run_all(out: Path, plan: Plan, jobs: list, workers: int) -> None:
    """Run the jobs whose files are not there yet."""
    check_plan(out, plan)
    left = [job for job in jobs if not (out / 'jobs' / f'{job.name}.json').is_file()]
    print(f'{len(jobs)} trainings, {len(jobs) - len(left)} of them done', flush=True)
    for images in sorted({EXPERIMENTS[job.experiment].images for job in left}):
        make_data(out, plan, images)
    start, failed = time.time(), {}
    for done, (job, seconds, error) in enumerate(outcomes(out, plan, left, workers), 1):
        if error:
            failed[job.name] = error
        rate = (time.time() - start) / done
        print(
            f'[{done}/{len(left)}] {job.name}: '
            + (f'failed, {type(error).__name__}: {error}' if error else f'{seconds:.0f} s of CPU')
            + f', {rate * (len(left) - done) / 60:.0f} minutes to go',
            flush=True,
        )
    if failed:
        fail(
            f'{len(failed)} of {len(left)} trainings failed ({", ".join(failed)}); the same '
            'command tries them again.'
        )


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--out',
        type=Path,
        help='folder for data and for the result of each '
        'training (default: work_dirs/position_bias, with --short ..._short)',
    )
    parser.add_argument(
        '--report-to',
        type=Path,
        help='folder for results.json, table.md and '
        'pictures (default: results beside this file, with --short in --out)',
    )
    parser.add_argument('--report', action='store_true', help='gather what is there, no training')
    parser.add_argument(
        '--short', action='store_true', help='try the machinery: few images, iterations and sizes'
    )
    parser.add_argument('--workers', type=int, default=2, help='trainings at a time')
    parser.add_argument('--seeds', type=int, default=5, help='trainings of each kind')
    for name, known in (
        ('experiments', tuple(EXPERIMENTS)),
        ('trainings', TRAININGS),
        ('options', OPTIONS),
    ):
        parser.add_argument(
            f'--{name}',
            nargs='+',
            choices=known,
            default=known,
            metavar='NAME',
            help=f'of {", ".join(known)}',
        )
    args = parser.parse_args()
    if min(args.workers, args.seeds) < 1:
        parser.error('--workers and --seeds must be at least 1')
    args.out = args.out or Path('work_dirs/position_bias' + '_short' * args.short)
    args.report_to = args.report_to or (args.out if args.short else HERE) / 'results'
    return args


def main():
    args = parse_args()
    plan = SHORT if args.short else Plan()
    # First one size, then mixed sizes; every seed for all before the next, whenever it is ended.
    jobs = [
        Job(seed, experiment, training, option)
        for training, seed, experiment, option in itertools.product(
            args.trainings, range(args.seeds), args.experiments, args.options
        )
        if option in EXPERIMENTS[experiment].options
    ]
    if not jobs:
        fail(
            f'--options: {", ".join(args.options)} is not part of --experiments '
            f'{", ".join(args.experiments)}.'
        )
    if not args.report:
        run_all(args.out, plan, jobs, args.workers)
    write_report(args.out, args.report_to)


if __name__ == '__main__':
    main()
