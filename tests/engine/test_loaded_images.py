"""Images that cannot be used end a run when they are loaded or are skipped; odd ones work."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ..trainings import DETECTOR, SEGMENTOR, train, write_config
from .spoilt_data import build, change, edit_labels, refusal, truncate


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
def test_truncated_file(own_data, kind, split, file, what):
    truncate(own_data / file)
    dataset = build(kind, own_data, split)
    assert dataset[1] is not None
    assert refusal(lambda: dataset[0]) == f"{what} '{own_data / file}' is cut short or no image."


@pytest.mark.parametrize('split, folder', [('train', 'training'), ('val', 'validation')])
@pytest.mark.parametrize(
    'edit, facts',
    [
        # Of 5 classes; 1 is taken from each label.
        (lambda labels: np.full_like(labels, 7), ['has label 6', 'allowed are 0 to 4']),
        (lambda labels: labels[:1, :1], ['1 x 1', 'needs 2']),
    ],
    ids=['label out of range', 'one pixel'],
)
def test_label_map_that_cannot_be_used(own_data, split, folder, edit, facts):
    path = edit_labels(own_data, edit, folder)
    dataset = build(SEGMENTOR, own_data, split)
    said = refusal(lambda: dataset[0])
    assert said.startswith(f"Label map '{path}' ")
    for fact in facts:
        assert fact in said


def test_label_map_of_another_size(own_data):
    path = edit_labels(own_data, lambda labels: labels[:40])
    assert build(SEGMENTOR, own_data, 'val')[0] is not None
    dataset = build(SEGMENTOR, own_data, 'train')
    said = refusal(lambda: [dataset[0] for _ in range(20)])  # some crops are of one size
    assert str(path) in said and 'another size' in said


def test_skipping_takes_another_image_and_lists_each_once(own_data, tmp_path):
    bad = [own_data / f'ade/images/training/00000000000{i}.jpg' for i in (1, 4)]
    for path in bad:
        truncate(path)
    dataset = build(SEGMENTOR, own_data, 'train', skip_to=str(tmp_path / 'skipped.txt'))
    for _ in range(2):
        for index in range(len(dataset)):
            assert dataset[index]['data_samples'].img_path not in map(str, bad)
    assert (tmp_path / 'skipped.txt').read_text().splitlines() == [
        f"Image '{path}' is cut short or no image." for path in bad
    ]


def test_skipping_ends_where_nothing_works(own_data, tmp_path):
    for path in (own_data / 'ade/images/training').iterdir():
        truncate(path)
    dataset = build(SEGMENTOR, own_data, 'train', skip_to=str(tmp_path / 'skipped.txt'))
    assert '20 images in a row could not be used' in refusal(lambda: dataset[0])


# The tools, whole


ODD = [('RGB', (1, 1)), ('RGB', (4000, 30)), ('L', (48, 48)), ('CMYK', (48, 48))]


def put_odd_images(own_data: Path) -> None:
    """Make the first held-out and training images odd, and the objects of the fifth crowds.

    The smallest label map that MMSegmentation reads is 2x2.
    """
    rng = np.random.default_rng(0)
    for split, ade_split in (('train', 'training'), ('val', 'validation')):
        for number, (mode, size) in enumerate(ODD, start=1):
            name = f'{number:012d}'
            image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).convert(mode)
            label_size = tuple(max(side, 2) for side in size)
            image.resize(label_size).save(own_data / f'ade/images/{ade_split}/{name}.jpg')
            # The name of a PNG, for JPEG is the format that has CMYK.
            image.save(own_data / f'coco/{split}2017/{name}.png', format='JPEG')
            Image.fromarray(np.ones(label_size[::-1], np.uint8)).save(
                own_data / f'ade/annotations/{ade_split}/{name}.png'
            )

        def resize(content):
            # The third image has no objects at all.
            kept = [one for one in content['annotations'] if one['image_id'] != 3]
            content['annotations'] = kept
            for image, (_, size) in zip(content['images'], ODD):
                image['width'], image['height'] = size
            for annotation in kept:
                if annotation['image_id'] <= len(ODD):
                    _, (w, h) = ODD[annotation['image_id'] - 1]
                    annotation.update(
                        bbox=[0, 0, w, h], area=w * h, segmentation=[[0, 0, w, 0, w, h, 0, h]]
                    )
                elif annotation['image_id'] == 5:  # crowds only, as COCO writes them
                    crowd = dict(size=[48, 48], counts=[0, 48 * 48])
                    annotation.update(iscrowd=1, segmentation=crowd)

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
    process = train(tmp_path, config, '--cfg-options', *options)
    assert process.wait() == 0, process.output[-1500:]
    assert ('coco/bbox_mAP:' if kind is DETECTOR else 'mIoU:') in process.output
    assert 'nan' not in process.output.split('Saving checkpoint')[0].split('Epoch(train)')[-1]


def test_training_goes_on_without_bad_images_when_told_to(own_data, tmp_path):
    bad = own_data / 'ade/images/training/000000000002.jpg'
    truncate(bad)
    config = write_config(SEGMENTOR, tmp_path / 'config.py', own_data)
    options = ['--cfg-options', 'train_cfg.max_iters=3']

    process = train(tmp_path, config, *options)
    assert process.wait() == 2  # the error came through a worker process
    assert process.output.strip().splitlines()[-1] == (
        f"error: Image '{bad}' is cut short or no image."
    )
    assert not (tmp_path / 'skipped_images.txt').exists()

    process = train(tmp_path, config, '--skip-bad-images', *options)
    assert process.wait() == 0, process.output[-3000:]
    assert "1 images were skipped, see '" in process.output
    assert (tmp_path / 'skipped_images.txt').read_text() == (
        f"Image '{bad}' is cut short or no image.\n"
    )
