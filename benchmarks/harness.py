"""Sections of a GPU benchmark, each in a process of its own with a time limit, and its clock."""

import functools
import json
import math
import multiprocessing
import os
import signal
import statistics
import time
import traceback
from pathlib import Path

import torch

FORK = multiprocessing.get_context('fork')  # everything is imported once


class NotRun(Exception):
    """Something that cannot be done here, which is no fault of this package."""


def run_all(items: dict, log) -> None:
    """Run functions by name, each of which returns figures, and write these as they come.

    ``passed=False`` among the figures, or an error, is a failure.
    """
    log(planned=list(items))
    for name, item in items.items():
        try:
            log(name=name, **item())
        except (NotRun, torch.cuda.OutOfMemoryError) as error:
            log(name=name, not_run=str(error).split('\n')[0])
        except Exception as error:
            traceback.print_exc()
            log(name=name, error=f'{type(error).__name__}: {error}'[:300])


def peer(function):
    """A function whose errors are not ours."""

    @functools.wraps(function)
    def tried(*args):
        try:
            return function(*args)
        except Exception as error:
            raise NotRun(f'{type(error).__name__}: {error}') from error

    return tried


def within(errors, limit: float) -> bool:
    """Return True if all errors are numbers below the limit; NaN is not."""
    return all(error <= limit for error in errors)


def relative(ours, exact, least: float = 1.0) -> list:
    """The largest error of each tensor, relative to its largest exact number or ``least``."""
    return [
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(least))
        for a, b in zip(ours, exact)
    ]


def worst(errors) -> float:
    """The largest error, NaN before any other."""
    return next((error for error in errors if math.isnan(error)), max(errors))


def on_gpu() -> bool:
    return torch.cuda.is_initialized()


def device_time(function, repeat: int = 5) -> dict:
    """Milliseconds of the GPU for a call, by kernel (without one, of the CPU)."""
    if not on_gpu():
        began = time.perf_counter()
        function()
        return {'all': 1e3 * (time.perf_counter() - began)}
    from torch.profiler import ProfilerActivity, profile

    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(repeat):
            function()
        torch.cuda.synchronize()
    return {e.key: e.self_device_time_total / 1e3 / repeat for e in recorded.key_averages()}


def both_passes(attention, inputs, grad) -> dict:
    """Device time of ``attention(*inputs)`` and of its gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():
        forward = device_time(lambda: attention(*inputs))
    out = attention(*inputs)
    backward = device_time(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))
    kernels_ms = {name[:50]: ms for name, ms in {**forward, **backward}.items()}
    return dict(forward_ms=sum(forward.values()), backward_ms=sum(backward.values()), **kernels_ms)


def measure(step) -> dict:
    """Milliseconds of a step: of the device, elapsed, and of the host; and its peak memory."""
    device = sum(device_time(step).values())
    if not on_gpu():
        return dict(device_ms=device)
    torch.cuda.reset_peak_memory_stats()
    times, memory = [], torch.cuda.memory_allocated()
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        asked = time.perf_counter()
        torch.cuda.synchronize()
        times.append((1e3 * (time.perf_counter() - began), 1e3 * (asked - began)))
    elapsed, host = (statistics.median(part) for part in zip(*times))
    peak = (torch.cuda.max_memory_allocated() - memory) / 2**30
    return dict(device_ms=device, ms=elapsed, host_ms=host, peak_gib=peak)


def child(run, path: Path) -> None:
    os.setsid()  # to be killed with all that it starts
    with path.open('a') as file:

        def log(**row) -> None:
            print(json.dumps(row), file=file, flush=True)
            short = {k: f'{v:.4g}' if isinstance(v, float) else v for k, v in row.items()}
            if 'planned' not in row:
                print('  ', *(f'{k}={v}'[:160] for k, v in short.items()), flush=True)

        run(log)


def run_section(run, limit: float, path: Path) -> dict:
    """Run a section in a process of its own.

    Args:
        run (Callable): gets ``log``, to which it gives ``planned=names`` and then, for each,
            ``name=name`` with figures.
        limit (float): seconds after which it is stopped.
        path (Path): a file for its results while it runs.

    Returns:
        dict: ``rows``, the names that ``failed`` and that were ``not_run``, ``seconds``, and in
        ``error`` how the process ended, if not well.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('')
    began = time.perf_counter()
    process = FORK.Process(target=child, args=(run, path))
    process.start()
    process.join(limit)
    error = ''
    if process.is_alive():
        error = f'stopped after {limit} s'
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    elif process.exitcode:
        error = f'its process ended with {process.exitcode}'
    rows = [json.loads(line) for line in path.read_text().split('\n')[:-1]]  # whole lines
    path.unlink()
    planned = [name for row in rows for name in row.get('planned', ())]
    rows = [row for row in rows if 'name' in row]
    done = {row['name'] for row in rows if 'not_run' not in row}
    return dict(
        error=error,
        seconds=round(time.perf_counter() - began, 1),
        failed=[r['name'] for r in rows if 'error' in r or not r.get('passed', True)],
        not_run=[name for name in planned if name not in done],
        rows=rows,
    )


def report(sections: dict) -> bool:
    """Print what was done, failed and not run in each section; return whether all went well."""
    for name, section in sections.items():
        failed, not_run = section['failed'], section['not_run']
        counts = f"{len(section['rows'])} done, {len(failed)} failed, {len(not_run)} not run"
        print(f"{name:10} {counts} {section['error']}")
        for entry in [f'failed: {name}' for name in failed] + [f'not run: {n}' for n in not_run]:
            print(f'    {entry}')
    return not any(section['failed'] or section['error'] for section in sections.values())
