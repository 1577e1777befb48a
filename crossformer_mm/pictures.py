"""Pictures of predictions: names that no two images share, and images of any type in colour."""

from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import cv2
import numpy as np
from mmcv.transforms import LoadImageFromFile

from .errors import said
from .files import atomic_write


def unique_names(paths: Sequence[Path]) -> List[Tuple[str, str]]:
    """Name files by their paths below the folder that all of them share.

    Args:
        paths: of the files, absolute and no two alike.

    Returns:
        list: for each file this path, and the same without a suffix; with it where another file
        would have the same name.
    """
    depth = min(shared_depth(path.parts, paths[0].parts) for path in paths) if paths else 0
    names = [Path(*path.parts[depth:]) for path in paths]
    taken = Counter([*names, *(name.with_suffix('') for name in names if name.suffix)])
    return [
        (
            name.as_posix(),
            (name if taken[name.with_suffix('')] > 1 else name.with_suffix('')).as_posix(),
        )
        for name in names
    ]


def shared_depth(one: Sequence[str], other: Sequence[str]) -> int:
    """Count the folders that two paths have in common."""
    pairs = zip(one[:-1], other[:-1])
    return next(
        (depth for depth, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)) - 1
    )


def names_in(dataset) -> Dict[str, Tuple[str, str]]:
    """Name the images of a data set, by their ``img_path``, as :func:`unique_names` does."""
    infos = (dataset.get_data_info(index) for index in range(len(dataset)))
    paths = list(dict.fromkeys(info['img_path'] for info in infos))
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


def write_image(path: Path, image: np.ndarray) -> str:
    """Write an image file; the reason if that is not possible, or nothing."""
    try:
        encoded, data = cv2.imencode(path.suffix, image)
        if not encoded:
            raise cv2.error(f'OpenCV cannot encode {image.shape[1]} x {image.shape[0]} pixels')
        atomic_write(path, data.tobytes())
    except (OSError, cv2.error) as error:
        return f"'{path}' could not be written: {said(error)}"
    return ''


def write_labels(path: Path, labels: np.ndarray) -> str:
    """Write a label map (H, W) as PNG; the reason if that is not possible, or nothing."""
    return write_image(path, labels.astype(np.uint8 if labels.max() < 256 else np.uint16))
