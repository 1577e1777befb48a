"""Images of shapes, models, and predictions of them."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from ..helpers import CLASSES, DEMO_DETECTOR, DEMO_SEGMENTOR, random_model, read_json
from ..trainings import ONE_STAGE, make_data, write_config


@pytest.fixture(scope='module')
def shapes(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp('data') / 'shapes', train=1, val=5, size=96)


@pytest.fixture(scope='module')
def quick(tmp_path_factory, shapes):
    """Config and checkpoint of what predicts fastest, for images of some channels."""
    folder, made = tmp_path_factory.mktemp('quick'), {}

    def get(channels: int = 3) -> tuple:
        if channels not in made:
            kind = {1: 'grayscale', 3: 'color', 4: 'unchanged'}[channels]
            values = 3 if channels == 3 else 1  # MMEngine takes no other number
            config = write_config(ONE_STAGE, folder / f'{channels}.py', shapes)
            config.write_text(
                config.read_text()
                + f"""
model['backbone'].update(in_channels={channels})
model['data_preprocessor'] = dict(
    _delete_=True, type='DetDataPreprocessor', mean=[127.5] * {values}, std=[60.] * {values},
    pad_size_divisor=32)
test_pipeline[0].update(color_type={kind!r})
test_pipeline[1].update(keep_ratio=False)
"""
            )
            weights = folder / f'{channels}.pth'
            made[channels] = config, random_model(config, weights, dict(CLASSES=CLASSES))
        return made[channels]

    return get


@pytest.fixture
def detector(random_detector) -> tuple:
    return DEMO_DETECTOR, random_detector


@pytest.fixture
def segmentor(random_segmentor) -> tuple:
    return DEMO_SEGMENTOR, random_segmentor


@pytest.fixture(scope='module')
def image(shapes) -> np.ndarray:
    return cv2.imread(str(shapes / 'coco/val2017/000000000001.png'))


@pytest.fixture
def photos(tmp_path) -> Path:
    (tmp_path / 'photos').mkdir()
    return tmp_path / 'photos'


class Predicted:
    """A folder of predictions.

    Args:
        out: the folder.
        said: what was printed.
    """

    def __init__(self, out: Path, said: str):
        self.out, self.said = out, said
        self.index = read_json(out / 'images.json') if (out / 'images.json').exists() else {}

    def names(self, key: str = 'images') -> list:
        """Files that were predicted, or 'skipped'."""
        return [one['file_name'] for one in self.index[key]]

    @property
    def boxes(self) -> list:
        return read_json(self.out / 'results.bbox.json')

    @property
    def ids(self) -> set:
        """Ids of the images in which something was found."""
        return {one['image_id'] for one in self.boxes}


@pytest.fixture
def predict(output_of, tmp_path):
    """Predicts images into a folder; draws nothing, for a hundred labels take a second."""

    def run(model, images, *options, out='out', threshold=1, expect=0) -> Predicted:
        if threshold is not None:  # of a detector
            options += ('--score-thr', threshold)
        out = tmp_path / out
        said = output_of('predict.py', *model, images, '--out', out, *options, expect=expect)
        return Predicted(out, said)

    return run
