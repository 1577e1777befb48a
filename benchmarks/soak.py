"""Checks that take too long for a test: trainings killed again and again, thousands of steps.

    python benchmarks/soak.py --out benchmarks/soak.md

- ``steps``: 2000 forward and backward passes on images of random size. In the last half, memory
  may grow by less than 2 %.
- ``detector``, ``segmentor``: the small trainings of tests/trainings.py, each ended 20 times by
  SIGKILL, at random moments and while it writes a checkpoint, and resumed. No kill may lose more
  than one interval, and the weights in the end must be those of an uninterrupted training.
- ``sizes``: tests/test_sizes.py with more than ten times as many examples.

Exit status 1: a promise did not hold.
"""

import argparse
import ctypes
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT

sys.path.insert(0, str(ROOT))

M_MMAP_THRESHOLD = -3  # of malloc.h


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def steps(count: int, largest: int = 128, seed: int = 0) -> list:
    """Return the resident bytes after each of ``count`` steps on images with sides up to
    ``largest``."""
    from crossformer_mm import CrossFormer

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    # Return freed tensors to the system: blocks of random size otherwise leave holes in the heap
    # (+2.35 % were measured with sides up to 256), which are no leak.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    rng = random.Random(seed)
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


def newest(folder: Path) -> int:
    """Return the number of the newest complete checkpoint, 0 for none."""
    from crossformer_mm.engine.atomic_checkpoints import TEMPLATES, numbered, whole_content

    found = (one for template in TEMPLATES for one in numbered(str(folder), template))
    return next((number for number, path in found if whole_content(path) is not None), 0)


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


def kills(kind, count: int, folder: Path, seed: int = 0) -> tuple:
    """Kill a training ``count`` times, let it end, and compare it with an uninterrupted one.

    Returns:
        tuple: the most intervals that one kill lost; how many kills met a half-written checkpoint;
        whether the weights are the same in the end.
    """
    from tests.trainings import assert_same_training, make_data, train, write_config

    detector = kind.name == 'detector'
    longer = (  # long enough for all kills
        dict(train_cfg=dict(max_epochs=count + 4, val_interval=5))
        if detector
        else dict(train_cfg=dict(max_iters=3 * count + 11, val_interval=10))
    )
    # Checkpoints are numbered by epochs of 3 steps, or by steps; an interval is 3 steps.
    steps_of_number = 3 if detector else 1
    config = write_config(kind, folder / f'{kind.name}.py', make_data(folder / 'data'), **longer)
    alone, killed = folder / f'{kind.name}_alone', folder / f'{kind.name}_killed'
    for path in (alone, killed):
        path.mkdir()

    def finish(work: Path, *options) -> None:
        process = train(work, config, *options)
        assert process.wait(1200) == 0, process.output[-3000:]

    finish(alone)
    rng = random.Random(seed)
    most_lost, while_writing = 0.0, 0
    for number in range(count):
        begun, left = newest(killed), parts_of(killed)
        process = train(killed, config, '--resume')
        if number % 2:  # while it writes
            process.wait_until(lambda: parts_of(killed) - left)
        else:  # at any moment, from before its first step to after its first checkpoint
            steps_on = rng.randint(0, 4)
            process.wait_until(lambda: iterations(process.output) >= steps_on)
            time.sleep(rng.uniform(0, 0.5))
        process.kill()
        while_writing += bool(parts_of(killed) - left)
        done = begun * steps_of_number + iterations(process.output)
        kept = newest(killed)
        assert kept >= begun
        lost = (done - kept * steps_of_number) / 3
        most_lost = max(most_lost, lost)
        print(
            f'{kind.name}, kill {number + 1}/{count}: {done} steps done, checkpoint {kept}, '
            f'{lost:.2f} intervals lost',
            flush=True,
        )
    finish(killed, '--resume')
    last = f'{"epoch" if detector else "iter"}_{newest(alone)}.pth'
    try:
        assert_same_training(killed / last, alone / last)
    except AssertionError as difference:
        print(difference)
        return most_lost, while_writing, False
    return most_lost, while_writing, True


def long_steps(count: int = 2000) -> tuple:
    used = steps(count)
    half, end = (used[i] / 2**20 for i in (len(used) // 2, -1))
    return growth(used) < 0.02, (
        f'{count} steps at random sizes: {half:.0f} MB resident half-way, '
        f'{end:.0f} MB at the end, growth over the last half {100 * growth(used):+.2f} %'
    )


def long_kills(kind, count: int = 20) -> tuple:
    with tempfile.TemporaryDirectory() as folder:
        lost, while_writing, same = kills(kind, count, Path(folder))
    return same and lost <= 1, (
        f'{kind.name} killed {count} times, {while_writing} of them while it wrote a checkpoint: '
        f'at most {lost:.2f} intervals lost to a kill, weights '
        f"{'the same as' if same else 'NOT those'} of an uninterrupted training"
    )


def long_sizes(examples: int = 400) -> tuple:
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
        steps=long_steps,
        detector=lambda: long_kills(DETECTOR),
        segmentor=lambda: long_kills(SEGMENTOR),
        sizes=long_sizes,
    )
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--parts', nargs='+', choices=parts, default=list(parts), help='(default: all)'
    )
    parser.add_argument('--out', type=Path, help='file to write the results to')
    args = parser.parse_args()
    versions = f'Python {platform.python_version()}, PyTorch {torch.__version__}, 1 thread'
    lines = ['# Soak', '', '`make soak`', '', f'{platform.platform()}, {versions}', '']
    lines += ['| | held | minutes |', '|---|---|---|']
    all_held = True
    for name in args.parts:
        started = time.time()
        held, said = parts[name]()
        all_held &= held
        lines.append(f"| {said} | {'yes' if held else 'NO'} | {(time.time() - started) / 60:.1f} |")
        print(lines[-1], flush=True)
        if args.out:
            args.out.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    sys.exit(not all_held)


if __name__ == '__main__':
    main()
