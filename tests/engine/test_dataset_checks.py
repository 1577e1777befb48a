"""Data sets that cannot be used are named before a run starts, in one sentence."""

from pathlib import Path

import numpy as np
import pytest
from mmengine.dataset import Compose
from mmseg.datasets import BaseSegDataset
from PIL import Image

from crossformer_mm.engine.dataset_checks import check_label_maps, check_orientations
from crossformer_mm.errors import ConfigError

from ..trainings import DETECTOR, ONE_STAGE, SEGMENTOR
from .spoilt_data import TRAIN_JSON, VAL_JSON, build, change, count_objects, edit_labels, refusal

BOX_OF_TEXT = '''{
"images": [{"id": 1, "file_name": "1.png", "height": 9, "width": 9}],
"annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": ["a", 0, 1, 1]}],
"categories": [{"id": 1, "name": "disk"}]}'''


@pytest.mark.parametrize(
    'content', ['', '{"images": [', '[]', '{}', '{"images": [{}]}', BOX_OF_TEXT]
)
def test_annotation_file_that_cannot_be_read(own_data, content):
    (own_data / TRAIN_JSON).write_text(content)
    said = refusal(build, DETECTOR, own_data, 'train')
    assert f"annotation file '{own_data / TRAIN_JSON}' " in said


@pytest.mark.parametrize('split, file', [('train', TRAIN_JSON), ('val', VAL_JSON)])
def test_annotated_image_that_is_not_there(own_data, split, file):
    change(own_data / file, lambda content: content['images'][1].update(file_name='none.png'))
    missing = own_data / f'coco/{split}2017/none.png'
    said = refusal(build, DETECTOR, own_data, split)
    assert said.startswith(f"File '{missing}', which annotation file '{own_data / file}' names")
    assert 'does not exist' in said


def test_label_map_that_is_not_there(own_data):
    missing = own_data / 'ade/annotations/training/000000000003.png'
    missing.unlink()
    assert str(missing) in refusal(build, SEGMENTOR, own_data, 'train')


def test_folder_without_images(own_data):
    for image in (own_data / 'ade/images/training').iterdir():
        image.unlink()
    said = refusal(build, SEGMENTOR, own_data, 'train')
    assert f"image folder '{own_data}/ade/images/training' leaves no image to use" in said


@pytest.mark.parametrize(
    'edit, expected',
    [
        (lambda content: content.update(annotations=[]), "{file} leaves no image to use"),
        (
            lambda content: content['categories'][1].update(name='box'),
            "Class 'square' of the config's metainfo.classes is no category of {file}, which has "
            "'disk', 'box'",
        ),
        # MMDetection would call a star a disk, and say nothing.
        (
            lambda content: content['categories'].reverse(),
            "give them as 'star', 'triangle', 'square', 'disk'.",
        ),
    ],
    ids=['no annotations', 'a class is missing', 'classes in another order'],
)
def test_annotations_that_do_not_fit_the_config(own_data, edit, expected):
    change(own_data / TRAIN_JSON, edit)
    said = refusal(build, DETECTOR, own_data, 'train')
    assert expected.format(file=f"annotation file '{own_data / TRAIN_JSON}'") in said


def test_class_of_the_file_that_the_config_does_not_have(own_data):
    def add(content):
        content['categories'].append(dict(id=9, name='ring'))
        content['annotations'][0]['category_id'] = 9

    whole = count_objects(build(DETECTOR, own_data, 'train'))
    change(own_data / TRAIN_JSON, add)
    assert count_objects(build(DETECTOR, own_data, 'train')) == whole - 1


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
def test_an_image_that_exif_turns_is_named_before_the_run_and_when_loaded(own_data, kind, split):
    path = turn(own_data, 6, split=split)
    dataset = build(kind, own_data, split)
    for find in (lambda: check_orientations(dataset), lambda: dataset[0]):
        said = refusal(find)
        assert said.startswith(f"Image '{path}' is 32 x 48 pixels wide and high after its EXIF")
        assert '48 x 32 in annotation file' in said and 'color_ignore_orientation' in said


def test_an_image_of_another_size_than_its_annotation_file_says(own_data, tmp_path):
    change(own_data / TRAIN_JSON, lambda content: content['images'][2].update(height=40))
    dataset = build(ONE_STAGE, own_data, 'train')
    for find in (lambda: check_orientations(dataset), lambda: dataset[2]):
        said = refusal(find)
        assert '000000000003.png' in said and '48 x 48' in said and '48 x 40 in' in said
    skipped = tmp_path / 'skipped.txt'
    dataset = build(ONE_STAGE, own_data, 'train', skip_to=str(skipped))
    check_orientations(dataset, str(skipped))
    assert dataset[2]['data_samples'].img_path != dataset.get_data_info(2)['img_path']
    assert '000000000003.png' in skipped.read_text()


@pytest.mark.parametrize('orientation, size', [(3, (48, 32)), (6, (32, 32))])
def test_boxes_that_may_not_follow_exif_are_warned_of(own_data, warned, orientation, size):
    path = turn(own_data, orientation, size)
    check_orientations(build(ONE_STAGE, own_data, 'train'))
    (said,) = warned
    assert '1 of the 6 images checked' in said and str(path) in said and 'EXIF' in said


def test_images_loaded_as_stored_fit_annotations_of_stored_pixels(own_data, warned):
    turn(own_data, 6)
    dataset = build(ONE_STAGE, own_data, 'train')
    dataset.pipeline.transforms[0].color_type = 'color_ignore_orientation'
    check_orientations(dataset)
    assert dataset[0]['data_samples'].ori_shape == (32, 48)
    assert not warned


def test_an_image_that_exif_turns_and_its_label_map_does_not(own_data):
    image = own_data / 'ade/images/training/000000000001.jpg'
    labels = own_data / 'ade/annotations/training/000000000001.png'
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.open(image).resize((64, 48)).save(image, exif=exif)
    Image.open(labels).resize((64, 48)).save(labels)
    dataset = build(SEGMENTOR, own_data, 'train')
    for find in (lambda: check_orientations(dataset), lambda: dataset[0]):
        said = refusal(find)
        assert str(image) in said and 'EXIF orientation, 8' in said and str(labels) in said


# Label maps


@pytest.mark.parametrize('channels', [3, 4])
@pytest.mark.parametrize('split, folder', [('train', 'training'), ('val', 'validation')])
def test_label_maps_of_colours(own_data, split, folder, channels):
    path = edit_labels(own_data, lambda labels: np.stack(channels * [labels], axis=-1), folder)
    dataset = build(SEGMENTOR, own_data, split)
    for find in (lambda: check_label_maps(dataset), lambda: dataset[0]):
        assert refusal(find) == (
            f"Label map '{path}' has {channels} channels; one channel of class numbers is needed."
        )


def test_a_label_map_with_a_palette_is_one_of_class_numbers(own_data):
    for path in (own_data / 'ade/annotations/training').iterdir():
        image = Image.fromarray(np.asarray(Image.open(path)), mode='P')
        image.putpalette(list(range(256)) * 3)
        image.save(path)
    dataset = build(SEGMENTOR, own_data, 'train')
    check_label_maps(dataset)
    assert dataset[0] is not None


@pytest.mark.parametrize('values', [(0, 255), (0, 0), (1, 1)])
def test_classes_without_a_pixel_are_named_with_the_labels_found(own_data, warned, values):
    edit_labels(own_data, lambda labels: np.uint8(values)[np.uint8(labels > 1)])
    names = ('background', 'thing')
    dataset = BaseSegDataset(
        data_root=str(own_data / 'ade'),
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        metainfo=dict(classes=names),
        pipeline=[dict(type='mmcv.LoadImageFromFile'), dict(type='mmseg.LoadAnnotations')],
    )
    check_label_maps(dataset)
    (said,) = warned
    absent = int(values[0] == 0)
    assert '1 of 2 classes have no pixel in the 6 label maps' in said
    assert f"'{names[absent]}' (label {absent})" in said
    assert f'Labels found: {", ".join(map(str, sorted(set(values))))};' in said
    assert ('not 0 and 255' in said) == (255 in values)


def test_label_maps_with_all_classes_give_no_warning(clean, warned):
    check_label_maps(build(SEGMENTOR, clean, 'train'))
    assert not warned


def test_a_pipeline_and_a_data_set_that_reduce_labels_differently(own_data):
    dataset = build(SEGMENTOR, own_data, 'train')
    dataset.reduce_zero_label = False
    augmented = dict(type='TestTimeAug', transforms=[[dataset.pipeline.transforms[1]]])
    for pipeline in (dataset.pipeline, Compose([augmented])):
        dataset.pipeline = pipeline
        with pytest.raises(ConfigError, match='reduce_zero_label=True, the data set has False'):
            check_label_maps(dataset)
