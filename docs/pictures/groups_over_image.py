"""Draw groups_over_image.png: with which positions of an image one of them attends, by each rule.

python docs/pictures/groups_over_image.py
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from crossformer_mm.grouping import group_map, stage_rules  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / 'tools'))
from make_shapes import scene  # noqa: E402

SIZE, STRIDE = 448, 8  # of the second stage: a map of 56 x 56
GROUP_SIZE, INTERVAL = 7, 4  # the default of that stage
SEED, PLACE = 22, (26, 30)  # a position on an object


def members_of(rules, side: int) -> np.ndarray:
    """(H, W) which positions are in the group of PLACE."""
    wanted = PLACE[0] * side + PLACE[1]
    for table in group_map(side, side, *rules):
        for group in table.flatten(1).numpy():
            if wanted in group:
                members = np.zeros(side * side, bool)
                members[group] = True
                return members.reshape(side, side)
    raise AssertionError('every position is in a group')


def main(out: Path = HERE / 'groups_over_image.png') -> None:
    image, _ = scene(np.random.default_rng(SEED), SIZE)
    image = image[..., ::-1]  # OpenCV's order of colours
    side = SIZE // STRIDE
    short, interval = stage_rules(side, side, GROUP_SIZE, INTERVAL, 'interval')
    _, block = stage_rules(side, side, GROUP_SIZE, INTERVAL, 'block')
    panels = [
        ('Short distance', '7 x 7 neighbours', short),
        ("Long distance, lda='interval'", 'every 4th position of the map', interval),
        ("Long distance, lda='block'", 'every 4th position of a tile, 7 x 7', block),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.55))
    # Not by the size of the letters, which is another in each version of Matplotlib.
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.07, top=0.92, wspace=0.02)
    for axis, (title, below, rules) in zip(axes, panels):
        members = members_of(rules, side).repeat(STRIDE, 0).repeat(STRIDE, 1)[..., None]
        faded = 0.45 * image + 0.55 * 255
        shown = np.where(members, 0.25 * image + 0.75 * np.array([255, 176, 0]), faded)
        axis.imshow(shown.astype(np.uint8))
        for rule, line in zip(rules, (axis.axhline, axis.axvline)):
            for edge in range(0, side, rule.size * rule.interval):
                line(edge * STRIDE - 0.5, color='#445', linewidth=0.5, alpha=0.5)
        corner = [place * STRIDE - 0.5 for place in PLACE[::-1]]
        axis.add_patch(Rectangle(corner, STRIDE, STRIDE, fill=False, color='#c1002b', linewidth=2))
        axis.set_title(title, fontsize=13)
        axis.set_xlabel(below, fontsize=11)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set(xlim=(-0.5, SIZE - 0.5), ylim=(SIZE - 0.5, -0.5))
    figure.savefig(out, dpi=100)


if __name__ == '__main__':
    main()
