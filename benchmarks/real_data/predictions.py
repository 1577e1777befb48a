"""A picture of what detectors find on held-out images, next to the annotations."""

import json
from pathlib import Path
from typing import Dict, List

from pycocotools.coco import COCO

COLOURS = ('#e6194b', '#4363d8', '#111111')  # of the classes
LOWEST_SCORE = 0.4


def outline(axis, coco: COCO, found: dict) -> None:
    """Draw an object, by the outline of its mask if it has one, or by its box."""
    from matplotlib.patches import Rectangle

    colour = COLOURS[(found['category_id'] - 1) % len(COLOURS)]
    if 'segmentation' in found:
        axis.contour(coco.annToMask(found), [0.5], colors=colour, linewidths=0.8)
    else:
        left, top, *sides = found['bbox']
        box = Rectangle((left, top), *sides, fill=False, edgecolor=colour, linewidth=1.2)
        axis.add_patch(box)


def draw_predictions(
    ann_file: Path, images: List[Path], results: Dict[str, Path], file: Path
) -> None:
    """Draw a row for each image: its annotations, then the objects that each model finds.

    Args:
        ann_file: COCO annotations.
        images: files that these annotations list.
        results: COCO results of each model.
        file: the picture to write.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import image, pyplot

    coco = COCO(str(ann_file))
    ids = {one['file_name']: one['id'] for one in coco.imgs.values()}
    columns = {'annotations': [*coco.anns.values()]}
    for model, found in results.items():
        objects = json.loads(found.read_text())
        columns[model] = [one for one in objects if one['score'] >= LOWEST_SCORE]
    options = dict(squeeze=False, layout='constrained')
    size = 4 * len(columns), 3 * len(images)
    figure, axes = pyplot.subplots(len(images), len(columns), figsize=size, **options)
    for path, row in zip(images, axes):
        for axis, objects in zip(row, columns.values()):
            axis.imshow(image.imread(path))
            for one in objects:
                if one['image_id'] == ids[path.name]:
                    outline(axis, coco, one)
            axis.set_axis_off()
    for axis, name in zip(axes[0], columns):
        axis.set_title(name)
    figure.savefig(file, dpi=60)
    pyplot.close(figure)
