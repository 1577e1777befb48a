"""Names and colours of a model's classes."""

from typing import Mapping

import numpy as np


def recorded(checkpoint: Mapping) -> dict:
    """Return ``classes`` and ``palette`` of the training data, as far as a checkpoint has them."""
    meta = checkpoint.get('meta')
    meta = meta if isinstance(meta, dict) else {}
    known = meta.get('dataset_meta') or meta
    return {
        name.lower(): known[name]
        for name in ('CLASSES', 'PALETTE', 'classes', 'palette')
        if known.get(name) is not None and len(known[name])
    }


def drop_unnamed(sample, count: int) -> None:
    """Drop detections whose label is not below ``count``, the number of classes with a name."""
    instances = getattr(sample, 'pred_instances', None)
    if instances is not None and 'labels' in instances and (instances.labels >= count).any():
        sample.pred_instances = instances[instances.labels < count]


def names_and_colours(dataset_meta: Mapping, checkpoint: Mapping) -> dict:
    """Return classes and palette from the checkpoint, or else from the data set.

    Args:
        dataset_meta (Mapping): ``metainfo`` of a data set.
        checkpoint (Mapping): its ``meta`` is read, if there is one, also with the keys of earlier
            releases of OpenMMLab.

    Returns:
        dict: ``classes`` and ``palette``, a colour for each; random if too few are known.
    """
    found = {**dataset_meta, **recorded(checkpoint)}
    classes, palette = list(found.get('classes') or ()), found.get('palette')
    if not isinstance(palette, (list, tuple)) or len(palette) < len(classes):
        palette = np.random.default_rng(0).integers(256, size=(len(classes), 3))
    # MMSegmentation needs exactly one colour for each class.
    colours = [tuple(map(int, colour)) for colour in palette[: len(classes)]]
    return dict(classes=classes, palette=colours)
