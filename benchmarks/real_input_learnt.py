"""Learn a few real images by heart: category ids, masks, crowds, boxes and metrics fit together.

    python benchmarks/real_input_learnt.py mask_rcnn COCO_ROOT --work-dir WORK_DIR
    python benchmarks/real_input_learnt.py upernet ADE_ROOT --work-dir WORK_DIR
    python benchmarks/real_input_learnt.py draw WORK_DIR --out benchmarks/real_input_learnt.png

trains configs/mask_rcnn/cf_s_1x.py or configs/upernet/cf_s_160k.py by tools/train.py from random
weights, and evaluates it on the images that it is trained on. Called again, it goes on where it
was. What differs from the recipe is what the written config WORK_DIR/NAME.py says: the size of
images, the schedule, no stochastic depth, and of upernet whole images in place of crops of random
sizes and colours, which are against learning by heart, and rare classes that count more.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent

BACKBONE = "dict(out_norm=True, drop_path_rate=0.)"
SCHEDULE = '''
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters={iterations},
                 val_interval={interval})
optim_wrapper = dict(optimizer=dict(lr={lr}), clip_grad=dict(max_norm={norm}))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=50, end={iterations})]
default_hooks = dict(
    logger=dict(interval=10, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval={interval}, max_keep_ckpts=1))
log_processor = dict(by_epoch=False, window_size=10)
randomness = dict(seed=0)
'''

MASK_RCNN = (
    '''
_base_ = {base!r}
scale = {scale}
model = dict(
    backbone='''
    + BACKBONE
    + ''',
    # Images have less than a tenth of the recipe's area: fewer regions, too.
    train_cfg=dict(rpn_proposal=dict(max_per_img=200),
                   rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(max_per_img=300)))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
dataset = dict(data_root={root!r}, ann_file={chosen!r}, data_prefix=dict(img='train2017/'))
train_dataloader = dict(
    batch_size={batch}, num_workers=0, persistent_workers=False,
    sampler=dict(_delete_=True, type='InfiniteSampler', shuffle=True),
    dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(num_workers=0, persistent_workers=False,
                      dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={chosen!r})
test_evaluator = val_evaluator
'''
)

UPERNET = (
    '''
_base_ = {base!r}
scale = {scale}
model = dict(backbone='''
    + BACKBONE
    + ''', data_preprocessor=dict(size=None, size_divisor=32),
    decode_head=dict(loss_decode=dict(class_weight={weights})),
    auxiliary_head=dict(loss_decode=dict(class_weight={weights})))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs')]
prefix = dict(img_path='images/training', seg_map_path='annotations/training')
train_dataloader = dict(
    batch_size={batch}, num_workers=0, persistent_workers=False,
    dataset=dict(data_root={root!r}, data_prefix=prefix, pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(data_root={root!r}, data_prefix=prefix, pipeline=test_pipeline))
test_dataloader = val_dataloader
'''
)


def choose_images(annotations: Path, count: int = 8) -> dict:
    """Of those with several objects, the images whose smallest object is largest; one of them has
    a crowd."""
    data = json.loads(annotations.read_text())
    objects = {image['id']: [] for image in data['images']}
    for one in data['annotations']:
        objects[one['image_id']].append(one)

    def smallest(image: dict) -> float:
        return min(one['area'] for one in objects[image['id']]) / image['width'] / image['height']

    images = sorted(
        (image for image in data['images'] if len(objects[image['id']]) > 1),
        key=smallest,
        reverse=True,
    )
    crowded = [image for image in images if any(one['iscrowd'] for one in objects[image['id']])][:1]
    others = [image for image in images if image not in crowded]
    data['images'] = (crowded + others)[:count]
    data['annotations'] = [one for image in data['images'] for one in objects[image['id']]]
    return data


def class_weights(annotations: Path, classes: int = 150) -> list:
    """Of each class, by how rare it is to the power of 3/4; of those that are not there, 1."""
    pixels = np.zeros(256, int)
    for file in annotations.glob('*.png'):
        pixels += np.bincount(cv2.imread(str(file), cv2.IMREAD_GRAYSCALE).flatten(), minlength=256)
    pixels = pixels[1 : classes + 1]
    mean = pixels.sum() / (pixels > 0).sum()
    weights = np.where(pixels, (mean / np.maximum(pixels, 1)) ** 0.75, 1)
    return weights.round(2).tolist()


def train(args) -> None:
    work = args.work_dir.absolute()
    work.mkdir(parents=True, exist_ok=True)
    config = work / f'{args.name}.py'
    root = str(args.data_root.absolute())
    if args.name == 'mask_rcnn':
        chosen = work / 'chosen.json'
        chosen.write_text(
            json.dumps(choose_images(args.data_root / 'annotations' / 'instances_train2017.json'))
        )
        text = MASK_RCNN.format(
            base=str(ROOT / 'configs/mask_rcnn/cf_s_1x.py'),
            root=root,
            chosen=str(chosen),
            scale=(args.long_side, args.size),
            batch=args.batch_size,
        )
    else:
        text = UPERNET.format(
            base=str(ROOT / 'configs/upernet/cf_s_160k.py'),
            root=root,
            weights=class_weights(args.data_root / 'annotations' / 'training'),
            scale=(4 * args.size, args.size),
            batch=args.batch_size,
        )
    text += SCHEDULE.format(
        iterations=args.iterations, interval=args.interval, lr=args.lr, norm=args.max_norm
    )
    config.write_text(text)
    subprocess.run(
        [
            sys.executable,
            str(ROOT / 'tools/train.py'),
            str(config),
            '--work-dir',
            str(work / args.name),
            '--resume',
            *(['--amp', args.amp] if args.amp else []),
        ],
        check=True,
    )


def read_log(folder: Path) -> list:
    """What a training logged, over all its starts: of a step logged twice, the last time."""
    rows = {}
    for file in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            rows['loss' in row, row['step']] = row
    return [rows[key] for key in sorted(rows)]


def draw(args) -> None:
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    metrics_of = dict(
        mask_rcnn=('coco/bbox_mAP_50', 'coco/segm_mAP_50', 'coco/bbox_mAP', 'coco/segm_mAP'),
        upernet=('mIoU', 'aAcc'),
    )
    names = [name for name in metrics_of if (args.data_root / name).is_dir()]
    figure, axes = plt.subplots(
        1, len(names), figsize=(5.5 * len(names), 3.6), squeeze=False, constrained_layout=True
    )
    for axis, name in zip(axes[0], names):
        metrics = metrics_of[name]
        rows = read_log(args.data_root / name)
        losses = [(row['step'], row['loss']) for row in rows if 'loss' in row]
        scores = [row for row in rows if metrics[0] in row]
        for metric in metrics:
            axis.plot(
                [row['step'] for row in scores],
                [row[metric] / (100 if name == 'upernet' else 1) for row in scores],
                label=metric.replace('coco/', ''),
            )
        axis.axhline(0.9, color='grey', linewidth=0.5)
        axis.set(title=name, xlabel='iteration', ylim=(0, 1))
        right = axis.twinx()
        right.plot(*zip(*losses), color='black', linewidth=0.6, alpha=0.6)
        right.set(ylabel='loss (black)', yscale='log')
        axis.legend(loc='center right', fontsize=8)
        last = {key: scores[-1][key] for key in metrics}
        seconds = sorted(row['time'] for row in rows if 'time' in row and 'loss' in row)
        print(
            f"{name}: step {scores[-1]['step']}, {last}, loss {losses[0][1]:.3g} -> "
            f"{losses[-1][1]:.3g}, {seconds[len(seconds) // 2]:.2f} s per iteration (median)"
        )
    figure.savefig(args.out, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('name', choices=['mask_rcnn', 'upernet', 'draw'])
    parser.add_argument(
        'data_root', type=Path, help='of COCO or of ADE20K; of draw: the work folder'
    )
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/real_input_learnt'))
    parser.add_argument('--out', type=Path, default=Path('benchmarks/real_input_learnt.png'))
    parser.add_argument('--iterations', type=int, default=1000)
    parser.add_argument('--interval', type=int, default=100, help='of validation and checkpoints')
    parser.add_argument('--size', type=int, default=240, help='shorter side of the images')
    parser.add_argument('--long-side', type=int, default=360, help='longer side, of mask_rcnn')
    parser.add_argument('--batch-size', type=int, default=2)
    parser.add_argument('--lr', type=float, default=2e-4)
    parser.add_argument('--max-norm', type=float, default=5.0)
    parser.add_argument('--amp', choices=['bfloat16'], help='where the processor is fast in it')
    args = parser.parse_args()
    draw(args) if args.name == 'draw' else train(args)


if __name__ == '__main__':
    main()
