"""Images in which only its place tells the class of an object: the side of a beacon it is on."""
import sys
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'tools'))
from make_shapes import CLASSES, MIN_VISIBLE, bright_colour, polygon, surface  # noqa: E402


def sides(offsets: np.ndarray) -> np.ndarray:
    """Offsets (..., 2) as x, y to 0 left, 1 right, 2 above, 3 below: the longer part decides."""
    x, y = offsets[..., 0], offsets[..., 1]
    return np.where(abs(x) > abs(y), (x > 0).astype(int), 2 + (y > 0))


def scene(rng: np.random.Generator, size: int, unit: int):
    """One image (size, size, 3) uint8 with its objects, as of ``make_shapes.scene``.

    Shapes, surfaces and colours are the same but tell nothing. In each cell of ``unit`` pixels is
    one beacon, a white ring with a black rim near its middle; the class of an object is the side
    of the nearest beacon on which its centre lies. An image smaller than a cell is a cell.
    """
    image = np.clip(rng.uniform(90, 190, 3) + rng.normal(0, 10, (size, size, 3)), 0, 255)
    image = image.astype(np.uint8)
    cells = max(size // unit, 1)
    corners = np.stack(np.meshgrid(*[np.arange(cells) * size / cells] * 2), -1).reshape(-1, 2)
    beacons = corners + size / cells * rng.uniform(0.35, 0.65, corners.shape)
    drawn = []
    for _ in range(max(round(rng.integers(3, 7) * (size / unit)**2), 1)):
        look = CLASSES[rng.integers(len(CLASSES))]
        radius = rng.uniform(0.1, 0.16) * unit
        for _ in range(100):  # not on a beacon, and not where a side is hard to tell
            centre = rng.uniform(radius, size - radius, 2)
            offset = min(centre - beacons, key=lambda d: (d**2).sum())
            if np.hypot(*offset) > radius + 0.07 * unit and abs(np.subtract(*abs(offset))) > 2:
                break
        else:
            continue
        angle = rng.uniform(-np.pi, np.pi)
        shape = np.round((polygon(look, radius, angle) + centre) * 16).astype(np.int32)
        full = np.zeros((size, size), np.uint8)
        cv2.fillPoly(full, [shape], 1, shift=4)
        full = full.astype(bool)
        light = np.array(bright_colour(rng))
        image[full] = light
        image[full & surface(look, size, centre, angle)] = light // 2
        drawn = [(k, visible & ~full, area) for k, visible, area in drawn]
        drawn.append((int(sides(offset)), full, full.sum()))
    for beacon in np.round(beacons * 16).astype(int).tolist():
        for radius, colour, width in ((0.06, 0, 3), (0.04, 255, -1)):
            cv2.circle(image, beacon, round(radius * unit * 16), (colour,) * 3, width, cv2.LINE_AA,
                       shift=4)
    return image, [(k, visible) for k, visible, area in drawn
                   if visible.sum() >= MIN_VISIBLE * area]
