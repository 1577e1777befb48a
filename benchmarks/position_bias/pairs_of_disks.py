"""Images in which the class of an object is how its two parts lie to each other, nothing else."""

import cv2
import numpy as np

DIRECTIONS = np.array([(1, 0), (-1, 0), (0, 1), (0, -1)])  # x, y from the first part to the second
COLOURS = ((60, 60, 220), (220, 120, 40))  # of the two parts, BGR


def scene(rng: np.random.Generator, size: int, unit: int):
    """One image (size, size, 3) uint8 with its objects, as of ``make_shapes.scene``.

    An object is a red and a blue disk; its class is the side of the red one on which the blue one
    lies: right, left, below or above. So a part seen alone tells nothing of the class.
    """
    image = np.clip(rng.uniform(90, 190, 3) + rng.normal(0, 10, (size, size, 3)), 0, 255)
    image = image.astype(np.uint8)
    taken = np.zeros((size, size), np.uint8)
    objects = []
    for _ in range(max(round(rng.integers(4, 7) * (size / unit) ** 2), 1)):
        kind = int(rng.integers(len(DIRECTIONS)))
        radius = rng.uniform(0.05, 0.075) * unit
        apart = DIRECTIONS[kind] * radius * rng.uniform(2.2, 2.8)
        for _ in range(30):
            margin = radius + abs(apart) / 2
            centre = rng.uniform(margin, size - margin)
            ends = np.round([(centre - apart / 2) * 16, (centre + apart / 2) * 16]).astype(int)
            disks = []
            for end in ends.tolist():
                disks.append(np.zeros((size, size), np.uint8))
                cv2.circle(disks[-1], end, round(radius * 16), 1, -1, shift=4)
            room = np.zeros((size, size), np.uint8)
            cv2.line(room, *ends.tolist(), 1, int(3.2 * radius), shift=4)
            if not (room & taken).any():
                break
        else:
            continue
        taken |= room
        for disk, colour in zip(disks, COLOURS):
            image[disk > 0] = colour
        objects.append((kind, (disks[0] | disks[1]) > 0))
    return image, objects
