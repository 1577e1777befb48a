"""Small exported models, and photos for them."""

from pathlib import Path

import cv2
import numpy as np
import pytest


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> Path:
    """Images of several shapes, among them the smallest and a long one; and a file that is none."""
    folder = tmp_path_factory.mktemp('photos')
    random = np.random.default_rng(0)
    for name, (height, width) in dict(
        a=(60, 80), b=(75, 51), c=(1, 1), d_dark=(64, 64), e=(30, 400), f=(96, 160), g=(4000, 30)
    ).items():
        coarse = random.integers(256, size=(height // 9 + 2, width // 9 + 2, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
        cv2.imwrite(str(folder / f'{name}.png'), image * (name != 'd_dark'))
    (folder / 'none.jpg').write_bytes(b'no image')
    return folder


@pytest.fixture(scope='module')
def exported(tmp_path_factory, photos):
    from .exported import Exported  # which skips its importer where exports cannot be made

    made = {}

    def get(kind: str):
        if kind not in made:
            made[kind] = Exported(kind, tmp_path_factory.mktemp(kind), photos)
        return made[kind]

    return get
