"""Pictures of predictions: no two images share a name, and images of any type can be drawn on."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.dataset import ConcatDataset

from crossformer_mm.pictures import as_picture, names_in, picture_in
from crossformer_mm.without_torch.files import unique_names

from .helpers import Photos, write_pictures


@pytest.mark.parametrize(
    'files, stems',
    [
        (['a.png', 'b.jpg'], ['a', 'b']),
        (['one/a.png', 'two/a.png'], ['one/a', 'two/a']),
        (['a.png', 'a.jpg'], ['a.png', 'a.jpg']),
        # A suffix less is the name of another file, with or without its own.
        (['a.png', 'a.jpg', 'a.png.bmp'], ['a.png', 'a.jpg', 'a.png.bmp']),
        (['a', 'a.png'], ['a', 'a.png']),
        (['below/a.png'], ['a']),
        ([], []),
    ],
)
def test_files_keep_names_of_their_own(tmp_path, files, stems):
    paths = [tmp_path / file for file in files]
    assert [stem for _, stem in unique_names(paths)] == stems


def test_images_of_data_sets_are_named_below_the_folder_that_all_share(tmp_path):
    parts = [
        Photos(write_pictures(tmp_path / site, 'cam0/frame.png', 'cam1/frame.png'))
        for site in ('north', 'south')
    ]
    names = names_in(ConcatDataset(parts))
    assert [name for name, _ in names.values()] == [
        f'{site}/{cam}/frame.png' for site in ('north', 'south') for cam in ('cam0', 'cam1')
    ]
    assert [Path(path) for path in names] == [tmp_path / name for name, _ in names.values()]


def test_pictures_are_loaded_as_the_data_set_does(tmp_path):
    """Turned by its orientation or not, in grey, in 16 bits; red first."""
    from PIL import Image

    turned = Image.Exif()
    turned[0x0112] = 6
    photo = Image.new('RGB', (6, 4), (200, 100, 50))
    photo.save(tmp_path / 'photo.jpg', exif=turned, quality=95)
    cv2.imwrite(str(tmp_path / 'photo.png'), np.full((4, 6, 3), (50, 100, 200), np.uint16) * 257)

    def picture(name: str, **options) -> np.ndarray:
        data = Photos([dict()], pipeline=[dict(type='LoadImageFromFile', **options)])
        return picture_in(ConcatDataset([data, data]), str(tmp_path / name))

    assert picture('photo.jpg').shape == (6, 4, 3)
    assert picture('photo.jpg', color_type='color_ignore_orientation').shape == (4, 6, 3)
    assert np.abs(picture('photo.jpg')[2, 2].astype(int) - (200, 100, 50)).max() < 9
    grey = picture('photo.jpg', color_type='grayscale')
    assert grey.shape == (6, 4, 3) and len(np.unique(grey[2, 2])) == 1
    assert (picture('photo.png', color_type='unchanged') == (200, 100, 50)).all()


GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
COLOUR = np.stack([GREY, GREY[::-1], GREY.T.reshape(3, 4)], axis=-1)


@pytest.mark.parametrize(
    'pixels, drawn',
    [
        (COLOUR, COLOUR),
        (COLOUR[:, ::-1], COLOUR[:, ::-1]),
        (GREY, np.stack([GREY] * 3, -1)),
        (GREY[..., None], np.stack([GREY] * 3, -1)),
        (np.dstack([COLOUR, GREY]), COLOUR),
        (np.dstack([GREY, GREY[::-1]]), np.stack([GREY] * 3, -1)),
        (COLOUR.astype(np.float32), COLOUR),
        (COLOUR.astype(np.uint16) * 257, COLOUR),
        (COLOUR.astype(np.float64) / 220, np.round(COLOUR * (255 / 220))),
        (COLOUR.astype(np.int32) * 100 - 7, np.round(COLOUR * (255 / 220))),
    ],
)
def test_images_of_any_type_can_be_drawn_on(pixels, drawn):
    picture = as_picture(pixels)
    assert picture.dtype == np.uint8 and picture.shape == (3, 4, 3)
    assert np.abs(picture.astype(int) - drawn).max() <= 1
    assert picture.flags.c_contiguous
