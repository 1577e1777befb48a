"""Images of data sets, of any type, as pictures that can be drawn on."""

from pathlib import Path
from typing import Any, Dict, Tuple

import cv2
import numpy as np
from mmcv.transforms import LoadImageFromFile

from .errors import UserError
from .without_torch.files import unique_names


def names_in(dataset) -> Dict[str, Tuple[str, str]]:
    """Name the images of a data set, by their ``img_path``, as :func:`unique_names` does. Raise a
    UserError if the data set does not name a file for each."""
    infos = (dataset.get_data_info(index) for index in range(len(dataset)))
    paths = list(dict.fromkeys(info.get('img_path') for info in infos))
    if None in paths:
        raise UserError('Predictions are drawn on image files, and the data set names none.')
    return dict(zip(paths, unique_names([Path(path).absolute() for path in paths])))


def picture_in(dataset, path: str) -> np.ndarray:
    """Load an image as the first step of a data set's pipeline does, (H, W, 3) uint8, RGB."""
    while not hasattr(dataset, 'pipeline') and hasattr(dataset, 'datasets'):
        dataset = dataset.datasets[0]
    steps: Any = getattr(getattr(dataset, 'pipeline', None), 'transforms', None)
    load = steps[0] if steps else LoadImageFromFile()
    return np.ascontiguousarray(as_picture(load(dict(img_path=path))['img'])[..., ::-1])


def as_picture(pixels: np.ndarray) -> np.ndarray:
    """Convert an image as a pipeline loads it to one that can be drawn on.

    Args:
        pixels: (H, W) or (H, W, C) of any type. Of 16 bits the upper eight are shown; other values
            that reach out of 0 to 255, or not beyond 1, are stretched to 0 to 255.

    Returns:
        np.ndarray: (H, W, 3) uint8, blue first: the first three channels, or the first one as grey.
    """
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    pixels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, axis=2)
    if pixels.dtype == np.uint16:
        pixels = pixels >> 8
    elif pixels.dtype != np.uint8:
        pixels = np.nan_to_num(pixels.astype(np.float32))
        if pixels.min() < 0 or pixels.max() > 255 or pixels.max() <= 1:
            pixels = cv2.normalize(pixels, None, 0, 255, cv2.NORM_MINMAX)
    return np.ascontiguousarray(pixels, np.uint8)
