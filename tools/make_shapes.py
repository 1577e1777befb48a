"""Generate a small data set of shapes on clutter, in COCO's and in ADE20K's format.

    python tools/make_shapes.py data/shapes

Both hold the same images, instances and label maps: ``DIR/coco`` has the layout of COCO 2017,
``DIR/ade`` that of ADEChallengeData2016. The same arguments give the same files.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Optional

import cv2
import numpy as np
from pycocotools import mask as rle

from crossformer_mm.cli import run
from crossformer_mm.errors import UserError

CLASSES = ('disk', 'square', 'triangle', 'star')
MIN_VISIBLE = 0.4  # shapes of which less is visible are no objects


def polygon(kind: str, radius: float, angle: float) -> np.ndarray:
    """Return the corners (N, 2) of a shape around the origin, turned by ``angle`` in radians."""
    corners = {'disk': 48, 'square': 4, 'triangle': 3, 'star': 10}[kind]
    angles = angle + np.arange(corners) * 2 * np.pi / corners
    radii = np.where(np.arange(corners) % 2, 0.45, 1.0) if kind == 'star' else np.ones(corners)
    return radius * radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def surface(kind: str, size: int, centre: np.ndarray, angle: float) -> np.ndarray:
    """Return the mask (size, size) of a shape's darker colour: a pattern for each class."""
    rows, columns = np.mgrid[:size, :size]
    x, y = columns - centre[0], rows - centre[1]
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    pattern = {
        'disk': np.zeros_like(x),
        'square': across // 4,
        'triangle': along // 5 + across // 5,
        'star': np.hypot(x, y) // 4,
    }[kind]
    return pattern % 2 == 1


def clutter(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a background (size, size, 3) of pale, noisy colours with bright lines and dots."""
    colours = rng.uniform(90, 190, (4, 4, 1)) + rng.uniform(-25, 25, (4, 4, 3))
    image = cv2.resize(colours, (size, size), interpolation=cv2.INTER_CUBIC)
    image = np.clip(image + rng.normal(0, 10, image.shape), 0, 255).astype(np.uint8)
    for _ in range(rng.integers(4, 10)):
        start, end = rng.integers(0, size, (2, 2)).tolist()
        cv2.line(image, start, end, bright_colour(rng), int(rng.integers(1, 3)), cv2.LINE_AA)
    for _ in range(rng.integers(10, 30)):
        centre = rng.integers(0, size, 2).tolist()
        cv2.circle(image, centre, int(rng.integers(1, 4)), bright_colour(rng), -1, cv2.LINE_AA)
    return image


def bright_colour(rng: np.random.Generator, kind: Optional[int] = None) -> list:
    """Draw a saturated colour in BGR, of any hue or of one that is likely for a class."""
    hue = rng.integers(180) if kind is None else rng.normal(180 * kind / len(CLASSES), 15) % 180
    hsv = np.array([[[hue, rng.integers(150, 256), rng.integers(150, 256)]]])
    return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2BGR)[0, 0].tolist()


def scene(rng: np.random.Generator, size: int):
    """Draw one image, (size, size, 3) uint8. Return it with a list of (class index, mask (size,
    size) bool) of the visible objects, whose masks do not overlap."""
    image = clutter(rng, size)
    drawn = []
    for _ in range(rng.integers(3, 7)):
        kind = int(rng.integers(len(CLASSES)))
        radius = rng.uniform(0.1, 0.22) * size
        centre = rng.uniform(radius, size - radius, 2)
        angle = rng.uniform(-np.pi, np.pi)
        corners = polygon(CLASSES[kind], radius, angle) + centre
        corners = np.round(corners * 16).astype(np.int32)  # 4 fractional bits
        full = np.zeros((size, size), np.uint8)
        cv2.fillPoly(full, [corners], 1, shift=4)
        full = full.astype(bool)
        light = np.array(bright_colour(rng, kind))
        image[full] = light
        image[full & surface(CLASSES[kind], size, centre, angle)] = light // 2
        drawn = [(k, visible & ~full, area) for k, visible, area in drawn]
        drawn.append((kind, full, full.sum()))
    return image, [
        (k, visible) for k, visible, area in drawn if visible.sum() >= MIN_VISIBLE * area
    ]


def write_image(path: Path, image: np.ndarray) -> None:
    """Write a file; unlike ``cv2.imwrite``, raise an OSError if the disk is full."""
    path.write_bytes(cv2.imencode(path.suffix, image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes())


def write_split(folder: Path, split: str, count: int, size: int, seed: int) -> None:
    """Write images of :func:`scene` in both layouts."""
    ade_split = {'train': 'training', 'val': 'validation'}[split]
    coco_images, coco_json = folder / f'coco/{split}2017', folder / 'coco/annotations'
    ade_images = folder / 'ade/images' / ade_split
    ade_labels = folder / 'ade/annotations' / ade_split
    for path in (coco_images, coco_json, ade_images, ade_labels):
        path.mkdir(parents=True, exist_ok=True)

    rng = np.random.default_rng([seed, split == 'val'])
    images, annotations = [], []
    for index in range(1, count + 1):
        image, objects = scene(rng, size)
        name = f'{index:012d}.png'
        write_image(coco_images / name, image)
        # ADE20K's label maps count from 1 and leave 0 for "other", never trained.
        write_image((ade_images / name).with_suffix('.jpg'), image)
        labels = np.ones((size, size), np.uint8)
        images.append(dict(id=index, file_name=name, height=size, width=size))
        for kind, visible in objects:
            labels[visible] = kind + 2
            code = rle.encode(np.asfortranarray(visible.astype(np.uint8)))
            entry = dict(id=len(annotations) + 1, image_id=index, category_id=kind + 1, iscrowd=0)
            entry.update(area=float(visible.sum()), bbox=rle.toBbox(code).tolist())
            entry['segmentation'] = dict(size=code['size'], counts=code['counts'].decode())
            annotations.append(entry)
        write_image(ade_labels / name, labels)
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
    content = dict(images=images, annotations=annotations, categories=categories)
    (coco_json / f'instances_{split}2017.json').write_text(json.dumps(content))
    print(f"wrote {count} {split} images with {len(annotations)} objects to '{folder}'")


def parse_args():
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('out', type=Path, help='folder to write; reused if the same set is there')
    parser.add_argument('--train', type=int, default=400, help='training images')
    parser.add_argument('--val', type=int, default=100, help='held-out images')
    parser.add_argument('--size', type=int, default=160, help='side of the images in pixels')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    if min(args.train, args.val) < 1 or args.size < 32 or args.seed < 0:
        parser.error(
            '--train and --val must be at least 1, --size at least 32 and --seed at least 0'
        )
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"out: '{args.out}' is a file; name a folder")
    if args.out.exists() and any(args.out.iterdir()) and not (args.out / 'coco').is_dir():
        parser.error(f"out: '{args.out}' holds other files; name a new or empty folder")
    return args


def main():
    args = parse_args()
    made_with = dict(train=args.train, val=args.val, size=args.size, seed=args.seed)
    stamp = args.out / 'made_with.json'  # written last: a set without it is incomplete
    if stamp.is_file() and stamp.read_text() == json.dumps(made_with):
        print(f"'{args.out}' is there already")
        return
    try:
        stamp.unlink(missing_ok=True)
        for part in ('coco', 'ade'):
            shutil.rmtree(args.out / part, ignore_errors=True)
        for split in ('train', 'val'):
            write_split(args.out, split, made_with[split], args.size, args.seed)
        stamp.write_text(json.dumps(made_with))
    except OSError as error:
        raise UserError(f"out: '{args.out}' could not be written: {error.strerror}.") from None


if __name__ == '__main__':
    run(main)
