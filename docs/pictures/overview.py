"""Draw overview.jpg: box AP of published models, and one query with its keys on a photo.

    python docs/pictures/overview.py

Left: Mask R-CNN, 1x schedule. AP of CrossFormer and PVT is that of docs/model_zoo.json (the paper),
of Swin and ResNet that of the metafiles which MMDetection installs; FLOPs are those of
docs/model_zoo.md, counted alike for all. Right: the photo of a cat that scikit-image installs, CC0
by its photographer, Stefan van der Walt; groups are those of crossformer_mm.grouping.
"""

import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import yaml
from PIL import Image

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Patch, Rectangle  # noqa: E402

from crossformer_mm.grouping import Rules, group_map, stage_rules  # noqa: E402

HERE = Path(__file__).resolve().parent
SCALE, STRIDE = 2, 8  # the photo twice as large; the map of the second stage
GROUP_SIZE, INTERVAL = 7, 4  # the default of that stage
QUERY = (31, 45)  # row, column: in the left eye, and in the middle of its neighbours
SHORT, LONG, FRAME = '#ffb000', '#39b8ff', '#ffffff'
# Colour, marker and place of the names; of each config of the model zoo the name, and where
# MMDetection has its result (None: docs/model_zoo.json has it).
FAMILIES = {
    'CrossFormer': ('#c1002b', 'o', -16, {'cf_s_1x': ('S', None), 'cf_b_1x': ('B', None)}),
    'CrossFormer++': ('#7a3fa0', 'o', 9, {'cfpp_s_1x': ('S', None), 'cfpp_b_1x': ('B', None)}),
    'Swin': ('#1b6ca8', 's', 9, {'swin_t_1x': ('T', 'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco')}),
    'PVT': ('#2a7d4c', 's', 9, {'pvt_m_1x': ('Medium', None)}),
    'ResNet': (
        '#666666',
        's',
        9,
        {
            'r50_1x': ('50', 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco'),
            'r101_1x': ('101', 'mask_rcnn/mask-rcnn_r101_fpn_1x_coco'),
        },
    ),
}


def of_mmdetection(name: str) -> float:
    """Return the box AP in MMDetection's metafile of a folder and a model."""
    import mmdet

    folder, model = name.split('/')
    metafile = Path(mmdet.__file__).parent / '.mim/configs' / folder / 'metafile.yml'
    models = yaml.safe_load(metafile.read_text(encoding='utf-8'))['Models']
    (found,) = [each for each in models if each['Name'] == model]
    return found['Results'][0]['Metrics']['box AP']


def published(config: str) -> float:
    """Return the box AP in docs/model_zoo.json."""
    record = json.loads((HERE.parent / 'model_zoo.json').read_text(encoding='utf-8'))
    return {**record['models'], **record['baselines']}[f'mask_rcnn/{config}']['results']['box AP']


def flops(config: str) -> float:
    """Return the 1e9 multiply-accumulates in docs/model_zoo.md; a model's own stand first."""
    zoo = (HERE.parent / 'model_zoo.md').read_text(encoding='utf-8')
    (row,) = re.findall(rf'^.*/configs/mask_rcnn/{config}\.py.*$', zoo, flags=re.MULTILINE)
    return float(re.findall(r'([\d.]+) G \|', row)[0])


def draw_results(axis) -> None:
    """Plot box AP against FLOPs."""
    for family, (colour, marker, above, models) in FAMILIES.items():
        points = []
        for config, (name, source) in models.items():
            ap = of_mmdetection(source) if source else published(config)
            points.append((flops(config), ap))
            axis.annotate(
                f'{family}-{name} {ap}',
                points[-1],
                (0, above),
                textcoords='offset points',
                ha='center',
                fontsize=9.5,
                color=colour,
                fontweight='bold' if marker == 'o' else 'normal',
            )
        axis.plot(*zip(*points), marker=marker, markersize=7, color=colour, linewidth=1)
    axis.set(xlim=(235, 440), ylim=(37, 49))
    axis.set_title('Mask R-CNN on COCO, 1x schedule, as reported', fontsize=12)
    axis.set_xlabel('FLOPs at 800x1280, 1e9 multiply-accumulates', fontsize=10)
    axis.set_ylabel('box AP', fontsize=10)
    axis.grid(alpha=0.3)


def members_of(rules: Rules, height: int, width: int) -> np.ndarray:
    """Return the positions (n, 2), row and column, of the query's group."""
    token = QUERY[0] * width + QUERY[1]
    (group,) = [
        group
        for table in group_map(height, width, *rules)
        for group in table.flatten(1).numpy()
        if token in group
    ]
    return np.stack(np.divmod(group, width), 1)


def draw_groups(axis) -> None:
    """Draw the query's groups on the photo."""
    from skimage.data import chelsea

    photo = Image.fromarray(chelsea())
    photo = photo.resize([SCALE * side for side in photo.size], Image.Resampling.BICUBIC)
    width, height = (-(-side // STRIDE) for side in photo.size)
    short, long = stage_rules(height, width, GROUP_SIZE, INTERVAL, 'interval')
    axis.imshow(photo)
    for rules, colour, alpha in ((long, LONG, 0.9), (short, SHORT, 0.7)):
        for row, column in members_of(rules, height, width):
            corner = (column * STRIDE, row * STRIDE)
            axis.add_patch(
                Rectangle(corner, STRIDE, STRIDE, facecolor=colour, alpha=alpha, linewidth=0)
            )
    row, column = (STRIDE * place for place in QUERY)
    axis.add_patch(
        Rectangle((column, row), STRIDE, STRIDE, fill=False, edgecolor=FRAME, linewidth=2)
    )
    axis.set(xlim=(0, photo.size[0]), ylim=(photo.size[1], 0), xticks=[], yticks=[])
    axis.text(
        0.995,
        0.012,
        'Photo: Stefan van der Walt, CC0',
        transform=axis.transAxes,
        ha='right',
        fontsize=7,
        color=FRAME,
    )
    axis.set_title('What the framed position attends to, in stage 2', fontsize=12)
    axis.legend(
        [Patch(color=SHORT), Patch(color=LONG)],
        [
            f'short distance: {GROUP_SIZE} x {GROUP_SIZE} neighbours',
            f'long distance: every {INTERVAL}th position of the map',
        ],
        loc='upper center',
        bbox_to_anchor=(0.5, -0.005),
        ncols=2,
        fontsize=10,
        frameon=False,
    )


def main(out: Path = HERE / 'overview.jpg') -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.9), width_ratios=(1, 1.28))
    # Not by the size of the letters, which is another in each version of Matplotlib.
    figure.subplots_adjust(left=0.045, right=0.995, bottom=0.115, top=0.93, wspace=0.035)
    draw_results(left)
    draw_groups(right)
    right.set_anchor('N')
    figure.savefig(out, dpi=110, pil_kwargs=dict(quality=90))


if __name__ == '__main__':
    main()
