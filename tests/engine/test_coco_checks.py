"""Annotations in COCO's format that training, validation and pycocotools cannot use."""

import json
from pathlib import Path

import pytest

from crossformer_mm.engine.coco_checks import check_coco_metric

from ..trainings import DETECTOR, ONE_STAGE
from .spoilt_data import TRAIN_JSON, VAL_JSON, build, change, refusal


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
def test_an_unusable_annotation_is_named_before_the_run(own_data, tmp_path, split, file, fault):
    change(own_data / file, lambda content: FAULTS[fault](content['annotations'][0]))
    annotation = json.loads((own_data / file).read_text())['annotations'][0]
    said = refusal(lambda: build(DETECTOR, own_data, split, tmp_path))
    assert said.startswith(f"Annotation {annotation['id']} of image '")
    assert f"in annotation file '{own_data / file}' has " in said


def test_boxes_alone_need_no_masks(own_data, tmp_path):
    def remove(content):
        for annotation in content['annotations']:
            del annotation['segmentation']

    change(own_data / TRAIN_JSON, remove)
    assert build(ONE_STAGE, own_data, 'train', tmp_path)[0] is not None


def test_images_with_unusable_annotations_can_be_skipped(own_data, tmp_path):
    change(own_data / TRAIN_JSON, lambda content: no_segmentation(content['annotations'][0]))
    skipped = tmp_path / 'skipped.txt'
    dataset = build(DETECTOR, own_data, 'train', tmp_path, skip_to=str(skipped))
    assert len(dataset) == 5
    assert 'has no segmentation' in skipped.read_text() and skipped.read_text().count('\n') == 1


def test_a_training_file_of_empty_objects_only(own_data, tmp_path):
    # As converters write that do not compute areas. MMDetection drops such objects.
    change(
        own_data / TRAIN_JSON,
        lambda content: [annotation.update(area=0) for annotation in content['annotations']],
    )
    said = refusal(lambda: build(DETECTOR, own_data, 'train', tmp_path))
    assert 'are left out: their area is 0' in said and str(own_data / TRAIN_JSON) in said


def test_objects_that_mmdetection_drops_are_counted(own_data, tmp_path, warned):
    def shrink(content):
        content['annotations'][0].update(bbox=[5, 5, 3, 0], area=0)  # as two objects of COCO 2017
        content['annotations'][1].update(bbox=[-9, 5, 8, 8])

    objects = len(json.loads((own_data / TRAIN_JSON).read_text())['annotations'])
    change(own_data / TRAIN_JSON, shrink)
    dataset = build(DETECTOR, own_data, 'train', tmp_path)
    kept = sum(len(dataset.get_data_info(i)['instances']) for i in range(6))
    assert kept == objects - 2
    assert f'2 of {objects} objects in annotation file' in ''.join(warned)


class Metric:
    """A ``CocoMetric`` on the validation file, checked as before a run."""

    def __init__(self, own_data: Path, *kinds: str):
        from mmdet.evaluation import CocoMetric

        self.metric = CocoMetric(ann_file=str(own_data / VAL_JSON), metric=list(kinds))

    def check(self, image_ids=(1, 2, 3, 4, 5)) -> None:
        classes = ['disk', 'square', 'triangle', 'star']
        check_coco_metric(self.metric, 'FILE', image_ids, classes)


@pytest.mark.parametrize(
    'fault', [*FAULTS, 'no iscrowd', 'a polygon of two points before a good one']
)
def test_what_pycocotools_cannot_use_is_named(own_data, fault):
    faults = {
        **FAULTS,
        'no iscrowd': lambda annotation: annotation.pop('iscrowd'),
        'a polygon of two points before a good one': lambda annotation: annotation.update(
            segmentation=[[1, 1, 5, 5], [1, 1, 9, 1, 9, 9]]
        ),
    }
    change(own_data / VAL_JSON, lambda content: faults[fault](content['annotations'][0]))
    said = refusal(Metric(own_data, 'bbox', 'segm').check)
    assert said.startswith('Annotation 1 of image') and ' in FILE has ' in said


def test_a_metric_of_boxes_needs_no_masks(own_data):
    change(own_data / VAL_JSON, lambda content: no_segmentation(content['annotations'][0]))
    Metric(own_data, 'bbox').check()


def test_a_metric_with_other_images_or_classes_than_the_data_set(own_data):
    assert 'image with id 9 ' in refusal(lambda: Metric(own_data, 'bbox').check([1, 2, 9]))
    change(own_data / VAL_JSON, lambda content: content['categories'].reverse())
    assert "give them as 'star'" in refusal(Metric(own_data, 'bbox').check)


def test_annotation_ids_from_zero_are_named_for_pycocotools_miscounts_them(own_data, warned):
    def count_from_zero(content):
        for annotation in content['annotations']:
            annotation['id'] -= 1

    change(own_data / VAL_JSON, count_from_zero)
    Metric(own_data, 'bbox').check()
    assert 'An annotation has id 0 in FILE' in ''.join(warned)
