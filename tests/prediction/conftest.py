"""Images of shapes, and the detector that predicts fastest."""

from pathlib import Path

import pytest

from ..helpers import CLASSES, random_model
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
