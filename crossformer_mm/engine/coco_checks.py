"""Check annotation files in COCO's format before MMDetection and pycocotools use them."""

import math
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional

from ..config_parts import metrics_of
from ..errors import DataError, said
from ..openmmlab import warn
from .dataset_access import leaves


@contextmanager
def annotations_checked(skip: Optional[Callable[[DataError], None]] = None) -> Iterator[None]:
    """Check the annotation files that MMDetection's ``CocoDataset`` reads inside this context.

    Args:
        skip (Callable, optional): takes the error of an image with unusable annotations, which is
            then left out. None: the error is raised.

    Raises:
        DataError: unusable annotations; categories that do not match ``metainfo.classes``.
    """
    try:
        from mmdet.datasets import CocoDataset
    except ImportError:
        yield
        return
    # The class keeps nothing of the file once it has read it, and ``COCOAPI``, the part of it that
    # can be replaced, does not know the data set.
    load = CocoDataset.load_data_list

    def load_and_check(dataset) -> List[dict]:
        read: List[Any] = []

        def api(path):
            read.append(type(dataset).COCOAPI(path))
            # A subclass may well read what this class cannot.
            if type(dataset).parse_data_info is CocoDataset.parse_data_info:
                check_training_file(dataset, read[0], skip)
            return read[0]

        dataset.COCOAPI = api
        try:
            data = load(dataset)
        finally:
            del dataset.COCOAPI
        classes = dataset.metainfo.get('classes')
        if read and read[0].cats and classes:
            source = f"annotation file '{dataset.ann_file}'"
            check_categories(source, read[0].cats, dataset.cat_ids, list(classes))
            names = (category['name'] for category in read[0].cats.values())
            if left_out := [name for name in names if name not in classes]:
                warn(
                    f"Objects of {', '.join(map(repr, left_out))} in {source} are left out: the "
                    "config's metainfo.classes do not name them."
                )
        return data

    CocoDataset.load_data_list = load_and_check
    try:
        yield
    finally:
        CocoDataset.load_data_list = load


def check_training_file(dataset, coco, skip: Optional[Callable[[DataError], None]]) -> None:
    """Check annotations before a ``CocoDataset`` parses them; unusable images go to ``skip``."""
    from mmdet.datasets.transforms import LoadAnnotations

    source = f"annotation file '{dataset.ann_file}'"
    masks = any(
        type(step) is LoadAnnotations and step.with_mask for step in dataset.pipeline.transforms
    )
    used = set(coco.get_cat_ids(cat_names=dataset.metainfo.get('classes') or []))
    faults: Dict[Any, DataError] = {}
    count = dropped = 0
    for annotation, image in annotations_of(coco):
        fault = fault_of_box(annotation)
        if not fault and annotation.get('category_id') in used and not annotation.get('ignore'):
            count += 1
            if is_dropped(annotation, image):
                dropped += 1
            elif masks:
                fault = fault_of_mask(annotation, image)
        if fault:
            faults.setdefault(image['id'], error_of(annotation, image, source, fault))
    if faults and skip is None:
        raise first_of(faults.values())
    for image_id, error in faults.items():
        skip(error)  # type: ignore[misc]
        del coco.imgs[image_id]
    if dropped:
        message = (
            f'{dropped} of {count} objects in {source} are left out: their area is 0, or their '
            'box is less than a pixel wide or high or outside of the image.'
        )
        if dropped == count and not dataset.test_mode:
            raise DataError(message)
        warn(message)


def check_metrics(runner, mode: str, loop) -> None:
    """Raise a DataError if a COCO metric of a loop cannot use its annotation file."""
    try:
        from mmdet.evaluation import CocoMetric
    except ImportError:
        return
    classes = getattr(loop.dataloader.dataset, 'metainfo', {}).get('classes')
    classes = list(classes) if classes and not isinstance(classes, str) else None
    configs = dict(enumerate(metrics_of(runner.cfg, mode)))
    for number, metric in enumerate(loop.evaluator.metrics):
        if not isinstance(metric, CocoMetric):
            continue
        # A subclass with results of its own form, such as rotated boxes, reads annotations of it.
        own_form = not type(metric).results2json.__module__.startswith('mmdet.')
        # _coco_api is the only place of the file that the metric has read.
        if not own_form and metric._coco_api is not None:
            config = configs.get(number)
            named = config.get('ann_file') if isinstance(config, dict) else None
            image_ids = [
                dataset.get_data_info(index)['img_id']
                for dataset in leaves(loop.dataloader.dataset)
                for index in range(len(dataset))
            ]
            source = f"annotation file '{named or ''}' of {mode}_evaluator"
            check_coco_metric(metric, source, image_ids, classes)


def check_coco_metric(
    metric, source: str, image_ids: Iterable, classes: Optional[List[str]]
) -> None:
    """Raise a DataError if pycocotools cannot use the annotation file of a ``CocoMetric``, or if
    the file, called ``source``, lacks an evaluated image or one of the data set's classes."""
    coco = metric._coco_api
    used = coco.get_cat_ids(cat_names=classes or [])
    faults = []
    for annotation, image in annotations_of(coco):
        if annotation['category_id'] not in used:
            continue
        fault = fault_of_box(annotation) or fault_of_number(annotation, 'iscrowd')
        if not fault and 'segm' in metric.metrics:
            fault = fault_of_mask(annotation, image)
            if not fault:
                try:
                    coco.annToRLE(annotation)
                except Exception as error:  # of the C code, which fails in any way
                    fault = f'has a segmentation that pycocotools cannot read: {said(error)}'
        if fault:
            faults.append(error_of(annotation, image, source, fault))
    if faults:
        raise first_of(faults)
    absent = [image_id for image_id in image_ids if image_id not in coco.imgs]
    if absent:
        raise DataError(
            f'The image with id {absent[0]!r} (and {len(absent) - 1} more) of the data set is not '
            f'in {source}.'
        )
    if classes:
        check_categories(source, coco.cats, used, classes)
    if 0 in coco.anns:
        warn(
            f'An annotation has id 0 in {source}. pycocotools counts a correct detection of this '
            'object as wrong: number annotations from 1.'
        )


def annotations_of(coco) -> Iterator:
    """Yield each annotation with its image; others belong to no image and are never used."""
    for annotation in coco.anns.values():
        image = coco.imgs.get(annotation['image_id'])
        if image is not None:
            yield annotation, image


def error_of(annotation: dict, image: dict, source: str, fault: str) -> DataError:
    return DataError(
        f"Annotation {annotation['id']} of image '{image.get('file_name')}' in {source} {fault}."
    )


def first_of(errors: Iterable[DataError]) -> DataError:
    first, *others = errors
    more = f' {len(others)} more have faults.' if others else ''
    return DataError(f'{first}{more}')


def is_finite(values: Iterable) -> bool:
    """Check whether all values are finite numbers."""
    try:
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def fault_of_number(annotation: dict, key: str) -> str:
    """Return the fault of a required number, or ''."""
    if key not in annotation:
        return f"has no '{key}'"
    return '' if is_finite([annotation[key]]) else f'has {key} {annotation[key]!r}, not a number'


def fault_of_box(annotation: dict) -> str:
    """Return the fault of an annotation's box and area, or ''."""
    box = annotation.get('bbox')
    if not isinstance(box, list) or len(box) != 4 or not is_finite(box):
        return f'has bbox {box!r}, needed are 4 numbers: left, top, width, height'
    return fault_of_number(annotation, 'area')


def fault_of_mask(annotation: dict, image: dict) -> str:
    """Return the fault of an annotation's mask, or ''.

    MMDetection itself drops polygons of less than 3 points from a mask that has others.
    """
    mask = annotation.get('segmentation')
    if not mask:
        return 'has no segmentation, and this config uses masks'
    if isinstance(mask, list):
        if not all(isinstance(polygon, list) and is_finite(polygon) for polygon in mask):
            return 'has a segmentation that is no list of polygons of finite numbers'
        if not any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in mask):
            return 'has a segmentation of less than 3 points (x, y), which is no mask'
        return ''
    size: List[Any] = [image.get('height'), image.get('width')]
    if not isinstance(mask, dict) or not isinstance(mask.get('counts'), (list, str)):
        return 'has a segmentation that is neither polygons nor RLE'
    if mask.get('size') != size:
        return f"has RLE of size {mask.get('size')}, the image's height and width are {size}"
    if isinstance(mask['counts'], list) and sum(mask['counts']) != size[0] * size[1]:
        return f"has RLE counts that add up to {sum(mask['counts'])}, not to {size[0]} x {size[1]}"
    return ''


def is_dropped(annotation: dict, image: dict) -> bool:
    """Check whether ``CocoDataset`` drops an object."""
    x, y, width, height = annotation['bbox']
    return (
        min(width, height) < 1
        or annotation['area'] <= 0
        or min(x + width, image['width']) <= max(x, 0)
        or min(y + height, image['height']) <= max(y, 0)
    )


def check_categories(source: str, categories: dict, used: list, classes: List[str]) -> None:
    """Raise a DataError if the file lacks a class, or has another order than ``metainfo.classes``:
    MMDetection numbers labels by the order of the file's categories."""
    there = [category['name'] for category in categories.values()]
    absent = [name for name in classes if name not in there]
    if absent:
        raise DataError(
            f"Class '{absent[0]}' of the config's metainfo.classes is no category of "
            f"{source}, which has {', '.join(map(repr, there))}."
        )
    order = [categories[number]['name'] for number in used]
    if order != classes:
        raise DataError(
            f"The config's metainfo.classes are in another order than in {source}, by "
            f"which labels are numbered: give them as {', '.join(map(repr, order))}."
        )
