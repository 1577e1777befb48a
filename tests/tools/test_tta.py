"""Test-time augmentation: mirrored images have mirrored predictions, whatever the weights are."""

import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from ..helpers import DEMO_SEGMENTOR, ROOT, random_model, run_tool
from ..trainings import ONE_STAGE, make_data, write_config

# The published sizes of segmentors are for ADE20K: a fortieth of the work.
SMALLER = [
    f'tta_pipeline.1.transforms.0.{i}.scale=({s},{s})' for i, s in enumerate([64] + 5 * [96])
]


@pytest.fixture(scope='module')
def shapes(tmp_path_factory) -> tuple:
    """A data set, and the same with mirrored images."""
    folder = tmp_path_factory.mktemp('data')
    plain = make_data(folder / 'plain', train=1, val=2, size=96)
    mirrored = Path(shutil.copytree(plain, folder / 'mirrored'))
    for file in (*mirrored.glob('coco/val2017/*'), *mirrored.glob('ade/images/validation/*')):
        image = cv2.imread(str(file))[:, ::-1]
        file.write_bytes(cv2.imencode('.png', image)[1])  # without loss, whatever its name
    return plain, mirrored


def predictions(shapes: tuple, kind: str, out: str, folder: Path, *options) -> list:
    """Results of tools/test.py --tta for the plain images and for the mirrored ones."""
    kept = []
    for data in shapes:
        place = folder / data.name
        place.mkdir()
        more = ['--data-root', data / kind, '--work-dir', place, '--out', place / out, '--tta']
        assert run_tool('test.py', *options[:2], *more, *options[2:]) == 0
        kept.append(place / out)
    return kept


def test_boxes_of_mirrored_images_are_mirrored(shapes, tmp_path):
    config = write_config(ONE_STAGE, tmp_path / 'small.py', shapes[0])
    weights = random_model(config, tmp_path / 'small.pth', {})
    scale = ['--cfg-options', 'tta_pipeline.1.transforms.0.0.scale=(128,128)']
    files = predictions(shapes, 'coco', 'kept.pkl', tmp_path, config, weights, *scale)
    plain, mirrored = (pickle.loads(file.read_bytes()) for file in files)
    assert len(plain) == len(mirrored) == 2
    for image, other in zip(plain, mirrored):
        found, same = image['pred_instances'], other['pred_instances']
        boxes, scores = same['bboxes'].numpy(), same['scores'].numpy()
        boxes = np.stack([96 - boxes[:, 2], boxes[:, 1], 96 - boxes[:, 0], boxes[:, 3]], axis=1)
        assert len(found['scores']) > 20
        for box, score in zip(found['bboxes'][:20].numpy(), found['scores'][:20].numpy()):
            distance = np.abs(boxes - box).max(axis=1) + 100 * np.abs(scores - score)
            assert distance.min() < 0.05


def test_label_maps_of_mirrored_images_are_mirrored(shapes, tmp_path):
    weights = random_model(DEMO_SEGMENTOR, tmp_path / 'small.pth', {})
    options = (DEMO_SEGMENTOR, weights, '--cfg-options', *SMALLER)
    folders = predictions(shapes, 'ade', 'maps', tmp_path, *options)
    for name in (file.name for file in folders[0].iterdir()):
        plain, mirrored = (
            cv2.imread(str(folder / name), cv2.IMREAD_UNCHANGED) for folder in folders
        )
        assert plain.shape == (96, 96) and len(np.unique(plain)) > 1
        assert (plain == mirrored[:, ::-1]).mean() > 0.999
        assert (plain != plain[:, ::-1]).mean() > 0.01


def test_classes_counted_from_zero_need_one_setting_with_and_without_augmentation(
    output_of, tmp_path
):
    data = make_data(tmp_path / 'shapes', train=1, val=1, size=96)
    config = tmp_path / 'from_zero.py'
    config.write_text(
        f'_base_ = {str(ROOT / DEMO_SEGMENTOR)!r}\n'
        'test_dataloader = dict(dataset=dict(reduce_zero_label=False))\n'
    )
    weights = random_model(DEMO_SEGMENTOR, tmp_path / 'small.pth', {})
    for path in (data / 'ade/annotations/validation').iterdir():
        cv2.imwrite(str(path), cv2.imread(str(path), cv2.IMREAD_UNCHANGED) - 1)
    for number, more in enumerate([(), ('--tta', '--cfg-options', *SMALLER)]):
        options = ('--data-root', data / 'ade', '--work-dir', tmp_path / str(number))
        out = tmp_path / f'maps{number}'
        output_of('test.py', config, weights, *options, '--out', out, *more)
        (labels,) = out.iterdir()
        assert cv2.imread(str(labels), cv2.IMREAD_UNCHANGED).max() <= 4
