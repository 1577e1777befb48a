"""Files of predictions that show them: pictures, videos and label maps."""

import math
import os
from pathlib import Path
from typing import Callable, Optional, Tuple

import cv2
import numpy as np

from ..errors import said
from ..without_torch.files import write_image, write_labels
from ..without_torch.results import label_path, picture_path
from .sources import Image, Source


def mp4_fps(fps: float) -> float:
    """Return the nearest frame rate that an MP4 file can hold, or 25 for an invalid one.

    The file stores a fraction of integers up to 65535; OpenCV keeps up to three decimals.
    """
    if not 0 < fps < math.inf:
        return 25.0
    fps = min(max(fps, 0.002), 65535.0)
    return next(round(fps * base) / base for base in (1000, 100, 10, 1) if fps * base <= 65535)


class Video:
    """Video that is written frame by frame, and atomically. Raises an OSError if it cannot be
    written."""

    def __init__(self, path: Path, fps: float, size: Tuple[int, int]):
        self.path, self.size = path, size
        path.parent.mkdir(parents=True, exist_ok=True)
        self.part = path.with_name(f'.{os.getpid()}.mp4')
        fourcc = cv2.VideoWriter_fourcc(*'mp4v')
        self.writer = cv2.VideoWriter(str(self.part), fourcc, fps, size)
        if not self.writer.isOpened():
            self.part.unlink(missing_ok=True)
            raise OSError(f'OpenCV writes no MP4 of {size[0]} x {size[1]} pixels at {fps:g} fps')

    def add(self, frame: np.ndarray) -> None:
        # OpenCV silently drops frames of another size.
        self.writer.write(
            frame if frame.shape[1::-1] == self.size else cv2.resize(frame, self.size)
        )

    def finish(self, keep: bool) -> None:
        self.writer.release()
        if keep:
            self.part.replace(self.path)
        self.part.unlink(missing_ok=True)


class Pictures:
    """Draws predictions by an inferencer's ``visualize``, with its options, and writes them, images
    as JPEG and videos as MP4. As a context it keeps the last video at the end, or removes it after
    an error."""

    def __init__(self, draw: Callable, out: Path):
        self.draw, self.out = draw, out
        self.source: Optional[Source] = None  # of the video in the making
        self.video: Optional[Video] = None  # None also if it cannot be written

    def add(self, image: Image, sample) -> str:
        """Draw and write a prediction; return the reason if that is not possible, or ''."""
        if image.source is self.source and self.video is None:
            return ''  # the video cannot be written
        try:
            (rgb,) = self.draw([np.ascontiguousarray(image.pixels[..., ::-1])], [sample])
        except Exception as error:
            return f'its picture could not be drawn: {said(error)}'
        drawn = np.ascontiguousarray(rgb[..., ::-1])
        path = picture_path(self.out, image.source.stem, image.source.fps is not None)
        if image.source.fps is None:
            return write_image(path, drawn)
        try:
            if image.source is not self.source:
                self.finish_video()
                self.source = image.source
                self.video = Video(path, mp4_fps(image.source.fps), drawn.shape[1::-1])
            self.video.add(drawn)  # type: ignore[union-attr]
        except OSError as error:
            return f"'{path}' could not be written: {said(error)}"
        return ''

    def finish_video(self, keep: bool = True) -> None:
        video, self.video = self.video, None
        if video:
            video.finish(keep)

    def __enter__(self) -> 'Pictures':
        return self

    def __exit__(self, kind, *_) -> None:
        self.finish_video(keep=kind is None)


def write_label_map(image: Image, sample, first: int, out: Path) -> str:
    """Write a segmentor's result as PNG, with the values of the data set's own label maps.

    The first class has the value ``first``: 1 in data sets that leave 0 for "other". The image's
    entry gets the file's name. Return the reason if it cannot be written, or ''.
    """
    labels = sample.pred_sem_seg.data[0].numpy() + first
    stem = image.source.stem
    if image.source.fps is not None:
        stem = f'{stem}/{image.entry["frame"]:06d}'
    path = label_path(out, stem)
    reason = write_labels(path, labels)
    if not reason:
        image.entry['label_map'] = path.relative_to(out).as_posix()
    return reason
