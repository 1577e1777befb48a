"""Check that a file and its config prepare image files in the same way."""

import tempfile
from pathlib import Path
from typing import Iterator, Sequence

import cv2
import numpy as np
import torch
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import TRANSFORMS
from torch import nn

from .compare import Differs
from .metadata import is_of_annotations

TOLERANCE = 1e-5  # of the largest normalised value


def check_from_files(module: nn.Module, pipeline: Sequence[dict], model) -> None:
    """Compare the prepared images of a file with those of its config's test pipeline.

    Args:
        module: the whole model that was exported.
        pipeline: the test pipeline of its config.
        model: :class:`.without_torch.model.Model` of the exported file.

    Raises:
        Differs: they differ.
    """
    load, *steps = [TRANSFORMS.build(step) for step in pipeline if not is_of_annotations(step)]
    load.backend_args = load.file_client_args = None  # these files are on this machine
    with tempfile.TemporaryDirectory() as folder:
        for file in image_files(Path(folder)):
            loaded = load(dict(img_path=str(file), img_id=0))
            pixels = model.decode(file.read_bytes())
            must_be_equal(loaded['img'], pixels, f"the pixels of '{file.name}'")
            packed = Compose(steps)(loaded)
            rgb = packed['inputs'].flip(0)[None]
            if 'fixed_shape' not in model.about:  # these are resized to it, by another rule
                prepared = model.prepare(pixels)[None, ..., ::-1].transpose(0, 3, 1, 2)
                resized = torch.from_numpy(prepared.copy())
                if hasattr(module, 'resize'):
                    resized = module.resize(resized)
                must_be_equal(rgb, resized, f"the resized pixels of '{file.name}'")
            given = module.model.data_preprocessor(pseudo_collate([packed]), False)['inputs']
            must_be_equal(given, module.preprocess(rgb), f"'{file.name}', normalised", TOLERANCE)


def must_be_equal(theirs, ours, what: str, tolerance: float = 0) -> None:
    """Raise Differs if shapes or values differ; the tolerance is relative to the largest value."""
    theirs, ours = (np.asarray(values, np.float32) for values in (theirs, ours))
    if theirs.shape != ours.shape:
        raise Differs(f'the test pipeline makes {theirs.shape} of {what}, the file {ours.shape}')
    apart = np.abs(theirs - ours).max()
    if not apart <= tolerance * np.abs(theirs).max():
        raise Differs(f"{what} are not those of the config's test pipeline, by {apart:.3g}")


def image_files(folder: Path) -> Iterator[Path]:
    """Write images in formats that readers treat differently, and yield the files."""
    from PIL import Image

    coarse = np.random.default_rng(0).integers(256, size=(9, 7, 4), dtype=np.uint8)
    image = cv2.resize(coarse, (91, 61))
    for name, pixels in dict(
        colour=image[..., :3],
        grey=image[..., 0],
        with_alpha=image,
        in_16_bits=image[..., :3].astype(np.uint16) * 257,
    ).items():
        cv2.imwrite(str(folder / f'{name}.png'), pixels)
        yield folder / f'{name}.png'
    turned = Image.Exif()
    turned[0x0112] = 6  # the orientation of a camera that is held upright
    Image.fromarray(image[..., :3]).save(folder / 'turned.jpg', exif=turned)
    yield folder / 'turned.jpg'
