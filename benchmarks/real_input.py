"""The real configs on a few real images: a few iterations, or until the images are learnt by heart.

    python benchmarks/real_input.py recipes COCO_ROOT ADE_ROOT
    python benchmarks/real_input.py mask_rcnn COCO_ROOT --iterations 700
    python benchmarks/real_input.py upernet ADE_ROOT --iterations 1200 --amp bfloat16

The first trains and tests three recipes, whose warm-up alone is shortened. The others train
mask_rcnn/cf_s_1x.py or upernet/cf_s_160k.py from random weights and evaluate on the training
images; run again, they resume. What differs from the recipe is in :func:`learnt`.
"""

import argparse
import json
import statistics
from pathlib import Path

import cv2
import numpy as np
from common import ROOT, read_log, run_tool
from mmengine.config import Config

RECIPES = {
    'mask_rcnn/cf_s_1x': 'train_cfg.max_epochs=1 param_scheduler.0.end=5',
    'retinanet/cf_s_1x': 'train_cfg.max_epochs=1 param_scheduler.0.end=5',
    'upernet/cf_s_160k': 'train_cfg.max_iters=30 train_cfg.val_interval=30 '
    'default_hooks.checkpoint.interval=30 param_scheduler.0.end=5 param_scheduler.1.begin=5 '
    'param_scheduler.1.end=30 train_dataloader.num_workers=1 val_dataloader.num_workers=1 '
    'test_dataloader.num_workers=1',
}
# To learn by heart: recipe, size of the images, learning rate.
LEARNT = dict(
    mask_rcnn=('mask_rcnn/cf_s_1x', (360, 240), 2e-4),
    upernet=('upernet/cf_s_160k', (1024, 256), 3e-4),
)
INTERVAL = 100  # of validation and checkpoints
METRICS = ('coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP', 'coco/segm_mAP_50', 'mIoU', 'aAcc')


def choose_images(annotations: Path, count: int = 8) -> dict:
    """Choose, of the images with several objects, those whose smallest object is largest; one of
    them has a crowd."""
    data = json.loads(annotations.read_text())
    objects = {image['id']: [] for image in data['images']}
    for one in data['annotations']:
        objects[one['image_id']].append(one)

    def smallest(image: dict) -> float:
        return min(one['area'] for one in objects[image['id']]) / image['width'] / image['height']

    images = [image for image in data['images'] if len(objects[image['id']]) > 1]
    images.sort(key=smallest, reverse=True)
    crowded = [image for image in images if any(one['iscrowd'] for one in objects[image['id']])][:1]
    data['images'] = (crowded + [image for image in images if image not in crowded])[:count]
    data['annotations'] = [one for image in data['images'] for one in objects[image['id']]]
    return data


def class_weights(annotations: Path, classes: int = 150) -> list:
    """Weight each class by how rare it is, to the power of 3/4; absent classes by 1."""
    pixels = np.zeros(256, int)
    for file in annotations.glob('*.png'):
        pixels += np.bincount(cv2.imread(str(file), cv2.IMREAD_GRAYSCALE).flatten(), minlength=256)
    pixels = pixels[1 : classes + 1]
    mean = pixels.sum() / (pixels > 0).sum()
    weights = np.where(pixels, (mean / np.maximum(pixels, 1)) ** 0.75, 1)
    return weights.round(2).tolist()


def learnt(name: str, root: Path, work: Path, iterations: int) -> Config:
    """Change a recipe for a few small images, no stochastic depth, and evaluation on the same."""
    recipe, scale, lr = LEARNT[name]
    cfg = Config.fromfile(ROOT / f'configs/{recipe}.py')
    cfg.model.backbone.update(out_norm=True, drop_path_rate=0.0)
    load, annotations, flip = (
        dict(type='LoadImageFromFile'),
        next(step for step in cfg.train_pipeline if step.type == 'LoadAnnotations'),
        dict(type='RandomFlip', prob=0.5),
    )
    if name == 'mask_rcnn':
        chosen = work / 'chosen.json'
        chosen.write_text(json.dumps(choose_images(root / 'annotations/instances_train2017.json')))
        dataset = dict(ann_file=str(chosen), data_prefix=dict(img='train2017/'))
        cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = str(chosen)
        # Images have less than a tenth of the recipe's area: fewer regions.
        cfg.model.train_cfg.rpn_proposal.max_per_img = 200
        cfg.model.train_cfg.rcnn.sampler.num = 64
        cfg.model.test_cfg.rpn.max_per_img = 300
        cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    else:  # whole images, not crops of random size and colours
        folders = dict(img_path='images/training', seg_map_path='annotations/training')
        dataset = dict(data_prefix=folders)
        cfg.model.data_preprocessor.update(size=None, size_divisor=32)
        for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
            head.loss_decode.class_weight = class_weights(root / 'annotations' / 'training')
    resize = dict(type='Resize', scale=scale, keep_ratio=True)
    train = [load, annotations, resize, flip, cfg.train_pipeline[-1]]
    test = [load, resize, annotations, cfg.test_pipeline[-1]]
    for split, pipeline in (('train', train), ('val', test), ('test', test)):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.update(dataset, data_root=str(root), pipeline=pipeline)
    cfg.train_dataloader.batch_size = 2
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=INTERVAL)
    cfg.optim_wrapper.optimizer.lr = lr
    cfg.optim_wrapper.clip_grad = dict(max_norm=5.0)
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
        dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=50, end=iterations),
    ]
    cfg.default_hooks.logger.update(interval=10, log_metric_by_epoch=False)
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=INTERVAL, max_keep_ckpts=1)
    cfg.log_processor = dict(by_epoch=False, window_size=10)
    cfg.randomness = dict(seed=0)
    return cfg


def print_table(heads: list, rows: list) -> None:
    print(f"\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def metrics_in(row: dict) -> dict:
    return {key: f'{row[key]:.4g}' for key in METRICS if key in row}


def run_recipes(work: Path, coco: Path, ade: Path) -> None:
    rows = []
    for name, options in RECIPES.items():
        config, folder = f'configs/{name}.py', work / name.partition('/')[0]
        folder.mkdir(parents=True, exist_ok=True)
        where = ['--data-root', ade if 'upernet' in name else coco, '--work-dir', folder]
        options = ['randomness.seed=0', 'log_processor.window_size=1', *options.split()]
        options.append('default_hooks.logger.interval=1')
        run_tool(folder / 'train.log', 'tools/train.py', config, *where, '--cfg-options', *options)
        (checkpoint,) = folder.glob('*.pth')
        run_tool(folder / 'test.log', 'tools/test.py', config, checkpoint, *where)
        steps = [row for row in read_log(folder) if 'loss' in row]
        losses = [row['loss'] for row in steps]
        tested = json.loads(
            max(folder.glob('*/*.json'), key=lambda p: p.stat().st_mtime).read_text()
        )
        rows.append(
            [
                folder.name,
                str(len(losses)),
                f'{statistics.mean(losses[:5]):.3f}',
                f'{statistics.mean(losses[-5:]):.3f}',
                f"{statistics.median(row['time'] for row in steps):.1f}",
                ', '.join(' '.join(pair) for pair in metrics_in(tested).items()),
            ]
        )
    heads = 'config, iterations, loss of the first 5, loss of the last 5, s per iteration, metrics'
    print_table(heads.split(', '), rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('name', choices=['recipes', *LEARNT])
    add('roots', type=Path, nargs='+', help='folder of COCO 2017, of ADE20K, or both')
    add('--work-dir', type=Path, default='work_dirs/real_input')
    add('--iterations', type=int, default=1000)
    add('--amp', choices=['bfloat16'], help='where the processor is fast in it')
    args = parser.parse_args()
    if len(args.roots) != 1 + (args.name == 'recipes'):
        parser.error(f'{args.name}: {"two folders" if args.name == "recipes" else "one folder"}')
    work = args.work_dir.absolute()
    work.mkdir(parents=True, exist_ok=True)
    if args.name == 'recipes':
        run_recipes(work, *(root.absolute() for root in args.roots))
        return
    config = work / f'{args.name}.py'
    learnt(args.name, args.roots[0].absolute(), work, args.iterations).dump(config)
    amp = ['--amp', args.amp] if args.amp else []
    options = ['--work-dir', work / args.name, '--resume', *amp]
    run_tool(work / f'{args.name}.log', 'tools/train.py', config, *options)
    found = [(row['step'], metrics_in(row)) for row in read_log(work / args.name)]
    found = [(step, metrics) for step, metrics in found if metrics]
    print_table(['iteration', *found[0][1]], [[str(step), *m.values()] for step, m in found])


if __name__ == '__main__':
    main()
