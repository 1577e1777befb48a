"""Image files: which ones a user asks for, reading and writing them, and atomic writes."""

import glob
import os
from collections import Counter
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Tuple

import cv2
import numpy as np

from .errors import UserError, said

# Suffixes of files that OpenCV reads.
IMAGES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')
VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg', '.wmv')


def find_files(patterns: Sequence[str], out: Path, videos: bool = False) -> List[Path]:
    """Find the files of arguments, each once; those of a folder are sorted.

    Args:
        patterns: files, folders and globs.
        out: folder of results; files in it are not taken from other folders.
        videos: also take videos from folders.

    Raises:
        UserError: an argument matches nothing.
    """
    suffixes = IMAGES + VIDEOS if videos else IMAGES

    def is_input(path: Path) -> bool:
        return (
            path.is_file()
            and path.suffix.lower() in suffixes
            and out.absolute() not in path.absolute().parents
        )

    found = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            inside = sorted(filter(is_input, path.rglob('*')))
            kinds = 'images or videos' if videos else 'images'
            message = f"folder '{pattern}' holds no {kinds}: looked for {', '.join(suffixes)}."
        else:
            names = [pattern] if path.is_file() else sorted(glob.glob(pattern, recursive=True))
            inside = [Path(name) for name in names if os.path.isfile(name)]
            message = f"images: '{pattern}' is no file, no folder and matches nothing."
        if not inside:
            raise UserError(message)
        found += inside
    return list({file.absolute(): file for file in found}.values())


def unique_names(paths: Sequence[Path]) -> List[Tuple[str, str]]:
    """Name files by their paths below the folder that all of them share.

    Args:
        paths: of the files, absolute and no two alike.

    Returns:
        list: for each file this path, and the same without a suffix; with it where another file
        would have the same name.
    """
    folder = os.path.commonpath([path.parent for path in paths]) if paths else ''
    depth = len(Path(folder).parts)
    names = [Path(*path.parts[depth:]) for path in paths]
    taken = Counter([*names, *(name.with_suffix('') for name in names if name.suffix)])
    return [
        (
            name.as_posix(),
            (name if taken[name.with_suffix('')] > 1 else name.with_suffix('')).as_posix(),
        )
        for name in names
    ]


def read_image(path: Path, decode: Callable) -> Tuple[Optional[np.ndarray], str]:
    """Read an image file.

    Args:
        path: of the file.
        decode: function of its bytes that returns None if they are no image.

    Returns:
        tuple: the image or None, and the reason why there is none.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        return None, f'it could not be opened: {error.strerror or error}'
    image = None if is_cut_short(data) else decode(data)
    return image, '' if image is not None else 'it is cut short or no image that OpenCV reads'


def is_cut_short(data: bytes) -> bool:
    """Check for a JPEG that ends before its end marker.

    OpenCV before 4.12 reads it as an image that is grey where data ends; later, it returns None.
    """
    if not data.startswith(b'\xff\xd8'):
        return False
    place = 2
    # A preview in the head has an end marker of its own: skip segments up to the first scan.
    while data[place : place + 1] == b'\xff' and data[place + 1 : place + 2] != b'\xda':
        if data[place + 1 : place + 2] == b'\xff':  # fill byte
            place += 1
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], 'big')
    return b'\xff\xd9' not in data[place:]


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file atomically, and make the folders that lead to it.

    Raises:
        OSError: it cannot be written.
    """
    part = path.with_name(f'.{os.getpid()}')  # no longer than the name of any file
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """:func:`atomic_write` for a file that the user named.

    Raises:
        UserError: it cannot be written.
    """
    try:
        atomic_write(path, data)
    except OSError as error:
        raise UserError(f"'{path}' could not be written: {error}.") from None


def write_image(path: Path, image: np.ndarray) -> str:
    """Write an image file; return the reason if that is not possible, or ''."""
    try:
        encoded, data = cv2.imencode(path.suffix, image)
        if not encoded:
            raise cv2.error(f'OpenCV cannot encode {image.shape[1]} x {image.shape[0]} pixels')
        atomic_write(path, data.tobytes())
    except (OSError, cv2.error) as error:
        return f"'{path}' could not be written: {said(error)}"
    return ''


def write_labels(path: Path, labels: np.ndarray) -> str:
    """Write a label map (H, W) as PNG; return the reason if that is not possible, or ''."""
    return write_image(path, labels.astype(np.uint8 if labels.max() < 256 else np.uint16))
