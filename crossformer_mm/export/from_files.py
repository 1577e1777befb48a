"""Check of an exported file from image files on: what the network is given must be the same."""

import tempfile
from pathlib import Path
from typing import Iterator, Sequence

import cv2
import numpy as np
import torch
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import TRANSFORMS
from torch import nn

from .metadata import is_of_annotations

TOLERANCE = 1e-5  # of the largest normalised value


class Differs(ValueError):
    """A file does not compute what PyTorch does; the message is a sentence."""


def check_from_files(module: nn.Module, pipeline: Sequence[dict], model) -> None:
    """Compare what a file is given of images with what the library gives its model of them.

    Args:
        module: the whole model that was exported.
        pipeline: the test pipeline of its config.
        model: a ``Model`` of tools/run_onnx.py, with the exported file.

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
    """Raise Differs if arrays have other shapes or values; the tolerance is of the largest."""
    theirs, ours = (np.asarray(values, np.float32) for values in (theirs, ours))
    if theirs.shape != ours.shape:
        raise Differs(f'the test pipeline makes {theirs.shape} of {what}, the file {ours.shape}')
    apart = np.abs(theirs - ours).max()
    if not apart <= tolerance * np.abs(theirs).max():
        raise Differs(f"{what} are not those of the config's test pipeline, by {apart:.3g}")


def image_files(folder: Path) -> Iterator[Path]:
    """Files of the kinds that readers of images treat in different ways."""
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
