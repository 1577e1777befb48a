"""Images that cannot be used end a run when they are loaded or are skipped; odd ones work."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from ..helpers import ToolProcess
from ..trainings import DETECTOR, SEGMENTOR, write_config
from .spoilt_data import build, change, refusal, truncate


@pytest.mark.parametrize(
    'kind, split, file, what',
    [
        (DETECTOR, 'train', 'coco/train2017/000000000001.png', 'Image'),
        (DETECTOR, 'val', 'coco/val2017/000000000001.png', 'Image'),
        (SEGMENTOR, 'train', 'ade/images/training/000000000001.jpg', 'Image'),
        (SEGMENTOR, 'val', 'ade/images/validation/000000000001.jpg', 'Image'),
        (SEGMENTOR, 'train', 'ade/annotations/training/000000000001.png', 'Label map'),
    ],
)
def test_truncated_file(own_data, tmp_path, kind, split, file, what):
    truncate(own_data / file)
    dataset = build(kind, own_data, split, tmp_path)
    assert dataset[1] is not None
    assert refusal(lambda: dataset[0]) == f"{what} '{own_data / file}' is cut short or no image."


@pytest.mark.parametrize('split, folder', [('train', 'training'), ('val', 'validation')])
def test_labels_out_of_range(own_data, tmp_path, split, folder):
    path = own_data / 'ade/annotations' / folder / '000000000001.png'
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    labels[:] = 7  # 5 classes; 1 is taken from each label
    cv2.imwrite(str(path), labels)
    dataset = build(SEGMENTOR, own_data, split, tmp_path)
    said = refusal(lambda: dataset[0])
    assert said.startswith(f"Label map '{path}' has label 6") and 'allowed are 0 to 4' in said


def test_label_map_of_another_size(own_data, tmp_path):
    path = own_data / 'ade/annotations/training/000000000001.png'
    cv2.imwrite(str(path), np.ones((40, 48), np.uint8))
    dataset = build(SEGMENTOR, own_data, 'val', tmp_path)
    assert dataset[0] is not None
    dataset = build(SEGMENTOR, own_data, 'train', tmp_path)
    said = refusal(lambda: [dataset[0] for _ in range(20)])  # some crops are of one size
    assert str(path) in said and 'another size' in said


@pytest.mark.parametrize('split, folder', [('train', 'training'), ('val', 'validation')])
def test_label_map_of_one_pixel(own_data, tmp_path, split, folder):
    path = own_data / 'ade/annotations' / folder / '000000000001.png'
    cv2.imwrite(str(path), np.ones((1, 1), np.uint8))
    dataset = build(SEGMENTOR, own_data, split, tmp_path)
    said = refusal(lambda: dataset[0])
    assert str(path) in said and '1 x 1' in said and 'needs 2' in said


def test_skipping_takes_another_image_and_lists_each_once(own_data, tmp_path):
    bad = [own_data / f'ade/images/training/00000000000{i}.jpg' for i in (1, 4)]
    for path in bad:
        truncate(path)
    dataset = build(SEGMENTOR, own_data, 'train', tmp_path, skip_to=str(tmp_path / 'skipped.txt'))
    for _ in range(2):
        for index in range(len(dataset)):
            assert dataset[index]['data_samples'].img_path not in map(str, bad)
    assert (tmp_path / 'skipped.txt').read_text().splitlines() == [
        f"Image '{path}' is cut short or no image." for path in bad
    ]


def test_skipping_ends_where_nothing_works(own_data, tmp_path):
    for path in (own_data / 'ade/images/training').iterdir():
        truncate(path)
    dataset = build(SEGMENTOR, own_data, 'train', tmp_path, skip_to=str(tmp_path / 'skipped.txt'))
    assert '20 images in a row could not be used' in refusal(lambda: dataset[0])


# The tools, whole


def put_odd_images(own_data: Path) -> None:
    """Make held-out and training images 1x1, 4000x30, grey and CMYK.

    The smallest label map that MMSegmentation reads is 2x2.
    """
    rng = np.random.default_rng(0)
    for split, ade_split in (('train', 'training'), ('val', 'validation')):
        sizes = {}
        kinds = [('RGB', (1, 1)), ('RGB', (4000, 30)), ('L', (48, 48)), ('CMYK', (48, 48))]
        for number, (mode, size) in enumerate(kinds, start=1):
            name = f'{number:012d}'
            image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).convert(mode)
            label_size = tuple(max(side, 2) for side in size)
            image.resize(label_size).save(own_data / f'ade/images/{ade_split}/{name}.jpg')
            # The name of a PNG, for JPEG is the format that has CMYK.
            image.save(own_data / f'coco/{split}2017/{name}.png', format='JPEG')
            Image.fromarray(np.ones(label_size[::-1], np.uint8)).save(
                own_data / f'ade/annotations/{ade_split}/{name}.png'
            )
            sizes[number] = size

        def resize(content):
            for image in content['images']:
                if image['id'] in sizes:
                    image['width'], image['height'] = sizes[image['id']]
            for annotation in content['annotations']:
                if annotation['image_id'] in sizes:
                    width, height = sizes[annotation['image_id']]
                    x, y, w, h = 0, 0, width, height
                    annotation.update(
                        bbox=[x, y, w, h],
                        area=w * h,
                        iscrowd=0,
                        segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
                    )
                if annotation['image_id'] == 5:  # crowds only, one of them as COCO writes them
                    annotation.update(
                        iscrowd=1, segmentation=dict(size=[48, 48], counts=[0, 48 * 48])
                    )
            content['annotations'] = [
                annotation for annotation in content['annotations'] if annotation['image_id'] != 3
            ]  # no objects at all

        change(own_data / f'coco/annotations/instances_{split}2017.json', resize)


@pytest.mark.parametrize('kind', [DETECTOR, SEGMENTOR], ids=lambda kind: kind.name)
def test_odd_images_train_and_are_evaluated(kind, own_data, tmp_path):
    put_odd_images(own_data)
    # No filter: what a user may well leave out.
    config = write_config(kind, tmp_path / 'config.py', own_data)
    options = dict(
        detector=['train_cfg.max_epochs=1', 'train_dataloader.dataset.filter_cfg=None'],
        segmentor=[
            'train_cfg.max_iters=3',
            'train_dataloader.num_workers=0',
            'train_dataloader.persistent_workers=False',
        ],
    )[kind.name]
    process = ToolProcess(
        tmp_path / 'log.txt',
        f'tools/train.py {config} --work-dir {tmp_path} --cfg-options',
        *options,
    )
    assert process.wait() == 0, process.output[-1500:]
    assert ('coco/bbox_mAP:' if kind is DETECTOR else 'mIoU:') in process.output
    assert 'nan' not in process.output.split('Saving checkpoint')[0].split('Epoch(train)')[-1]


def test_training_goes_on_without_bad_images_when_told_to(own_data, tmp_path):
    bad = own_data / 'ade/images/training/000000000002.jpg'
    truncate(bad)
    config = write_config(SEGMENTOR, tmp_path / 'config.py', own_data)
    options = ['--cfg-options', 'train_cfg.max_iters=3']

    process = ToolProcess(
        tmp_path / 'log.txt', 'tools/train.py', config, '--work-dir', tmp_path, *options
    )
    assert process.wait() == 2  # the error came through a worker process
    assert process.output.strip().splitlines()[-1] == (
        f"error: Image '{bad}' is cut short or no image."
    )
    assert not (tmp_path / 'skipped_images.txt').exists()

    process = ToolProcess(
        tmp_path / 'log.txt',
        f'tools/train.py {config} --work-dir {tmp_path} --skip-bad-images',
        *options,
    )
    assert process.wait() == 0, process.output[-3000:]
    assert "1 images were skipped, see '" in process.output
    assert (tmp_path / 'skipped_images.txt').read_text() == (
        f"Image '{bad}' is cut short or no image.\n"
    )
