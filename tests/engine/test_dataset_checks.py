"""Data sets that cannot be used are named before a run starts, in one sentence."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from crossformer_mm.engine.dataset_checks import check_label_maps, check_orientations
from crossformer_mm.errors import ConfigError

from ..trainings import DETECTOR, ONE_STAGE, SEGMENTOR
from .spoilt_data import TRAIN_JSON, VAL_JSON, build, change, refusal


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
def test_annotation_file_that_cannot_be_read(own_data, tmp_path, content):
    (own_data / TRAIN_JSON).write_text(content)
    said = refusal(lambda: build(DETECTOR, own_data, 'train', tmp_path))
    assert f"annotation file '{own_data / TRAIN_JSON}' " in said


@pytest.mark.parametrize('split, file', [('train', TRAIN_JSON), ('val', VAL_JSON)])
def test_annotated_image_that_is_not_there(own_data, tmp_path, split, file):
    change(own_data / file, lambda content: content['images'][1].update(file_name='none.png'))
    missing = own_data / 'coco' / f'{split}2017' / 'none.png'
    said = refusal(lambda: build(DETECTOR, own_data, split, tmp_path))
    assert (
        said
        == f"File '{missing}', which annotation file '{own_data / file}' names, does not exist."
    )


def test_label_map_that_is_not_there(own_data, tmp_path):
    missing = own_data / 'ade/annotations/training/000000000003.png'
    missing.unlink()
    assert str(missing) in refusal(lambda: build(SEGMENTOR, own_data, 'train', tmp_path))


def test_empty_annotations(own_data, tmp_path):
    change(own_data / TRAIN_JSON, lambda content: content.update(annotations=[]))
    said = refusal(lambda: build(DETECTOR, own_data, 'train', tmp_path))
    assert said.startswith(f"annotation file '{own_data / TRAIN_JSON}' leaves no image to use")


def test_folder_without_images(own_data, tmp_path):
    for image in (own_data / 'ade/images/training').iterdir():
        image.unlink()
    said = refusal(lambda: build(SEGMENTOR, own_data, 'train', tmp_path))
    assert said.startswith(
        f"image folder '{own_data / 'ade/images/training'}' leaves no image to use"
    )


def test_class_of_the_config_that_the_file_does_not_have(own_data, tmp_path):
    def rename(content):
        content['categories'][1]['name'] = 'box'

    change(own_data / TRAIN_JSON, rename)
    said = refusal(lambda: build(DETECTOR, own_data, 'train', tmp_path))
    assert said.startswith(
        "Class 'square' of the config's metainfo.classes is no category of "
        f"annotation file '{own_data / TRAIN_JSON}', which has 'disk', 'box'"
    )


def test_classes_in_another_order_than_in_the_file(own_data, tmp_path):
    # MMDetection would call a star a disk, and say nothing.
    change(own_data / TRAIN_JSON, lambda content: content['categories'].reverse())
    said = refusal(lambda: build(DETECTOR, own_data, 'train', tmp_path))
    assert "give them as 'star', 'triangle', 'square', 'disk'." in said


def test_class_of_the_file_that_the_config_does_not_have(own_data, tmp_path):
    def add(content):
        content['categories'].append(dict(id=9, name='ring'))
        content['annotations'][0]['category_id'] = 9

    whole = sum(
        len(build(DETECTOR, own_data, 'train', tmp_path).get_data_info(i)['instances'])
        for i in range(6)
    )
    change(own_data / TRAIN_JSON, add)
    dataset = build(DETECTOR, own_data, 'train', tmp_path)
    assert sum(len(dataset.get_data_info(i)['instances']) for i in range(6)) == whole - 1


# Sizes and EXIF orientations


def turn(own_data: Path, orientation: int, size=(48, 32), split: str = 'train') -> Path:
    """Give the first image an EXIF orientation; its annotations say how it is stored."""
    path = own_data / f'coco/{split}2017/000000000001.png'
    image = Image.open(path).convert('RGB').resize(size)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, format='JPEG', exif=exif)

    def resize(content):
        content['images'][0].update(width=size[0], height=size[1])
        for annotation in content['annotations']:  # polygons say nothing of the image's size
            annotation['segmentation'] = [[1, 1, 20, 1, 20, 20, 1, 20]]

    change(own_data / f'coco/annotations/instances_{split}2017.json', resize)
    return path


@pytest.mark.parametrize('kind', [DETECTOR, ONE_STAGE], ids=lambda kind: kind.name)
@pytest.mark.parametrize('split', ['train', 'val'])
def test_an_image_that_exif_turns_is_named_before_the_run_and_when_it_is_loaded(
    own_data, tmp_path, kind, split
):
    path = turn(own_data, 6, split=split)
    dataset = build(kind, own_data, split, tmp_path)
    for find in (lambda: check_orientations(dataset), lambda: dataset[0]):
        said = refusal(find)
        assert said.startswith(f"Image '{path}' is 32 x 48 pixels wide and high after its EXIF")
        assert '48 x 32 in annotation file' in said and 'color_ignore_orientation' in said


def test_an_image_of_another_size_than_its_annotation_file_says(own_data, tmp_path):
    change(own_data / TRAIN_JSON, lambda content: content['images'][2].update(height=40))
    dataset = build(ONE_STAGE, own_data, 'train', tmp_path)
    for find in (lambda: check_orientations(dataset), lambda: dataset[2]):
        said = refusal(find)
        assert '000000000003.png' in said and '48 x 48' in said and '48 x 40 in' in said
    skipped = tmp_path / 'skipped.txt'
    dataset = build(ONE_STAGE, own_data, 'train', tmp_path, skip_to=str(skipped))
    check_orientations(dataset, str(skipped))
    assert dataset[2]['data_samples'].img_path != dataset.get_data_info(2)['img_path']
    assert '000000000003.png' in skipped.read_text()


@pytest.mark.parametrize('orientation, size', [(3, (48, 32)), (6, (32, 32))])
def test_a_warning_says_where_sizes_do_not_tell_if_boxes_follow_exif(
    own_data, tmp_path, warned, orientation, size
):
    path = turn(own_data, orientation, size)
    check_orientations(build(ONE_STAGE, own_data, 'train', tmp_path))
    (said,) = warned
    assert '1 of the 6 images checked' in said and str(path) in said and 'EXIF' in said


def test_images_loaded_as_stored_fit_annotations_of_stored_pixels(own_data, tmp_path, warned):
    turn(own_data, 6)
    dataset = build(ONE_STAGE, own_data, 'train', tmp_path)
    dataset.pipeline.transforms[0].color_type = 'color_ignore_orientation'
    check_orientations(dataset)
    assert dataset[0]['data_samples'].ori_shape == (32, 48)
    assert not warned


def test_an_image_that_exif_turns_and_its_label_map_does_not(own_data, tmp_path):
    image, labels = (
        own_data / 'ade' / folder / 'training' / f'000000000001.{suffix}'
        for folder, suffix in (('images', 'jpg'), ('annotations', 'png'))
    )
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.open(image).resize((64, 48)).save(image, exif=exif)
    Image.open(labels).resize((64, 48)).save(labels)
    dataset = build(SEGMENTOR, own_data, 'train', tmp_path)
    for find in (lambda: check_orientations(dataset), lambda: dataset[0]):
        said = refusal(find)
        assert str(image) in said and 'EXIF orientation, 8' in said and str(labels) in said


# Label maps


def edit_labels(own_data: Path, edit, split: str = 'training') -> Path:
    """Change all label maps of a split; the first."""
    paths = sorted((own_data / 'ade/annotations' / split).iterdir())
    for path in paths:
        cv2.imwrite(str(path), edit(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))
    return paths[0]


@pytest.mark.parametrize('channels', [3, 4])
@pytest.mark.parametrize('split, folder', [('train', 'training'), ('val', 'validation')])
def test_label_maps_of_colours(own_data, tmp_path, split, folder, channels):
    path = edit_labels(own_data, lambda labels: np.stack(channels * [labels], axis=-1), folder)
    dataset = build(SEGMENTOR, own_data, split, tmp_path)
    for find in (lambda: check_label_maps(dataset), lambda: dataset[0]):
        assert refusal(find) == (
            f"Label map '{path}' has {channels} channels; one channel of class numbers is needed."
        )


def test_a_label_map_with_a_palette_is_one_of_class_numbers(own_data, tmp_path):
    for path in (own_data / 'ade/annotations/training').iterdir():
        image = Image.fromarray(np.asarray(Image.open(path)), mode='P')
        image.putpalette(list(range(256)) * 3)
        image.save(path)
    dataset = build(SEGMENTOR, own_data, 'train', tmp_path)
    check_label_maps(dataset)
    assert dataset[0] is not None


@pytest.mark.parametrize('values', [(0, 255), (0, 0), (1, 1)])
def test_classes_without_a_pixel_are_named_with_the_labels_found(own_data, warned, values):
    edit_labels(
        own_data, lambda labels: np.where(labels > 1, values[1], values[0]).astype(np.uint8)
    )
    names = ('background', 'thing')
    init_default_scope('mmseg')
    dataset = DATASETS.build(
        dict(
            type='BaseSegDataset',
            data_root=str(own_data / 'ade'),
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


def test_a_pipeline_and_a_data_set_that_reduce_labels_differently(own_data, tmp_path):
    dataset = build(SEGMENTOR, own_data, 'train', tmp_path)
    dataset.reduce_zero_label = False
    augmented = dict(type='TestTimeAug', transforms=[[dataset.pipeline.transforms[1]]])
    for pipeline in (dataset.pipeline, Compose([augmented])):
        dataset.pipeline = pipeline
        with pytest.raises(ConfigError, match='reduce_zero_label=True, the data set has False'):
            check_label_maps(dataset)
