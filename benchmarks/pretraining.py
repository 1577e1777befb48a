"""Detection from a pretrained backbone, compared with random weights, on generated data.

    python benchmarks/pretraining.py

A small CrossFormer learns to classify single shapes, 4 shapes with 4 patterns each. Then a small
Mask R-CNN learns to detect shapes, once from these weights and once from random ones, with each of
several seeds and all else equal. Writes results.json, table.md and curves.png. Run again after an
interruption, it resumes.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Dict, List

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / 'tools'
sys.path[:0] = [str(TOOLS), str(ROOT / 'benchmarks')]
from common import draw_curves, read_curve  # noqa: E402
from demo import run_tool  # noqa: E402
from make_shapes import CLASSES, bright_colour, clutter, polygon, surface, write_image  # noqa: E402

CONFIGS = ROOT / 'benchmarks' / 'pretraining'
# Named after the class that has the pattern in the data for detection.
PATTERNS = dict(plain='disk', striped='square', chequered='triangle', ringed='star')
ARMS = {'pretrained': 'from the pretrained backbone', 'random': 'from random weights'}
METRICS = {'coco/bbox_mAP_50': 'box AP50', 'coco/segm_mAP_50': 'mask AP50'}
SIDE = 64  # of an image of one shape, which is as large as in the images for detection
# Tiny models for a try of the script; their figures mean nothing.
SMOKE = dict(
    classifier='model.backbone.arch.embed_dims=16 model.neck.in_channels=128 '
    'model.head.in_channels=128 train_cfg.max_epochs=1',
    mask_rcnn='model.backbone.arch.embed_dims=16 model.neck.in_channels=[16,32,64,128] '
    'train_cfg.max_epochs=1 model.roi_head.bbox_head.conv_out_channels=16 '
    'model.roi_head.mask_head.num_convs=1 model.test_cfg.rcnn.max_per_img=5 '
    'model.train_cfg.rcnn.sampler.num=16',
)


def draw(rng: np.random.Generator, shape: str, pattern: str) -> np.ndarray:
    """Draw one shape on clutter, (SIDE, SIDE, 3), in a hue that is likely for its class."""
    image = clutter(rng, SIDE)
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
    """Write images of single shapes in ImageNet's layout, the same ones each time."""
    for split, count in counts.items():
        rng = np.random.default_rng([0, split == 'val'])
        for shape in CLASSES:
            for pattern in PATTERNS:
                place = folder / split / f'{pattern}_{shape}'
                place.mkdir(parents=True, exist_ok=True)
                for index in range(count):
                    write_image(place / f'{index}.png', draw(rng, shape, pattern))


def measure(work: Path, seeds: List[int], smoke: bool) -> dict:
    """Train all; return the curves and the minutes that each training took."""
    minutes = {}

    def train(config: str, name: str, *options) -> None:
        finished = work / name / 'finished'
        if not finished.exists():
            began = time.time()
            options += tuple(SMOKE[config].split()) if smoke else ()
            arguments = CONFIGS / f'{config}.py', '--work-dir', work / name, '--cfg-options'
            run_tool(work / 'log.txt', name, TOOLS / 'train.py', *arguments, *options)
            finished.write_text(str((time.time() - began) / 60))
        minutes[name] = round(float(finished.read_text()), 1)

    def curve(name: str, key: str) -> List[float]:
        return [value for _, value in read_curve(work / name, key)]

    classes, coco = work / 'data' / 'classes', work / 'data' / 'shapes' / 'coco'
    print('== data', flush=True)
    make_classes(classes, dict(train=2, val=1) if smoke else dict(train=500, val=20))
    counts = ['--train', 4, '--val', 2] if smoke else ['--train', 160, '--val', 80]
    run_tool(work / 'log.txt', 'data', TOOLS / 'make_shapes.py', coco.parent, *counts)
    train(
        'classifier',
        'classifier',
        f'train_dataloader.dataset.data_root={classes}',
        f'val_dataloader.dataset.data_root={classes}',
        'randomness.seed=0',
    )
    checkpoint = max((work / 'classifier').glob('epoch_*.pth'), key=lambda p: p.stat().st_mtime)
    for seed in seeds:
        for arm in ARMS:
            train(
                'mask_rcnn',
                f'{arm}_{seed}',
                f'randomness.seed={seed}',
                f'train_dataloader.dataset.data_root={coco}',
                f'val_dataloader.dataset.data_root={coco}',
                f"val_evaluator.ann_file={coco / 'annotations' / 'instances_val2017.json'}",
                *([f'model.backbone.init_cfg.checkpoint={checkpoint}'] * (arm == 'pretrained')),
            )
    return dict(
        top1=curve('classifier', 'accuracy/top1'),
        loss=curve('classifier', 'loss'),
        seeds=seeds,
        **{
            arm: {key: [curve(f'{arm}_{seed}', key) for seed in seeds] for key in METRICS}
            for arm in ARMS
        },
        minutes=minutes,
    )


def draw_result(result: dict, path: Path) -> None:
    top1 = result['top1']
    lines = [dict(x=range(1, len(top1) + 1), y=top1, label='16 classes')]
    panels = [dict(title='pretraining', ylabel='top-1 in %', lines=lines)]
    for key, name in METRICS.items():
        lines = []
        for (arm, label), colour in zip(ARMS.items(), ('tab:blue', 'tab:orange')):
            curves = 100 * np.array(result[arm][key])
            x = range(1, curves.shape[1] + 1)
            lines += [dict(x=x, y=curve, color=colour, linewidth=0.8) for curve in curves]
            lines.append(dict(x=x, y=curves.mean(0), color=colour, linewidth=2.5, label=label))
        panels.append(
            dict(title='detection, mean and each seed', ylabel=f'{name} in %', lines=lines)
        )
    for panel in panels:
        panel.update(xlabel='epoch', ylim=(0, 100))
    draw_curves(path, panels, 3)


def table(result: dict) -> str:
    """Write the metrics on held-out images after each epoch: mean, minimum and maximum of seeds."""
    heads = [f'{name} {label}' for name in METRICS.values() for label in ARMS.values()]
    lines = [
        'Written by `python benchmarks/pretraining.py`. On held-out images, in %, after each '
        f"epoch: mean of seeds {', '.join(map(str, result['seeds']))} (least to most).",
        '',
        f"| epoch | {' | '.join(heads)} |",
        '|---' * 5 + '|',
    ]
    curves = [100 * np.array(result[arm][key]) for key in METRICS for arm in ARMS]
    for epoch, values in enumerate(zip(*(curve.T for curve in curves)), start=1):
        cells = (f'{v.mean():.1f} ({v.min():.1f} to {v.max():.1f})' for v in values)
        lines.append(f"| {epoch} | {' | '.join(cells)} |")
    lines += [
        '',
        f"Pretraining ended with top-1 {result['top1'][-1]:.1f} of 16 classes. All trainings took "
        f"{sum(result['minutes'].values()):.0f} minutes.",
    ]
    return '\n'.join(lines) + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, work = parser.add_argument, ROOT / 'work_dirs' / 'pretraining'
    add('--out', type=Path, default=CONFIGS, help='folder for the results')
    add('--work-dir', type=Path, default=work, help='folder for data, logs and checkpoints')
    add('--seeds', type=int, nargs='+', default=[0, 1], help='of detection')
    add('--smoke', action='store_true', help='try the script; its figures mean nothing')
    args = parser.parse_args()
    for folder in (args.out, args.work_dir):
        folder.mkdir(parents=True, exist_ok=True)
    result = measure(args.work_dir.absolute(), args.seeds, args.smoke)
    (args.out / 'results.json').write_text(json.dumps(result, indent=1) + '\n')
    (args.out / 'table.md').write_text(table(result))
    draw_result(result, args.out / 'curves.png')
    print(f"\n{table(result)}\nwritten to '{args.out}'")


if __name__ == '__main__':
    main()
