"""Data of other people: unusual files work, unusable ones are named in one sentence."""

import functools
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from crossformer_mm.engine import coco_checks, dataset_checks, dataset_guard
from crossformer_mm.engine.coco_checks import annotations_checked, check_coco_metric
from crossformer_mm.engine.dataset_checks import (
    check_files,
    check_label_maps,
    check_orientations,
    explained_data,
)
from crossformer_mm.engine.dataset_guard import guard, list_skipped
from crossformer_mm.errors import ConfigError, DataError

from ..helpers import ToolProcess
from ..trainings import DETECTOR, ONE_STAGE, SEGMENTOR, make_data, write_config

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
    skip = functools.partial(list_skipped, skip_to) if skip_to else None
    with explained_data(), annotations_checked(skip):
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


@pytest.fixture
def warned(monkeypatch) -> list:
    """Warnings that checks give."""
    texts: list = []
    for module in (coco_checks, dataset_checks, dataset_guard):
        monkeypatch.setattr(module, 'print_log', lambda text, *_: texts.append(text))
    return texts


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
    assert f"annotation file '{data / TRAIN_JSON}' " in said


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


def test_class_of_the_file_that_the_config_does_not_have(data, tmp_path):
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


# COCO's format: what training, validation and pycocotools cannot use


def no_segmentation(annotation):
    del annotation['segmentation']


FAULTS = {
    'no segmentation': no_segmentation,
    'empty segmentation': lambda annotation: annotation.update(segmentation=[]),
    'segmentation null': lambda annotation: annotation.update(segmentation=None),
    'two points': lambda annotation: annotation.update(segmentation=[[1, 1, 5, 5]]),
    'one flat list': lambda annotation: annotation.update(segmentation=[1, 1, 5, 1, 5, 5]),
    'NaN in a polygon': lambda annotation: annotation.update(
        segmentation=[[1, 1, 5, 1, 5, float('nan')]]
    ),
    'RLE of another size': lambda annotation: annotation.update(
        segmentation=dict(size=[9, 9], counts=[0, 81])
    ),
    'RLE of too few pixels': lambda annotation: annotation.update(
        segmentation=dict(size=[48, 48], counts=[0, 9])
    ),
    'NaN in a box': lambda annotation: annotation['bbox'].__setitem__(2, float('nan')),
    'box of text': lambda annotation: annotation.update(bbox=['1', '1', '5', '5']),
    'no area': lambda annotation: annotation.pop('area'),
    'no box': lambda annotation: annotation.pop('bbox'),
}


@pytest.mark.parametrize('fault', FAULTS)
@pytest.mark.parametrize('split, file', [('train', TRAIN_JSON), ('val', VAL_JSON)])
def test_an_unusable_annotation_is_named_before_the_run(data, tmp_path, split, file, fault):
    change(data / file, lambda content: FAULTS[fault](content['annotations'][0]))
    annotation = json.loads((data / file).read_text())['annotations'][0]
    said = refusal(lambda: build(DETECTOR, data, split, tmp_path))
    assert said.startswith(f"Annotation {annotation['id']} of image '")
    assert f"in annotation file '{data / file}' has " in said


def test_boxes_alone_need_no_masks(data, tmp_path):
    def remove(content):
        for annotation in content['annotations']:
            del annotation['segmentation']

    change(data / TRAIN_JSON, remove)
    assert build(ONE_STAGE, data, 'train', tmp_path)[0] is not None


def test_images_with_unusable_annotations_can_be_skipped(data, tmp_path):
    change(data / TRAIN_JSON, lambda content: no_segmentation(content['annotations'][0]))
    skipped = tmp_path / 'skipped.txt'
    dataset = build(DETECTOR, data, 'train', tmp_path, skip_to=str(skipped))
    assert len(dataset) == 5
    assert 'has no segmentation' in skipped.read_text() and skipped.read_text().count('\n') == 1


def test_a_training_file_of_empty_objects_only(data, tmp_path):
    # As converters write that do not compute areas. MMDetection drops such objects.
    change(
        data / TRAIN_JSON,
        lambda content: [annotation.update(area=0) for annotation in content['annotations']],
    )
    said = refusal(lambda: build(DETECTOR, data, 'train', tmp_path))
    assert 'are left out: their area is 0' in said and str(data / TRAIN_JSON) in said


def test_objects_that_mmdetection_drops_are_counted(data, tmp_path, warned):
    def shrink(content):
        content['annotations'][0].update(bbox=[5, 5, 3, 0], area=0)  # as two objects of COCO 2017
        content['annotations'][1].update(bbox=[-9, 5, 8, 8])

    objects = len(json.loads((data / TRAIN_JSON).read_text())['annotations'])
    change(data / TRAIN_JSON, shrink)
    dataset = build(DETECTOR, data, 'train', tmp_path)
    kept = sum(len(dataset.get_data_info(i)['instances']) for i in range(6))
    assert kept == objects - 2
    assert f'2 of {objects} objects in annotation file' in ''.join(warned)


class Metric:
    """A ``CocoMetric`` on the validation file, checked as before a run."""

    def __init__(self, data: Path, *kinds: str):
        from mmdet.evaluation import CocoMetric

        self.metric = CocoMetric(ann_file=str(data / VAL_JSON), metric=list(kinds))

    def check(self, image_ids=(1, 2, 3, 4, 5)) -> None:
        classes = ['disk', 'square', 'triangle', 'star']
        check_coco_metric(self.metric, 'FILE', image_ids, classes)


@pytest.mark.parametrize(
    'fault', [*FAULTS, 'no iscrowd', 'a polygon of two points before a good one']
)
def test_what_pycocotools_cannot_use_is_named(data, fault):
    faults = {
        **FAULTS,
        'no iscrowd': lambda annotation: annotation.pop('iscrowd'),
        'a polygon of two points before a good one': lambda annotation: annotation.update(
            segmentation=[[1, 1, 5, 5], [1, 1, 9, 1, 9, 9]]
        ),
    }
    change(data / VAL_JSON, lambda content: faults[fault](content['annotations'][0]))
    said = refusal(Metric(data, 'bbox', 'segm').check)
    assert said.startswith('Annotation 1 of image') and ' in FILE has ' in said


def test_a_metric_of_boxes_needs_no_masks(data):
    change(data / VAL_JSON, lambda content: no_segmentation(content['annotations'][0]))
    Metric(data, 'bbox').check()


def test_a_metric_with_other_images_or_classes_than_the_data_set(data):
    assert 'image with id 9 ' in refusal(lambda: Metric(data, 'bbox').check([1, 2, 9]))
    change(data / VAL_JSON, lambda content: content['categories'].reverse())
    assert "give them as 'star'" in refusal(Metric(data, 'bbox').check)


def test_annotation_ids_from_zero_are_named_for_pycocotools_miscounts_them(data, warned):
    def count_from_zero(content):
        for annotation in content['annotations']:
            annotation['id'] -= 1

    change(data / VAL_JSON, count_from_zero)
    Metric(data, 'bbox').check()
    assert 'An annotation has id 0 in FILE' in ''.join(warned)


# Sizes and EXIF orientations


def turn(data: Path, orientation: int, size=(48, 32), split: str = 'train') -> Path:
    """Give the first image an EXIF orientation; its annotations say how it is stored."""
    path = data / f'coco/{split}2017/000000000001.png'
    image = Image.open(path).convert('RGB').resize(size)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, format='JPEG', exif=exif)

    def resize(content):
        content['images'][0].update(width=size[0], height=size[1])
        for annotation in content['annotations']:  # polygons say nothing of the image's size
            annotation['segmentation'] = [[1, 1, 20, 1, 20, 20, 1, 20]]

    change(data / f'coco/annotations/instances_{split}2017.json', resize)
    return path


@pytest.mark.parametrize('kind', [DETECTOR, ONE_STAGE], ids=lambda kind: kind.name)
@pytest.mark.parametrize('split', ['train', 'val'])
def test_an_image_that_exif_turns_is_named_before_the_run_and_when_it_is_loaded(
    data, tmp_path, kind, split
):
    path = turn(data, 6, split=split)
    dataset = build(kind, data, split, tmp_path)
    for find in (lambda: check_orientations(dataset), lambda: dataset[0]):
        said = refusal(find)
        assert said.startswith(f"Image '{path}' is 32 x 48 pixels wide and high after its EXIF")
        assert '48 x 32 in annotation file' in said and 'color_ignore_orientation' in said


def test_an_image_of_another_size_than_its_annotation_file_says(data, tmp_path):
    change(data / TRAIN_JSON, lambda content: content['images'][2].update(height=40))
    dataset = build(ONE_STAGE, data, 'train', tmp_path)
    for find in (lambda: check_orientations(dataset), lambda: dataset[2]):
        said = refusal(find)
        assert '000000000003.png' in said and '48 x 48' in said and '48 x 40 in' in said
    skipped = tmp_path / 'skipped.txt'
    dataset = build(ONE_STAGE, data, 'train', tmp_path, skip_to=str(skipped))
    check_orientations(dataset, str(skipped))
    assert dataset[2]['data_samples'].img_path != dataset.get_data_info(2)['img_path']
    assert '000000000003.png' in skipped.read_text()


@pytest.mark.parametrize('orientation, size', [(3, (48, 32)), (6, (32, 32))])
def test_a_warning_says_where_sizes_do_not_tell_if_boxes_follow_exif(
    data, tmp_path, warned, orientation, size
):
    path = turn(data, orientation, size)
    check_orientations(build(ONE_STAGE, data, 'train', tmp_path))
    (said,) = warned
    assert '1 of the 6 images checked' in said and str(path) in said and 'EXIF' in said


def test_images_loaded_as_stored_fit_annotations_of_stored_pixels(data, tmp_path, warned):
    turn(data, 6)
    dataset = build(ONE_STAGE, data, 'train', tmp_path)
    dataset.pipeline.transforms[0].color_type = 'color_ignore_orientation'
    check_orientations(dataset)
    assert dataset[0]['data_samples'].ori_shape == (32, 48)
    assert not warned


def test_an_image_that_exif_turns_and_its_label_map_does_not(data, tmp_path):
    image, labels = (
        data / 'ade' / folder / 'training' / f'000000000001.{suffix}'
        for folder, suffix in (('images', 'jpg'), ('annotations', 'png'))
    )
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.open(image).resize((64, 48)).save(image, exif=exif)
    Image.open(labels).resize((64, 48)).save(labels)
    dataset = build(SEGMENTOR, data, 'train', tmp_path)
    for find in (lambda: check_orientations(dataset), lambda: dataset[0]):
        said = refusal(find)
        assert str(image) in said and 'EXIF orientation, 8' in said and str(labels) in said


# Label maps


def edit_labels(data: Path, edit, split: str = 'training') -> Path:
    """Change all label maps of a split; the first."""
    paths = sorted((data / 'ade/annotations' / split).iterdir())
    for path in paths:
        cv2.imwrite(str(path), edit(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))
    return paths[0]


@pytest.mark.parametrize('channels', [3, 4])
@pytest.mark.parametrize('split, folder', [('train', 'training'), ('val', 'validation')])
def test_label_maps_of_colours(data, tmp_path, split, folder, channels):
    path = edit_labels(data, lambda labels: np.stack(channels * [labels], axis=-1), folder)
    dataset = build(SEGMENTOR, data, split, tmp_path)
    for find in (lambda: check_label_maps(dataset), lambda: dataset[0]):
        assert refusal(find) == (
            f"Label map '{path}' has {channels} channels; one channel of class numbers is needed."
        )


def test_a_label_map_with_a_palette_is_one_of_class_numbers(data, tmp_path):
    for path in (data / 'ade/annotations/training').iterdir():
        image = Image.fromarray(np.asarray(Image.open(path)), mode='P')
        image.putpalette(list(range(256)) * 3)
        image.save(path)
    dataset = build(SEGMENTOR, data, 'train', tmp_path)
    check_label_maps(dataset)
    assert dataset[0] is not None


@pytest.mark.parametrize('values', [(0, 255), (0, 0), (1, 1)])
def test_classes_without_a_pixel_are_named_with_the_labels_found(data, warned, values):
    edit_labels(data, lambda labels: np.where(labels > 1, values[1], values[0]).astype(np.uint8))
    names = ('background', 'thing')
    init_default_scope('mmseg')
    dataset = DATASETS.build(
        dict(
            type='BaseSegDataset',
            data_root=str(data / 'ade'),
            data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
            metainfo=dict(classes=names),
            pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')],
        )
    )
    check_label_maps(dataset)
    (said,) = warned
    absent = int(values[0] == 0)
    assert '1 of 2 classes have no pixel in the 6 label maps' in said
    assert f"'{names[absent]}' (label {absent})" in said
    assert f'Labels found: {", ".join(map(str, sorted(set(values))))};' in said
    assert ('not 0 and 255' in said) == (255 in values)


def test_label_maps_with_all_classes_give_no_warning(clean, tmp_path, warned):
    check_label_maps(build(SEGMENTOR, clean, 'train', tmp_path))
    assert not warned


def test_a_pipeline_and_a_data_set_that_reduce_labels_differently(data, tmp_path):
    dataset = build(SEGMENTOR, data, 'train', tmp_path)
    dataset.reduce_zero_label = False
    augmented = dict(type='TestTimeAug', transforms=[[dataset.pipeline.transforms[1]]])
    for pipeline in (dataset.pipeline, Compose([augmented])):
        dataset.pipeline = pipeline
        with pytest.raises(ConfigError, match='reduce_zero_label=True, the data set has False'):
            check_label_maps(dataset)


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
        f'tools/train.py {config} --work-dir {tmp_path} --cfg-options',
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
        f'tools/train.py {config} --work-dir {tmp_path} --skip-bad-images',
        *options,
    )
    assert process.wait() == 0, process.output[-3000:]
    assert "1 images were skipped, see '" in process.output
    assert (tmp_path / 'skipped_images.txt').read_text() == (
        f"Image '{bad}' is cut short or no image.\n"
    )
