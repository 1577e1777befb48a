"""Detection from a pretrained backbone against detection from random weights, on generated data.

    python benchmarks/pretraining.py

A small CrossFormer learns to tell single shapes apart, 4 shapes with 4 patterns each; then a small
Mask R-CNN learns to find shapes, once from these weights and once from random ones, with each of
some seeds and all else the same. Written are results.json, table.md and curves.png. Interrupted, it
goes on with what its folder has not got yet.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools'))
from make_shapes import CLASSES, bright_colour, clutter, polygon, surface, write_image  # noqa: E402

CONFIGS = ROOT / 'benchmarks' / 'pretraining'
# Named after the class that has the pattern in the data of detection.
PATTERNS = dict(plain='disk', striped='square', chequered='triangle', ringed='star')
ARMS = {'pretrained': 'from the pretrained backbone', 'random': 'from random weights'}
METRICS = {'coco/bbox_mAP_50': 'box AP50', 'coco/segm_mAP_50': 'mask AP50'}
SIDE = 64  # of an image of one shape, in which it is as large as in the images of detection
# A try of the script: tiny models and data, no figure of which says anything.
SMOKE = dict(
    classes=[
        'model.backbone.arch.embed_dims=16',
        'model.neck.in_channels=128',
        'model.head.in_channels=128',
        'train_cfg.max_epochs=1',
    ],
    detection=[
        'model.backbone.arch.embed_dims=16',
        'model.neck.in_channels=[16,32,64,128]',
        'train_cfg.max_epochs=1',
        'model.roi_head.bbox_head.conv_out_channels=16',
        'model.roi_head.mask_head.num_convs=1',
        'model.test_cfg.rcnn.max_per_img=5',
        'model.train_cfg.rcnn.sampler.num=16',
    ],
)


def draw(rng: np.random.Generator, shape: str, pattern: str) -> np.ndarray:
    """One shape on clutter, (SIDE, SIDE, 3); its hue, as in detection, is likely for its kind."""
    image = clutter(rng, SIDE, SIDE)
    radius = rng.uniform(0.2, 0.44) * SIDE
    centre = rng.uniform(radius, SIDE - radius, 2)
    angle = rng.uniform(-np.pi, np.pi)
    inside = np.zeros((SIDE, SIDE), np.uint8)
    corners = np.round((polygon(shape, radius, angle) + centre) * 16).astype(np.int32)
    cv2.fillPoly(inside, [corners], 1, shift=4)
    light = np.array(bright_colour(rng, CLASSES.index(shape)))
    image[inside == 1] = light
    image[(inside == 1) & surface(PATTERNS[pattern], SIDE, centre, angle)] = light // 2
    return image


def make_classes(folder: Path, counts: Dict[str, int]) -> None:
    """Images of single shapes, in ImageNet's layout: each time the same."""
    for split, count in counts.items():
        rng = np.random.default_rng([0, split == 'val'])
        for shape in CLASSES:
            for pattern in PATTERNS:
                place = folder / split / f'{pattern}_{shape}'
                place.mkdir(parents=True, exist_ok=True)
                for index in range(count):
                    write_image(place / f'{index}.png', draw(rng, shape, pattern))


def run(log: Path, *command) -> None:
    """Run a tool, showing how far it is; end the program if it fails."""
    print(f"\n== {' '.join(map(str, command))}", flush=True)
    with (
        log.open('w') as keep,
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
        ) as process,
    ):
        for line in process.stdout:
            keep.write(line)
            if re.search(r'Epoch\((train|val)\)', line) and ('eta' not in line or '0/' in line):
                print('  ', line.split(' - INFO - ')[-1].rstrip()[:150], flush=True)
    if process.returncode:
        sys.exit(f"error: '{command[0]}' failed, its output is in '{log}'.")


def train(config: str, work: Path, *options) -> float:
    """Train, unless an earlier run of this program has; the minutes that it took."""
    finished = work / 'finished'
    if not finished.exists():
        began = time.time()
        run(
            work.with_suffix('.log'),
            'tools/train.py',
            CONFIGS / f'{config}.py',
            '--work-dir',
            work,
            '--cfg-options',
            *options,
        )
        finished.write_text(str((time.time() - began) / 60))
    return float(finished.read_text())


def curve(work: Path, key: str) -> List[float]:
    """What a training logged, newest last."""
    log = max(work.glob('*/vis_data/scalars.json'), key=lambda path: path.stat().st_mtime)
    entries = map(json.loads, log.read_text().splitlines())
    return [entry[key] for entry in entries if key in entry]


def measure(work: Path, seeds: List[int], smoke: bool) -> dict:
    """Train all; the curves and what they took."""
    classes, shapes = work / 'data' / 'classes', work / 'data' / 'shapes'
    print('== data', flush=True)
    make_classes(classes, dict(train=2, val=1) if smoke else dict(train=500, val=20))
    run(
        work / 'data.log',
        'tools/make_shapes.py',
        shapes,
        '--train',
        4 if smoke else 160,
        '--val',
        2 if smoke else 80,
    )
    took = dict(
        pretraining=train(
            'classifier',
            work / 'classifier',
            f'train_dataloader.dataset.data_root={classes}',
            f'val_dataloader.dataset.data_root={classes}',
            'randomness.seed=0',
            *(SMOKE['classes'] if smoke else []),
        )
    )
    result = dict(
        top1=curve(work / 'classifier', 'accuracy/top1'),
        loss=curve(work / 'classifier', 'loss'),
        seeds=seeds,
    )
    checkpoint = max((work / 'classifier').glob('epoch_*.pth'), key=lambda p: p.stat().st_mtime)
    coco = shapes / 'coco'
    annotations = coco / 'annotations' / 'instances_val2017.json'
    for seed in seeds:
        for arm in ARMS:
            took[f'{arm} {seed}'] = train(
                'mask_rcnn',
                work / f'{arm}_{seed}',
                f'randomness.seed={seed}',
                f'train_dataloader.dataset.data_root={coco}',
                f'val_dataloader.dataset.data_root={coco}',
                f'val_evaluator.ann_file={annotations}',
                *([f'model.backbone.init_cfg.checkpoint={checkpoint}'] * (arm == 'pretrained')),
                *(SMOKE['detection'] if smoke else []),
            )
    for arm in ARMS:
        result[arm] = {
            key: [curve(work / f'{arm}_{seed}', key) for seed in seeds] for key in METRICS
        }
    return dict(result, minutes={name: round(spent, 1) for name, spent in took.items()})


def draw_curves(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout='constrained')
    axes[0].plot(range(1, len(result['top1']) + 1), result['top1'], color='tab:green')
    axes[0].set(title='pretraining: 16 classes', xlabel='epoch', ylabel='top-1 in %', ylim=(0, 100))
    for axis, (key, name) in zip(axes[1:], METRICS.items()):
        for (arm, label), colour in zip(ARMS.items(), ('tab:blue', 'tab:orange')):
            curves = 100 * np.array(result[arm][key])
            epochs = range(1, curves.shape[1] + 1)
            axis.plot(epochs, curves.T, color=colour, linewidth=0.8, alpha=0.6)
            axis.plot(epochs, curves.mean(0), color=colour, linewidth=2.5, label=label)
        axis.set(title=f'detection: {name}', xlabel='epoch', ylabel=f'{name} in %', ylim=(0, 100))
        axis.legend(loc='lower right', frameon=False, title='thin lines: each seed')
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=110)


def table(result: dict) -> str:
    """Metrics on held-out images after each epoch: mean of all seeds, and the least and most."""
    lines = [
        "Written by `python benchmarks/pretraining.py`. On held-out images, in %, after each "
        f"epoch: mean of seeds {', '.join(map(str, result['seeds']))} (least to most).",
        '',
        '| epoch | '
        + ' | '.join(f'{name} {label}' for name in METRICS.values() for label in ARMS.values())
        + ' |',
        '|---' * 5 + '|',
    ]
    curves = [100 * np.array(result[arm][key]) for key in METRICS for arm in ARMS]
    for epoch in range(curves[0].shape[1]):
        cells = [
            f'{values[:, epoch].mean():.1f} ({values[:, epoch].min():.1f} to '
            f'{values[:, epoch].max():.1f})'
            for values in curves
        ]
        lines.append(f"| {epoch + 1} | {' | '.join(cells)} |")
    minutes = sum(result['minutes'].values())
    return '\n'.join(
        [
            *lines,
            '',
            f"Pretraining ended with top-1 {result['top1'][-1]:.1f} of 16 "
            f'classes. All trainings took {minutes:.0f} minutes.',
            '',
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--out', type=Path, default=CONFIGS, help='folder for results.json, table.md and curves.png'
    )
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=ROOT / 'work_dirs' / 'pretraining',
        help='folder for data, logs and checkpoints',
    )
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1], help='of detection')
    parser.add_argument(
        '--smoke',
        action='store_true',
        help='try the script on next to no data; its figures mean nothing',
    )
    args = parser.parse_args()
    for folder in (args.out, args.work_dir):
        folder.mkdir(parents=True, exist_ok=True)
    result = measure(args.work_dir.absolute(), args.seeds, args.smoke)
    (args.out / 'results.json').write_text(json.dumps(result, indent=1) + '\n')
    (args.out / 'table.md').write_text(table(result))
    draw_curves(result, args.out / 'curves.png')
    print(f"\n{table(result)}\nwritten to '{args.out}'")


if __name__ == '__main__':
    main()
