"""What a test has no time for: trainings killed again and again, thousands of steps.

    python benchmarks/soak.py kills --count 20 --out benchmarks/soak.md
    python benchmarks/soak.py steps --count 2000 --out benchmarks/soak.md

``kills`` trains the small detector and the small segmentor of tests/trainings.py, ends
each training ``count`` times by SIGKILL, at random moments and while it writes a
checkpoint, and resumes it. Never may more than one interval be lost, and in the end the
weights must be those of a training that nobody killed. ``steps`` runs forward and
backward on images of random size; in the last half, memory may grow by 2 %. A line for
each is added to the file ``out``. Exit status 1: something did not hold.
"""
import argparse
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

PAGE = 4096


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * PAGE


def steps(count: int, seed: int = 0) -> list:
    """Resident bytes after each of ``count`` forward and backward passes at random sizes."""
    from crossformer_mm import CrossFormer
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    backbone = CrossFormer(dict(embed_dims=16, depths=(1, 2, 2, 1), num_heads=(1, 2, 2, 4)),
                           drop_path_rate=0.1)
    backbone.init_weights()
    optimizer = torch.optim.AdamW(backbone.parameters(), 1e-4)
    used = []
    for step in range(count):
        image = torch.randn(rng.randint(1, 2), 3, rng.randint(1, 256), rng.randint(1, 256))
        optimizer.zero_grad()
        sum(feature.square().mean() for feature in backbone(image)).backward()
        optimizer.step()
        used.append(resident())
        if (step + 1) % 100 == 0:
            print(f'step {step + 1}/{count}: {used[-1] / 2**20:.1f} MB', flush=True)
    return used


def growth(used: list) -> float:
    """How much the last quarter needs more than the third, as a part of the third."""
    quarter = len(used) // 4
    before, after = used[-2 * quarter:-quarter], used[-quarter:]
    return sum(after) / sum(before) - 1


def newest(folder: Path) -> int:
    """Number of the newest whole checkpoint, 0 for none."""
    from whole_files import newest_checkpoint
    path = newest_checkpoint(str(folder))
    return int(re.search(r'\d+', Path(path).name)[0]) if path else 0


def kills(kind, count: int, folder: Path, seed: int = 0) -> dict:
    """Kill a training ``count`` times, let it end, and compare it with one that was left alone.

    Returns:
        dict: ``lost``, the most intervals that one kill lost; ``while_writing``, how many kills
        met a checkpoint half-written; ``same``, whether the weights are the same in the end.
    """
    from tests.test_resume import assert_same_training, train
    from tests.trainings import make_data, write_config
    # Long enough for all the kills.
    from crossformer_mm.checkpoint import read_checkpoint
    longer = (dict(train_cfg=dict(max_epochs=count + 4, val_interval=5)) if kind.name == 'detector'
              else dict(train_cfg=dict(max_iters=3 * count + 11, val_interval=10)))
    interval, per_interval = (1, 3) if kind.name == 'detector' else (3, 1)
    data = make_data(folder / 'data')
    config = write_config(kind, folder / f'{kind.name}.py', data, **longer)
    alone, killed = folder / f'{kind.name}_alone', folder / f'{kind.name}_killed'
    for path in (alone, killed):
        path.mkdir()
    process = train(alone, config)
    assert process.wait(1200) == 0, process.output[-3000:]

    rng = random.Random(seed)
    result = dict(lost=0., while_writing=0)
    for number in range(count):
        begun = newest(killed)
        process = train(killed, config, '--resume')
        if number % 2:  # while it writes
            process.wait_until(lambda: list(killed.glob('*.part')))
        else:  # at any moment, from before its first step to after its first checkpoint
            steps_on = rng.randint(0, 4)
            process.wait_until(lambda: len(iterations(process.output)) >= steps_on)
            time.sleep(rng.uniform(0, 0.5))
        process.kill()
        result['while_writing'] += any(killed.glob('*.part'))
        done = begun * per_interval + len(iterations(process.output))  # in steps
        kept = newest(killed)
        lost = (done - kept * per_interval) / (interval * per_interval)
        assert kept >= begun
        result['lost'] = max(result['lost'], lost)
        print(f'{kind.name}, kill {number + 1}/{count}: {done} steps done, checkpoint {kept}, '
              f'{lost:.2f} intervals lost', flush=True)
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


def main():
    parser = argparse.ArgumentParser(description='What a test has no time for')
    parser.add_argument('what', choices=['kills', 'steps'])
    parser.add_argument('--count', type=int, default=20)
    parser.add_argument('--out', type=Path, help='file to add the result to')
    args = parser.parse_args()
    started, held = time.time(), True
    if args.what == 'steps':
        used = steps(args.count)
        part = growth(used)
        held = part < 0.02
        lines = [f'{args.count} steps at random sizes: {used[len(used) // 2] / 2**20:.0f} MB '
                 f'resident half-way, {used[-1] / 2**20:.0f} MB at the end, growth of the last '
                 f'quarter over the one before {100 * part:+.2f} %']
    else:
        from tests.trainings import DETECTOR, SEGMENTOR
        lines = []
        for kind in (DETECTOR, SEGMENTOR):
            folder = Path(tempfile.mkdtemp())
            result = kills(kind, args.count, folder)
            shutil.rmtree(folder)
            held &= result['same'] and result['lost'] <= 1
            lines.append(
                f"{kind.name} killed {args.count} times, {result['while_writing']} of them while a "
                f"checkpoint was written: at most {result['lost']:.2f} intervals lost, weights "
                f"{'the same as' if result['same'] else 'NOT those'} of a training left alone")
    minutes = (time.time() - started) / 60
    for line in lines:
        line = f'- {line}'
        print(line)
        if args.out:
            with args.out.open('a', encoding='utf-8') as file:
                file.write(f'{line}\n')
    print(f'{minutes:.1f} minutes, {"all held" if held else "NOT ALL HELD"}')
    sys.exit(not held)


if __name__ == '__main__':
    main()
