"""Annotations in COCO's format that training, validation and pycocotools cannot use."""

import json
from itertools import repeat
from pathlib import Path
from typing import Iterable

import pytest
from mmdet.evaluation import CocoMetric

from crossformer_mm.engine.coco_checks import check_coco_metric

from ..helpers import CLASSES
from ..trainings import DETECTOR, ONE_STAGE
from .spoilt_data import TRAIN_JSON, VAL_JSON, build, change, count_objects, refusal

ABSENT, NAN = object(), float('nan')
FAULTS = {
    'no segmentation': dict(segmentation=ABSENT),
    'empty segmentation': dict(segmentation=[]),
    'segmentation null': dict(segmentation=None),
    'two points': dict(segmentation=[[1, 1, 5, 5]]),
    'one flat list': dict(segmentation=[1, 1, 5, 1, 5, 5]),
    'NaN in a polygon': dict(segmentation=[[1, 1, 5, 1, 5, NAN]]),
    'RLE of another size': dict(segmentation=dict(size=[9, 9], counts=[0, 81])),
    'RLE of too few pixels': dict(segmentation=dict(size=[48, 48], counts=[0, 9])),
    'NaN in a box': dict(bbox=[1, 1, NAN, 5]),
    'box of text': dict(bbox=['1', '1', '5', '5']),
    'no area': dict(area=ABSENT),
    'no box': dict(bbox=ABSENT),
}
FAULTS_IN_PYCOCOTOOLS = {
    **FAULTS,
    'no iscrowd': dict(iscrowd=ABSENT),
    'a polygon of two points before a good one': dict(
        segmentation=[[1, 1, 5, 5], [1, 1, 9, 1, 9, 9]]
    ),
}


def change_objects(file: Path, changes: Iterable[dict]) -> list:
    """Change the first objects of an annotation file, each in its own way; return all objects."""

    def edit(content):
        for annotation, fault in zip(content['annotations'], changes):
            for key, value in fault.items():
                annotation[key] = value
                if value is ABSENT:
                    del annotation[key]

    change(file, edit)
    return json.loads(file.read_text())['annotations']


@pytest.mark.parametrize('fault', FAULTS)
@pytest.mark.parametrize('split, file', [('train', TRAIN_JSON), ('val', VAL_JSON)])
def test_an_unusable_annotation_is_named_before_the_run(own_data, split, file, fault):
    first, *_ = change_objects(own_data / file, [FAULTS[fault]])
    said = refusal(build, DETECTOR, own_data, split)
    assert said.startswith(f"Annotation {first['id']} of image '")
    assert f"in annotation file '{own_data / file}' has " in said


def test_boxes_alone_need_no_masks(own_data):
    change_objects(own_data / TRAIN_JSON, repeat(dict(segmentation=ABSENT)))
    assert build(ONE_STAGE, own_data, 'train')[0] is not None


def test_images_with_unusable_annotations_can_be_skipped(own_data, tmp_path):
    change_objects(own_data / TRAIN_JSON, [FAULTS['no segmentation']])
    skipped = tmp_path / 'skipped.txt'
    dataset = build(DETECTOR, own_data, 'train', skip_to=str(skipped))
    assert len(dataset) == 5
    assert 'has no segmentation' in skipped.read_text() and skipped.read_text().count('\n') == 1


def test_a_training_file_of_empty_objects_only(own_data):
    # As converters write that do not compute areas. MMDetection drops such objects.
    change_objects(own_data / TRAIN_JSON, repeat(dict(area=0)))
    said = refusal(build, DETECTOR, own_data, 'train')
    assert 'are left out: their area is 0' in said and str(own_data / TRAIN_JSON) in said


def test_objects_that_mmdetection_drops_are_counted(own_data, warned):
    empty = dict(bbox=[5, 5, 3, 0], area=0)  # as two objects of COCO 2017
    objects = change_objects(own_data / TRAIN_JSON, [empty, dict(bbox=[-9, 5, 8, 8])])
    dataset = build(DETECTOR, own_data, 'train')
    assert count_objects(dataset) == len(objects) - 2
    assert f'2 of {len(objects)} objects in annotation file' in ''.join(warned)


def check_metric(own_data: Path, *kinds: str, image_ids=(1, 2, 3, 4, 5)) -> None:
    """Check a ``CocoMetric`` on the validation file, as before a run."""
    metric = CocoMetric(ann_file=str(own_data / VAL_JSON), metric=list(kinds))
    check_coco_metric(metric, 'FILE', image_ids, list(CLASSES))


@pytest.mark.parametrize('fault', FAULTS_IN_PYCOCOTOOLS)
def test_what_pycocotools_cannot_use_is_named(own_data, fault):
    change_objects(own_data / VAL_JSON, [FAULTS_IN_PYCOCOTOOLS[fault]])
    said = refusal(check_metric, own_data, 'bbox', 'segm')
    assert said.startswith('Annotation 1 of image') and ' in FILE has ' in said


def test_a_metric_of_boxes_needs_no_masks(own_data):
    change_objects(own_data / VAL_JSON, [FAULTS['no segmentation']])
    check_metric(own_data, 'bbox')


def test_a_metric_with_other_images_or_classes_than_the_data_set(own_data):
    said = refusal(check_metric, own_data, 'bbox', image_ids=[1, 2, 9])
    assert 'image with id 9 ' in said
    change(own_data / VAL_JSON, lambda content: content['categories'].reverse())
    assert "give them as 'star'" in refusal(check_metric, own_data, 'bbox')


def test_annotation_ids_from_zero_are_named_for_pycocotools_miscounts_them(own_data, warned):
    change_objects(own_data / VAL_JSON, [dict(id=0)])
    check_metric(own_data, 'bbox')
    assert 'An annotation has id 0 in FILE' in ''.join(warned)
