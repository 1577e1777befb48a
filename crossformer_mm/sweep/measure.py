"""Metrics, time and memory of a trained model at one setting, measured in a process of its own."""

import contextlib
import json
import numbers
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Callable, List, Optional, Sequence

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, init_default_scope
from mmengine.utils import ProgressBar

from ..architectures import GROUPS
from ..checkpoint import use_safe_loading
from ..config_parts import innermost
from ..engine.coco_checks import annotations_checked
from ..engine.dataset_checks import check_files, explained_data
from ..engine.runner import build_runner
from ..errors import UserError, said
from ..flops import count
from .settings import name_of

RESULT = 'result.json'


class CostHook(Hook):
    """Give a trained model its setting, measure what it costs while it is tested, show progress.

    Args:
        setting (dict): group size, interval and definition of long distance attention.
        metrics (sequence of str): the evaluator must have these, which is checked on the first
            images before all are evaluated.
    """

    def __init__(self, setting: dict, metrics: Sequence[str]):
        self.setting, self.metrics = setting, metrics
        self.seconds: List[float] = []  # per image
        self.backbone: List[float] = []
        self.memory: Optional[int] = None  # peak, in bytes
        self.shapes: Counter = Counter()
        self.inside = self.entered = 0.0

    def before_test(self, runner) -> None:
        loop, self.model = runner.test_loop, runner.model
        # Not in the config: position biases other than the dynamic one have parameters of a size.
        for stage, *values in zip(
            self.model.backbone.layers, *(self.setting[k] for k in GROUPS[:2])
        ):
            stage.group_size, stage.interval = values
            stage.lda = self.setting['lda']
        for metric in loop.evaluator.metrics:
            if hasattr(metric, 'img_ids'):  # MMDetection's would count images left out as missed
                data = loop.dataloader.dataset
                metric.img_ids = [data.get_data_info(i)['img_id'] for i in range(len(data))]
        if self.metrics:
            self.check_metrics(loop)
        # No hook of MMEngine's is called between the prediction and its evaluation.
        self.test_step, self.model.test_step = self.model.test_step, self.step
        self.model.backbone.register_forward_pre_hook(self.enter)
        self.model.backbone.register_forward_hook(self.leave)
        self.progress = ProgressBar(len(loop.dataloader), bar_width=30, file=sys.__stdout__)

    @torch.no_grad()
    def check_metrics(self, loop) -> None:
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
    """Forget the peak of memory, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')


def peak() -> Optional[int]:
    """Return the peak of memory in bytes; None: the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        status = Path('/proc/self/status').read_text()
    except OSError:
        return None
    return int(status.split('VmHWM:')[1].split()[0]) * 1024


def check_names(asked: Sequence[str], metrics: dict) -> None:
    """Raise a UserError if there are metrics, but not one of those asked for."""
    for name in asked:
        if metrics and name not in metrics:  # an evaluator has none where nothing is detected
            raise UserError(
                f"--metric: the config's evaluator has no '{name}', but "
                f"{', '.join(map(repr, metrics))}."
            )


def number_of_images(cfg: Config) -> int:
    """Count the images of a config's test data, or raise a UserError if they cannot be used."""
    init_default_scope(cfg.default_scope)
    # pycocotools prints.
    with contextlib.redirect_stdout(sys.stderr), explained_data(), annotations_checked():
        dataset = DATASETS.build(innermost(cfg.test_dataloader.dataset))
    check_files(dataset)
    return len(dataset)


def measure(cfg: Config, setting: dict, asked: Sequence[str]) -> dict:
    """Measure the trained model of a config at a setting, on its test data.

    Returns:
        dict: ``metrics``, ``seconds`` and ``backbone_seconds`` per image, ``peak_memory`` in bytes
        (None: unknown), ``backbone_flops`` at the most frequent ``shape`` (H, W) of the images.

    Raises:
        UserError: the model, its checkpoint or data cannot be used, or there is no metric of a
            name in ``asked``.
    """
    use_safe_loading()
    # Messages of libraries go to the log; only the progress bar is for the terminal.
    with contextlib.redirect_stdout(sys.stderr):
        runner = build_runner(cfg)
        hook = CostHook(setting, asked)
        runner.register_hook(hook)
        metrics = runner.test()
        shape = hook.shapes.most_common(1)[0][0]
        cfg.model.backbone.update(setting)
        parts = count(cfg, shape)['parts']
    flops = sum(part['flops'] for name, part in parts.items() if name.startswith('backbone.'))
    return dict(
        metrics={
            name: float(value) for name, value in metrics.items() if isinstance(value, numbers.Real)
        },
        **hook.result(),
        backbone_flops=flops,
        shape=shape,
    )


def run_task(task: dict, read_config: Callable[[], Config]) -> None:
    """Measure in the process that :func:`measure_apart` has started, and leave a file for it.

    The file holds the result; after an error, which is raised again, its message and whether the
    user is at fault.
    """
    file = Path(task['folder'], RESULT)
    try:
        cfg = read_config()
        if task['images'] is not None:
            innermost(cfg.test_dataloader.dataset)['indices'] = task['images']
        cfg.work_dir = task['folder']
        result = measure(cfg, task['setting'], task['asked'])
    except Exception as error:
        refused = isinstance(error, UserError)
        file.write_text(
            json.dumps(dict(error=str(error) if refused else said(error), refused=refused)),
            encoding='utf-8',
        )
        raise
    file.write_text(json.dumps(result), encoding='utf-8')


def measure_apart(
    command: Sequence[str], setting: dict, images: Optional[int], asked: Sequence[str], log: Path
) -> dict:
    """Call :func:`measure` in a new process, on the first ``images`` images or on all.

    ``command`` is a Python program that calls :func:`run_task` with the JSON of its option
    ``--task``; what it prints to stderr is added to ``log``.

    Returns:
        dict: what :func:`measure` returns; of a process that fails, ``error``, its message, and
        ``refused``, whether the user is at fault.
    """
    with tempfile.TemporaryDirectory() as folder, log.open('a', encoding='utf-8') as stderr:
        print(f'\n== {name_of(setting)}', file=stderr, flush=True)
        task = dict(setting=setting, images=images, asked=asked, folder=folder)
        status = subprocess.run(
            [sys.executable, '-W', 'ignore', *command, '--task', json.dumps(task)], stderr=stderr
        ).returncode
        print()  # after the progress bar
        file = Path(folder, RESULT)
        if file.is_file():
            return json.loads(file.read_text(encoding='utf-8'))
    ended = f'was ended by signal {-status}' if status < 0 else f'ended with status {status}'
    reason = f"the process {ended}, see '{log}'"
    if status == -9:
        reason += '; it happens when memory is full'
    return dict(error=reason, refused=False)
