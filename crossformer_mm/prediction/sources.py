"""Images and videos to predict on: names, loading, and batches."""

import sys
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence

import cv2
import mmcv
import numpy as np
from mmengine.dataset import Compose
from mmengine.utils import ProgressBar

from ..errors import UserError
from ..pictures import as_picture
from ..without_torch.files import VIDEOS, is_cut_short, unique_names
from ..without_torch.results import label_path, picture_path


class Source(NamedTuple):
    """File to predict on."""

    path: Path
    name: str  # its path below the folder that all files share; for images.json
    stem: str  # unique name, without a suffix, of the files that are written for it
    frames: int  # number of images in it, by its header, but at least 1
    fps: Optional[float]  # frames per second of a video, by its header; None: it is an image


class Image(NamedTuple):
    """One image, or frame of a video, ready for the model."""

    source: Source
    entry: dict  # what images.json says of it
    pixels: np.ndarray  # (H, W, 3) uint8, BGR, to be drawn on
    inputs: dict  # what the test pipeline made of it


def sources_of(files: Sequence[Path], out: Path) -> List[Source]:
    """Name files and read the headers of videos, or raise a UserError if a file would be
    overwritten."""
    named = unique_names([file.absolute() for file in files])
    folders = {parent.as_posix() for name, _ in named for parent in Path(name).parents}
    sources = []
    for file, (name, stem) in zip(files, named):
        frames, fps = 1, None
        if file.suffix.lower() in VIDEOS:
            video = mmcv.VideoReader(str(file))
            frames, fps = max(video.frame_cnt, 1), video.fps
            if stem in folders:  # label maps of a video get a folder of this name
                stem = name
        sources.append(Source(file, name, stem, frames, fps))
        for written in (picture_path(out, stem, fps is not None), label_path(out, stem)):
            if written.absolute() == file.absolute():
                raise UserError(
                    f"--out: what is predicted of '{file}' would replace it; name another folder."
                )
    return sources


class Pipeline:
    """Inferencer's pipeline in two parts: errors of the first, loading, are an image's fault."""

    def __init__(self, pipeline: Compose, grey: bool):
        self.load, *steps = pipeline.transforms
        self.steps = Compose(steps)
        self.grey = grey  # images are loaded as grey ones

    def load_frame(self, frame: np.ndarray) -> dict:
        """Load a frame of a video, (H, W, 3) BGR, as an image file is loaded."""
        return self.load(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) if self.grey else frame)

    def prepare(self, source: Source, entry: dict, loaded: dict) -> Image:
        """Prepare a loaded image for the model; name the image if that fails."""
        pixels = loaded['img']
        entry.update(height=pixels.shape[0], width=pixels.shape[1])
        try:
            inputs = self.steps({**loaded, 'img_id': entry['id']})
        except Exception:
            print(
                f"'{entry['file_name']}' can be read, but the config's test pipeline could not "
                'prepare it:',
                file=sys.stderr,
            )
            raise
        return Image(source, entry, as_picture(pixels), inputs)


def images_of(
    sources: Sequence[Source],
    numbers: Optional[Sequence[int]],
    pipeline: Pipeline,
    channels: int,
    progress: ProgressBar,
    skip: Callable[[str, str], None],
) -> Iterator[Image]:
    """Yield the images that can be read and have the model's number of channels.

    Args:
        sources: the files.
        numbers: an id for each file, none of which is a video; None: images are counted.
        pipeline: loads and prepares them.
        channels: of the model.
        progress: is updated for images that are not yielded.
        skip: is called with the name of each other file, and the reason.
    """
    next_id = 1

    def misfit(image: Image) -> str:
        given = image.inputs['inputs'].shape[0]
        if given == channels:
            return ''
        return (
            f'it has {given} channels as the test pipeline loads it, and the model takes {channels}'
        )

    for index, source in enumerate(sources):
        read, reason = 0, ''
        if source.fps is None:
            try:
                if is_cut_short(source.path.read_bytes()):
                    raise EOFError
                loaded = pipeline.load(str(source.path))
            except OSError as error:
                reason = f'it could not be opened: {error.strerror or error}'
            except Exception:  # broken bytes fail in any way in a decoder
                reason = 'it is cut short or no image that OpenCV reads'
            else:
                number = next_id if numbers is None else numbers[index]
                image = pipeline.prepare(source, dict(id=number, file_name=source.name), loaded)
                reason = misfit(image)
                if not reason:
                    yield image
        else:
            for frame in mmcv.VideoReader(str(source.path)):
                name = f'{source.name}#{read + 1}'
                entry = dict(id=next_id + read, file_name=name, frame=read + 1)
                image = pipeline.prepare(source, entry, pipeline.load_frame(frame))
                reason = misfit(image)
                if reason:
                    break
                yield image
                read += 1
            if not read:
                reason = reason or 'it is no video that OpenCV reads'
            elif read < 0.98 * source.frames:  # by the header, often an estimate from the duration
                reason = reason or f'its frames from {read + 1} on could not be read'
        if reason:
            skip(source.name, reason)
            progress.update(source.frames - read)
        next_id += max(source.frames, read)


def batches(images: Iterator[Image], size: int) -> Iterator[List[Image]]:
    """Group consecutive images of one prepared shape, at most ``size`` at a time.

    Images of different shapes would be padded to a common one, which changes what a
    detector finds in them; segmentors refuse it.
    """
    batch: List[Image] = []
    for image in images:
        if batch and (
            len(batch) == size or image.inputs['inputs'].shape != batch[0].inputs['inputs'].shape
        ):
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch
