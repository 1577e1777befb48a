"""Data of other people: unusual files work, unusable ones are named in one sentence."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from crossformer_mm.engine.data_checks import categories_checked, check_files, explained_data, guard
from crossformer_mm.engine.errors import DataError

from .tool_process import ToolProcess
from .trainings import DETECTOR, SEGMENTOR, make_data, write_config

TRAIN_JSON = 'coco/annotations/instances_train2017.json'
VAL_JSON = 'coco/annotations/instances_val2017.json'


@pytest.fixture(scope='module')
def clean(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp('data') / 'shapes', train=6, val=5, size=48)


@pytest.fixture
def data(clean, tmp_path) -> Path:
    """A data set of its own for a test to spoil."""
    return Path(shutil.copytree(clean, tmp_path / 'shapes'))


def change(path: Path, edit) -> None:
    """Edit an annotation file, given as a dict."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def build(kind, data: Path, split: str, tmp_path: Path, skip_to: str = None):
    """The data set that the tools train on or test on."""
    cfg = Config.fromfile(write_config(kind, tmp_path / 'config.py', data))
    init_default_scope(cfg.default_scope)
    with explained_data(), categories_checked():
        dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
    check_files(dataset, skip_to)
    guard(dataset, skip_to)
    return dataset


def refusal(build_or_load) -> str:
    """The sentence of the error."""
    with pytest.raises(DataError) as refused:
        build_or_load()
    said = str(refused.value)
    assert '\n' not in said and said.endswith('.')
    return said


# What is found before training starts


@pytest.mark.parametrize(
    'content',
    [
        '',
        '{"images": [',
        '[]',
        '{}',
        '{"images": [{}]}',
        """{
        "images": [{"id": 1, "file_name": "1.png", "height": 9, "width": 9}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": ["a", 0, 1, 1]}],
        "categories": [{"id": 1, "name": "disk"}]}""",
    ],
)
def test_annotation_file_that_cannot_be_read(data, tmp_path, content):
    (data / TRAIN_JSON).write_text(content)
    said = refusal(lambda: build(DETECTOR, data, 'train', tmp_path))
    assert said.startswith(f"annotation file '{data / TRAIN_JSON}' ")


@pytest.mark.parametrize('split, file', [('train', TRAIN_JSON), ('val', VAL_JSON)])
def test_annotated_image_that_is_not_there(data, tmp_path, split, file):
    change(data / file, lambda content: content['images'][1].update(file_name='none.png'))
    missing = data / 'coco' / f'{split}2017' / 'none.png'
    said = refusal(lambda: build(DETECTOR, data, split, tmp_path))
    assert said == f"File '{missing}', which annotation file '{data / file}' names, does not exist."


def test_label_map_that_is_not_there(data, tmp_path):
    missing = data / 'ade/annotations/training/000000000003.png'
    missing.unlink()
    assert str(missing) in refusal(lambda: build(SEGMENTOR, data, 'train', tmp_path))


def test_empty_annotations(data, tmp_path):
    change(data / TRAIN_JSON, lambda content: content.update(annotations=[]))
    said = refusal(lambda: build(DETECTOR, data, 'train', tmp_path))
    assert said.startswith(f"annotation file '{data / TRAIN_JSON}' leaves no image to use")


def test_folder_without_images(data, tmp_path):
    for image in (data / 'ade/images/training').iterdir():
        image.unlink()
    said = refusal(lambda: build(SEGMENTOR, data, 'train', tmp_path))
    assert said.startswith(f"image folder '{data / 'ade/images/training'}' leaves no image to use")


def test_class_of_the_config_that_the_file_does_not_have(data, tmp_path):
    def rename(content):
        content['categories'][1]['name'] = 'box'

    change(data / TRAIN_JSON, rename)
    said = refusal(lambda: build(DETECTOR, data, 'train', tmp_path))
    assert said.startswith(
        "Class 'square' of the config's metainfo.classes is no category of "
        f"annotation file '{data / TRAIN_JSON}', which has 'disk', 'box'"
    )


def test_classes_in_another_order_than_in_the_file(data, tmp_path):
    # MMDetection would call a star a disk, and say nothing.
    change(data / TRAIN_JSON, lambda content: content['categories'].reverse())
    said = refusal(lambda: build(DETECTOR, data, 'train', tmp_path))
    assert "give them as 'star', 'triangle', 'square', 'disk'." in said


def test_class_of_the_file_that_the_config_does_not_have(data, tmp_path, caplog):
    def add(content):
        content['categories'].append(dict(id=9, name='ring'))
        content['annotations'][0]['category_id'] = 9

    whole = sum(
        len(build(DETECTOR, data, 'train', tmp_path).get_data_info(i)['instances'])
        for i in range(6)
    )
    change(data / TRAIN_JSON, add)
    dataset = build(DETECTOR, data, 'train', tmp_path)
    assert sum(len(dataset.get_data_info(i)['instances']) for i in range(6)) == whole - 1


# What is found when an image is loaded


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])


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
def test_truncated_file(data, tmp_path, kind, split, file, what):
    truncate(data / file)
    dataset = build(kind, data, split, tmp_path)
    assert dataset[1] is not None
    assert refusal(lambda: dataset[0]) == f"{what} '{data / file}' is cut short or no image."


@pytest.mark.parametrize('split, folder', [('train', 'training'), ('val', 'validation')])
def test_labels_out_of_range(data, tmp_path, split, folder):
    path = data / 'ade/annotations' / folder / '000000000001.png'
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    labels[:] = 7  # 5 classes; 1 is taken from each label
    cv2.imwrite(str(path), labels)
    dataset = build(SEGMENTOR, data, split, tmp_path)
    said = refusal(lambda: dataset[0])
    assert said.startswith(f"Label map '{path}' has label 6") and 'allowed are 0 to 4' in said


def test_label_map_of_another_size(data, tmp_path):
    path = data / 'ade/annotations/training/000000000001.png'
    cv2.imwrite(str(path), np.ones((40, 48), np.uint8))
    dataset = build(SEGMENTOR, data, 'val', tmp_path)
    assert dataset[0] is not None
    dataset = build(SEGMENTOR, data, 'train', tmp_path)
    said = refusal(lambda: [dataset[0] for _ in range(20)])  # some crops are of one size
    assert str(path) in said and 'another size' in said


@pytest.mark.parametrize('split, folder', [('train', 'training'), ('val', 'validation')])
def test_label_map_of_one_pixel(data, tmp_path, split, folder):
    path = data / 'ade/annotations' / folder / '000000000001.png'
    cv2.imwrite(str(path), np.ones((1, 1), np.uint8))
    dataset = build(SEGMENTOR, data, split, tmp_path)
    said = refusal(lambda: dataset[0])
    assert str(path) in said and '1 x 1' in said and 'needs 2' in said


def test_skipping_takes_another_image_and_lists_each_once(data, tmp_path):
    bad = [data / f'ade/images/training/00000000000{i}.jpg' for i in (1, 4)]
    for path in bad:
        truncate(path)
    dataset = build(SEGMENTOR, data, 'train', tmp_path, skip_to=str(tmp_path / 'skipped.txt'))
    for _ in range(2):
        for index in range(len(dataset)):
            assert dataset[index]['data_samples'].img_path not in map(str, bad)
    assert (tmp_path / 'skipped.txt').read_text().splitlines() == [
        f"Image '{path}' is cut short or no image." for path in bad
    ]


def test_skipping_ends_where_nothing_works(data, tmp_path):
    for path in (data / 'ade/images/training').iterdir():
        truncate(path)
    dataset = build(SEGMENTOR, data, 'train', tmp_path, skip_to=str(tmp_path / 'skipped.txt'))
    assert '20 images in a row could not be used' in refusal(lambda: dataset[0])


# The tools, whole


def put_odd_images(data: Path) -> None:
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
            image.resize(label_size).save(data / f'ade/images/{ade_split}/{name}.jpg')
            # The name of a PNG, for JPEG is the format that has CMYK.
            image.save(data / f'coco/{split}2017/{name}.png', format='JPEG')
            Image.fromarray(np.ones(label_size[::-1], np.uint8)).save(
                data / f'ade/annotations/{ade_split}/{name}.png'
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

        change(data / f'coco/annotations/instances_{split}2017.json', resize)


@pytest.mark.parametrize('kind', [DETECTOR, SEGMENTOR], ids=lambda kind: kind.name)
def test_odd_images_train_and_are_evaluated(kind, data, tmp_path):
    put_odd_images(data)
    # No filter: what a user may well leave out.
    config = write_config(kind, tmp_path / 'config.py', data)
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
        'tools/train.py',
        config,
        '--work-dir',
        tmp_path,
        '--cfg-options',
        *options,
    )
    assert process.wait() == 0, process.output[-1500:]
    assert ('coco/bbox_mAP:' if kind is DETECTOR else 'mIoU:') in process.output
    assert 'nan' not in process.output.split('Saving checkpoint')[0].split('Epoch(train)')[-1]


def test_training_goes_on_without_bad_images_when_told_to(data, tmp_path):
    bad = data / 'ade/images/training/000000000002.jpg'
    truncate(bad)
    config = write_config(SEGMENTOR, tmp_path / 'config.py', data)
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
        'tools/train.py',
        config,
        '--work-dir',
        tmp_path,
        '--skip-bad-images',
        *options,
    )
    assert process.wait() == 0, process.output[-3000:]
    assert "1 images were skipped, see '" in process.output
    assert (tmp_path / 'skipped_images.txt').read_text() == (
        f"Image '{bad}' is cut short or no image.\n"
    )
