"""What the classes of a model are called, and drawn in."""

from typing import Mapping

import numpy as np


def recorded(checkpoint: Mapping) -> dict:
    """Return what a checkpoint's training recorded of its data set: ``classes``, ``palette``, or
    nothing."""
    meta = checkpoint.get('meta')
    meta = meta if isinstance(meta, dict) else {}
    known = meta.get('dataset_meta') or {
        key: meta[key] for key in ('CLASSES', 'PALETTE') if meta.get(key)
    }
    return {key.lower(): value for key, value in known.items() if value}


def drop_unnamed(sample, count: int) -> None:
    """Drop detections whose label is not below ``count``, the number of classes with a name."""
    instances = getattr(sample, 'pred_instances', None)
    if instances is not None and 'labels' in instances and (instances.labels >= count).any():
        sample.pred_instances = instances[instances.labels < count]


def names_and_colours(dataset_meta: Mapping, checkpoint: Mapping) -> dict:
    """Classes and palette: as the checkpoint says, else as the data set does.

    Args:
        dataset_meta (Mapping): ``metainfo`` of a data set.
        checkpoint (Mapping): with ``meta``, if it says anything; that of earlier releases of
            OpenMMLab has its own names.

    Returns:
        dict: ``classes`` and ``palette``, a colour for each, made up if not as many are known.
    """
    found = {**dataset_meta, **recorded(checkpoint)}
    classes, palette = list(found.get('classes') or ()), found.get('palette')
    if not isinstance(palette, (list, tuple)) or len(palette) < len(classes):
        palette = np.random.default_rng(0).integers(256, size=(len(classes), 3))
    # As many as there are classes: MMSegmentation draws with no others.
    colours = [tuple(map(int, colour)) for colour in palette[: len(classes)]]
    return dict(classes=classes, palette=colours)
