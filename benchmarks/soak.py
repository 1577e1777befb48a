"""What a test has no time for: trainings killed again and again, thousands of steps.

    python benchmarks/soak.py --out benchmarks/soak.md

- ``steps``: 2000 times forward and backward on images of random size; in the last half,
  memory may grow by less than 2 %.
- ``detector``, ``segmentor``: the small trainings of tests/trainings.py, each ended 20
  times by SIGKILL, at random moments and while it writes a checkpoint, and resumed. Never
  may more than one interval be lost, and in the end the weights must be those of a training
  that nobody killed.
- ``sizes``: tests/test_sizes.py with more than ten times as many examples.

Exit status 1: something did not hold.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PAGE = 4096
M_MMAP_THRESHOLD = -3  # of malloc.h


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * PAGE


def steps(count: int, largest: int = 128, seed: int = 0) -> list:
    """Resident bytes after each of ``count`` steps on images with sides up to ``largest``."""
    from crossformer_mm import CrossFormer

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    # Give tensors back to the system when they are freed: blocks of random size otherwise leave
    # holes in the heap (+2.35 % were measured with sides up to 256), which are no leak.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    rng = random.Random(seed)
    backbone = CrossFormer(
        dict(embed_dims=16, depths=(1, 2, 2, 1), num_heads=(1, 2, 2, 4)), drop_path_rate=0.1
    )
    backbone.init_weights()
    optimizer = torch.optim.AdamW(backbone.parameters(), 1e-4)
    used = []
    for step in range(count):
        image = torch.randn(rng.randint(1, 2), 3, *(rng.randint(1, largest) for _ in 'hw'))
        optimizer.zero_grad()
        sum(feature.square().mean() for feature in backbone(image)).backward()
        optimizer.step()
        used.append(resident())
        if (step + 1) % 100 == 0:
            print(f'step {step + 1}/{count}: {used[-1] / 2**20:.1f} MB', flush=True)
    return used


def growth(used: list) -> float:
    """How much more is used at the end than half-way (means of a twentieth), as a part of that."""
    half, few = len(used) // 2, len(used) // 20
    return sum(used[-few:]) / sum(used[half : half + few]) - 1


def newest(folder: Path) -> int:
    """Number of the newest whole checkpoint, 0 for none."""
    from crossformer_mm.engine.whole_files import TEMPLATES, numbered, whole_content

    found = (one for template in TEMPLATES for one in numbered(str(folder), template))
    return next((number for number, path in found if whole_content(path) is not None), 0)


def parts_of(folder: Path) -> set:
    """Files that are being written, or were when a process was killed, and since when."""
    found = set()
    for path in folder.glob('*.part'):
        try:
            found.add((path.name, path.stat().st_mtime_ns))
        except FileNotFoundError:  # it got its last name meanwhile
            pass
    return found


def kills(kind, count: int, folder: Path, seed: int = 0) -> dict:
    """Kill a training ``count`` times, let it end, and compare it with one that was left alone.

    Returns:
        dict: ``lost``, the most intervals that one kill lost; ``while_writing``, how many kills
        met a checkpoint half-written; ``same``, whether the weights are the same in the end.
    """
    from tests.test_resume import assert_same_training, train
    from tests.trainings import make_data, write_config

    # Long enough for all the kills.
    longer = (
        dict(train_cfg=dict(max_epochs=count + 4, val_interval=5))
        if kind.name == 'detector'
        else dict(train_cfg=dict(max_iters=3 * count + 11, val_interval=10))
    )
    interval, per_interval = (1, 3) if kind.name == 'detector' else (3, 1)
    data = make_data(folder / 'data')
    config = write_config(kind, folder / f'{kind.name}.py', data, **longer)
    alone, killed = folder / f'{kind.name}_alone', folder / f'{kind.name}_killed'
    for path in (alone, killed):
        path.mkdir()
    process = train(alone, config)
    assert process.wait(1200) == 0, process.output[-3000:]

    rng = random.Random(seed)
    result = dict(lost=0.0, while_writing=0)
    for number in range(count):
        begun, left = newest(killed), parts_of(killed)
        process = train(killed, config, '--resume')
        if number % 2:  # while it writes
            process.wait_until(lambda: parts_of(killed) - left)
        else:  # at any moment, from before its first step to after its first checkpoint
            steps_on = rng.randint(0, 4)
            process.wait_until(lambda: len(iterations(process.output)) >= steps_on)
            time.sleep(rng.uniform(0, 0.5))
        process.kill()
        result['while_writing'] += bool(parts_of(killed) - left)
        done = begun * per_interval + len(iterations(process.output))  # in steps
        kept = newest(killed)
        lost = (done - kept * per_interval) / (interval * per_interval)
        assert kept >= begun
        result['lost'] = max(result['lost'], lost)
        print(
            f'{kind.name}, kill {number + 1}/{count}: {done} steps done, checkpoint {kept}, '
            f'{lost:.2f} intervals lost',
            flush=True,
        )
    process = train(killed, config, '--resume')
    assert process.wait(1200) == 0, process.output[-3000:]
    last = f'{"epoch" if kind.name == "detector" else "iter"}_{newest(alone)}.pth'
    try:
        assert_same_training(killed / last, alone / last)
        result['same'] = True
    except AssertionError as difference:
        print(difference)
        result['same'] = False
    return result


def iterations(log: str) -> list:
    return re.findall(r'(?:Epoch|Iter)\(train\)', log)


def long_steps(count: int = 2000) -> tuple:
    used = steps(count)
    part = growth(used)
    half, end = (used[i] / 2**20 for i in (len(used) // 2, -1))
    return part < 0.02, (
        f'{count} steps at random sizes: {half:.0f} MB resident half-way, '
        f'{end:.0f} MB at the end, growth over the last half {100 * part:+.2f} %'
    )


def long_kills(kind, count: int = 20) -> tuple:
    with tempfile.TemporaryDirectory() as folder:
        result = kills(kind, count, Path(folder))
    return result['same'] and result['lost'] <= 1, (
        f"{kind.name} killed {count} times, {result['while_writing']} of them while it wrote a "
        f"checkpoint: at most {result['lost']:.2f} intervals lost to a kill, weights "
        f"{'the same as' if result['same'] else 'NOT those'} of a training left alone"
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
    parser = argparse.ArgumentParser(description='What a test has no time for')
    parser.add_argument(
        '--parts', nargs='+', choices=parts, default=list(parts), help='(default: all)'
    )
    parser.add_argument('--out', type=Path, help='file to write the results to')
    args = parser.parse_args()
    lines, all_held = (
        [
            '# Soak',
            '',
            '`make soak`',
            '',
            f'{platform.platform()}, Python '
            f'{platform.python_version()}, PyTorch {torch.__version__}, 1 thread',
            '',
            '| | held | minutes |',
            '|---|---|---|',
        ],
        True,
    )
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
