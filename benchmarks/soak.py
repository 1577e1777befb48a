"""Checks that take too long for a test: trainings killed again and again, thousands of steps.

    python benchmarks/soak.py --out benchmarks/soak.md

- ``steps``: 2000 forward and backward passes on images of random size. In the last half, memory
  may grow by less than 2 %.
- ``detector``, ``segmentor``: the small trainings of tests/trainings.py, each ended 20 times by
  SIGKILL, at random moments and while it writes a checkpoint, and resumed. No kill may lose more
  than one interval, and the weights in the end must be those of an uninterrupted training.
- ``detector_sigterm``, ``segmentor_sigterm``: the same with SIGTERM, which may lose no iteration.
- ``restarts``: two processes under ``torchrun --max-restarts=3``, one of which is killed three
  times. The job must end by itself, with the weights of an undisturbed one.
- ``cost``: what NonFiniteHook and PreemptionHook do in an iteration may take 1 % of a training step
  of CrossFormer-S on one image of 800x1216.
- ``sizes``: tests/test_sizes.py with more than ten times as many examples.

Exit status 1: a promise did not hold.
"""

import argparse
import ctypes
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from common import ROOT

sys.path.insert(0, str(ROOT))

M_MMAP_THRESHOLD = -3  # of malloc.h


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def steps(count: int, largest: int = 128) -> list:
    """Return the resident bytes after each of ``count`` steps on images with sides up to
    ``largest``."""
    from crossformer_mm import CrossFormer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Return freed tensors to the system: blocks of random size otherwise leave holes in the heap
    # (+2.35 % were measured with sides up to 256), which are no leak.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    rng = random.Random(0)
    backbone = CrossFormer(
        dict(embed_dims=16, depths=(1, 2, 2, 1), num_heads=(1, 2, 2, 4)), drop_path_rate=0.1
    )
    backbone.init_weights()
    optimizer = torch.optim.AdamW(backbone.parameters(), 1e-4)
    used = []
    for step in range(1, count + 1):
        image = torch.randn(rng.randint(1, 2), 3, *(rng.randint(1, largest) for _ in 'hw'))
        optimizer.zero_grad()
        sum(feature.square().mean() for feature in backbone(image)).backward()
        optimizer.step()
        used.append(resident())
        if step % 100 == 0:
            print(f'step {step}/{count}: {used[-1] / 2**20:.1f} MB', flush=True)
    return used


def growth(used: list) -> float:
    """Return the relative growth over the last half, between means of a twentieth."""
    half, few = len(used) // 2, len(used) // 20
    return sum(used[-few:]) / sum(used[half : half + few]) - 1


def long_steps(count: int = 2000) -> tuple:
    used = steps(count)
    half, end = (used[i] / 2**20 for i in (len(used) // 2, -1))
    return growth(used) < 0.02, (
        f'{count} steps at random sizes: {half:.0f} MB resident half-way, '
        f'{end:.0f} MB at the end, growth over the last half {100 * growth(used):+.2f} %'
    )


def newest(folder: Path) -> int:
    """Return the iterations done at the newest complete checkpoint, 0 for none."""
    from crossformer_mm.engine.newest_checkpoint import TEMPLATES, numbered_files, read_undamaged

    paths = (path for template in TEMPLATES for _, path in numbered_files(str(folder), template))
    return max((found['meta']['iter'] for found in map(read_undamaged, paths) if found), default=0)


def parts_of(folder: Path) -> set:
    """Return the names and times of files that are, or were, being written."""
    found = set()
    for path in folder.glob('*.part'):
        try:
            found.add((path.name, path.stat().st_mtime_ns))
        except FileNotFoundError:  # renamed meanwhile
            pass
    return found


def iterations(log: str) -> int:
    return len(re.findall(r'(?:Epoch|Iter)\(train\)', log))


def compare(checkpoint: str, interrupted: Path, uninterrupted: Path) -> tuple:
    """Check that a checkpoint of two trainings has the same weights, and say so."""
    from tests.trainings import assert_same_training

    same = True
    try:
        assert_same_training(interrupted / checkpoint, uninterrupted / checkpoint)
    except AssertionError as difference:
        print(difference)
        same = False
    return same, f"weights {'the same as' if same else 'NOT those'} of an uninterrupted training"


def kills(kind, folder: Path, number: int = signal.SIGKILL, count: int = 20) -> tuple:
    """End a training by a signal ``count`` times, let it end by itself, and compare it with an
    uninterrupted one."""
    from tests.trainings import make_data, train, write_config

    detector, by_kill = kind.name == 'detector', number == signal.SIGKILL
    longer = (  # long enough for all signals; checkpoints are three iterations apart
        dict(train_cfg=dict(max_epochs=count + 4, val_interval=5))
        if detector
        else dict(train_cfg=dict(max_iters=3 * count + 11, val_interval=10))
    )
    config = write_config(kind, folder / f'{kind.name}.py', make_data(folder / 'data'), **longer)
    alone, ended = folder / f'{kind.name}_alone', folder / f'{kind.name}_ended'
    for path in (alone, ended):
        path.mkdir()

    def finish(work: Path, *options) -> None:
        process = train(work, config, *options)
        assert process.wait(1200) == 0, process.output[-3000:]

    finish(alone)
    rng = random.Random(0)
    most_lost, while_writing = 0, 0
    for index in range(count):
        begun, left = newest(ended), parts_of(ended)
        process = train(ended, config, '--resume')
        if index % 2 and by_kill:  # while it writes
            process.wait_until(lambda: parts_of(ended) - left)
        else:  # at any moment, from before its first step to after its first checkpoint
            steps_on = rng.randint(0, 4)
            process.wait_until(lambda: iterations(process.output) >= steps_on)
            time.sleep(rng.uniform(0, 0.5))
        os.kill(process.process.pid, number)
        status = process.wait()
        # SIGTERM before the training has begun ends the process as it ends any other.
        assert status in ((-9,) if by_kill else (75, -15)), process.output[-3000:]
        while_writing += bool(parts_of(ended) - left)
        done, kept = begun + iterations(process.output), newest(ended)
        assert kept >= begun
        most_lost = max(most_lost, done - kept)
        print(
            f'{kind.name}, signal {index + 1}/{count}: status {status}, {done} iterations done, '
            f'checkpoint of {kept}',
            flush=True,
        )
    finish(ended, '--resume')
    last = f'epoch_{count + 4}.pth' if detector else f'iter_{3 * count + 11}.pth'
    same, said = compare(last, ended, alone)
    if by_kill:
        return same and most_lost <= 3, (
            f'{kind.name} killed {count} times, {while_writing} of them while it wrote a '
            f'checkpoint: at most {most_lost / 3:.2f} intervals lost to a kill, {said}'
        )
    return same and most_lost == 0, (
        f'{kind.name} ended by SIGTERM {count} times: at most {most_lost} iterations lost to a '
        f'signal, {said}'
    )


def restarts(folder: Path, count: int = 3) -> tuple:
    """Kill one of two processes ``count`` times, and compare with an undisturbed job."""
    import psutil

    from tests.engine.test_ranks import comparable
    from tests.helpers import free_port
    from tests.trainings import make_data

    more = (
        "train_cfg = dict(max_iters=40)\nrandomness = dict(seed=0)\n"
        "optim_wrapper['optimizer']['lr'] = 0.01\ndefault_hooks['checkpoint']['interval'] = 3\n"
    )
    data = make_data(folder / 'data', train=9, val=2)
    config = comparable(folder / 'two.py', data, batch=2, more=more)
    rng, killed = random.Random(0), []
    for name in ('alone', 'restarted'):
        log = folder / f'{name}.txt'
        with open(log, 'w') as file:
            job = subprocess.Popen(
                [ROOT / 'tools/dist_train.sh', config, '2', '--work-dir', folder / name],
                env=dict(
                    os.environ,
                    MAX_RESTARTS=str(count),
                    PORT=free_port(),
                    PYTHON=sys.executable,
                    OMP_NUM_THREADS='1',
                ),
                stdout=file,
                stderr=file,
            )
        while name == 'restarted' and len(killed) < count and job.poll() is None:
            steps = iterations(log.read_text()) + rng.randint(1, 6)
            while iterations(log.read_text()) < steps and job.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            rank = rng.randrange(2)
            for process in psutil.Process(job.pid).children(recursive=True):
                if process.environ().get('RANK') == str(rank):
                    process.kill()
                    killed.append(rank)
                    break
        assert job.wait(1200) == 0, log.read_text()[-3000:]
    assert len(killed) == count
    same, said = compare('iter_40.pth', folder / 'restarted', folder / 'alone')
    return same, (
        f'one of two processes killed {len(killed)} times under torchrun --max-restarts=3 (ranks '
        f"{', '.join(map(str, killed))}): {said}"
    )


def cost() -> tuple:
    """Measure the time of the hooks' work in an iteration, as a part of a training step."""
    from mmengine.optim import OptimWrapper

    from crossformer_mm import CrossFormer
    from crossformer_mm.engine import NonFiniteHook, PreemptionHook

    torch.set_num_threads(1)
    backbone = CrossFormer('s')
    backbone.init_weights()
    optimizer = torch.optim.AdamW(backbone.parameters())
    runner = SimpleNamespace(optim_wrapper=OptimWrapper(optimizer), iter=0, epoch=0)
    hooks = NonFiniteHook(), PreemptionHook()
    times = []
    for watched in (False, True):
        if watched:
            hooks[0].before_train(runner)
        optimizer.zero_grad()
        began = time.perf_counter()
        loss = sum(one.square().mean() for one in backbone(torch.randn(1, 3, 800, 1216)))
        loss.backward()
        forward_and_backward = time.perf_counter() - began
        rest = []
        for _ in range(5):  # a fraction of a second, which the rest of the machine disturbs
            began = time.perf_counter()
            optimizer.step()
            for hook in hooks if watched else ():
                hook.after_train_iter(runner, 0, {}, dict(loss=loss))
            rest.append(time.perf_counter() - began)
        times.append((forward_and_backward, sorted(rest)[2]))
    (step, without), (_, with_hooks) = times
    print(f'step {step + without:.2f} s, optimizer {without:.3f} s, with hooks {with_hooks:.3f} s')
    part = (with_hooks - without) / (step + without)
    return part < 0.01, f'the checks of an iteration take {100 * part:.2f} % of a training step'


def sizes(examples: int = 400) -> tuple:
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', 'tests/test_sizes.py'],
        cwd=ROOT,
        env={**os.environ, 'CROSSFORMER_EXAMPLES': str(examples)},
    ).returncode
    return done == 0, (
        f'{examples} random sizes, batches, groups and intervals against the plain '
        f'formulation: {"no" if done == 0 else "A"} difference'
    )


def main():
    from tests.trainings import DETECTOR, SEGMENTOR

    parts = dict(
        steps=lambda _: long_steps(),
        detector=lambda folder: kills(DETECTOR, folder),
        segmentor=lambda folder: kills(SEGMENTOR, folder),
        detector_sigterm=lambda folder: kills(DETECTOR, folder, signal.SIGTERM),
        segmentor_sigterm=lambda folder: kills(SEGMENTOR, folder, signal.SIGTERM),
        restarts=restarts,
        cost=lambda _: cost(),
        sizes=lambda _: sizes(),
    )
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--parts', nargs='+', choices=parts, default=list(parts), help='(default: all)')
    add('--out', type=Path, help='file to write the results to')
    args = parser.parse_args()
    versions = f'Python {platform.python_version()}, PyTorch {torch.__version__}, 1 thread'
    lines = ['# Soak', '', '`make soak`', '', f'{platform.platform()}, {versions}', '']
    lines += ['| | held | minutes |', '|---|---|---|']
    all_held = True
    for name in args.parts:
        started = time.time()
        with tempfile.TemporaryDirectory() as folder:
            held, said = parts[name](Path(folder))
        all_held &= held
        lines.append(f"| {said} | {'yes' if held else 'NO'} | {(time.time() - started) / 60:.1f} |")
        print(lines[-1], flush=True)
        if args.out:
            args.out.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    sys.exit(not all_held)


if __name__ == '__main__':
    main()
