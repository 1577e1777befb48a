"""Results of predictions: ids, COCO's format, and the files of a folder of results."""

import json
from collections import Counter
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import numpy as np

from .errors import UserError
from .files import write_whole
from .model import best_classes

KINDS = ('bbox', 'segm', 'classes')  # of results, each in a file results.KIND.json


def picture_path(out: Path, stem: str, video: bool = False) -> Path:
    return out / 'pictures' / f'{stem}.{"mp4" if video else "jpg"}'


def label_path(out: Path, stem: str) -> Path:
    return out / 'labels' / f'{stem}.png'


class Ids:
    """Ids of images and of categories: counted, or those of COCO annotations.

    Args:
        ann_file: of the annotations; None: ids are counted.
        classes: names of the categories.
        first: id of the first category if they are counted.

    Raises:
        UserError: the annotations cannot be used.
    """

    def __init__(self, ann_file: Optional[str], classes: Sequence[str], first: int = 1):
        self.images: Optional[dict] = None
        self.classes = classes
        self.categories = list(range(first, first + len(classes)))
        if not ann_file:
            return
        try:
            known = json.loads(Path(ann_file).read_text(encoding='utf-8'))
            listed = [image['file_name'] for image in known['images']]
            self.images = dict(zip(listed, [image['id'] for image in known['images']]))
            by_name = {category['name']: category['id'] for category in known['categories']}
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"--ann-file: '{ann_file}' is no file of COCO annotations.") from None
        if len(self.images) < len(listed):
            twice = Counter(listed).most_common(1)[0][0]
            raise UserError(f"--ann-file: '{ann_file}' lists the image '{twice}' more than once.")
        unknown = [name for name in classes if name not in by_name]
        if unknown:
            raise UserError(
                f"--ann-file: '{ann_file}' has no category '{unknown[0]}', which the model has."
            )
        self.categories = [by_name[name] for name in classes]

    def annotated(self, files: Sequence[Path], names: Sequence[str]) -> Optional[List[int]]:
        """Look up images by as much of the end of their paths as the annotations have.

        Args:
            files: of the images.
            names: of the images, for error messages.

        Returns:
            list: an id for each; None without annotations.

        Raises:
            UserError: an image is not annotated, or two are one image in the annotations.
        """
        if self.images is None:
            return None
        found: Dict[int, str] = {}
        for file, name in zip(files, names):
            parts = file.absolute().parts
            ends = ('/'.join(parts[start:]) for start in range(len(parts)))
            known = [self.images[end] for end in ends if end in self.images]
            if not known:
                raise UserError(f"--ann-file: it names no image '{name}'.")
            if known[0] in found:
                raise UserError(
                    f"--ann-file: '{found[known[0]]}' and '{name}' are one image in it."
                )
            found[known[0]] = name
        return list(found)


class Results:
    """Files of a folder of results: images.json and results.KIND.json.

    As a context it writes them at the end, also after an error, so that the results of the images
    before it are kept.

    Args:
        out: the folder. Results of an earlier run are removed from it.
        ids: of the categories.
    """

    def __init__(self, out: Path, ids: Ids):
        self.out, self.ids = out, ids
        self.kinds: Dict[str, List[dict]] = {}
        self.images: List[dict] = []
        self.skipped: List[dict] = []
        for name in ('images', *(f'results.{kind}' for kind in KINDS)):
            (out / f'{name}.json').unlink(missing_ok=True)

    def add(self, kind: str, found: List[dict]) -> None:
        """Add results of one of KINDS, in COCO's format."""
        self.kinds.setdefault(kind, []).extend(found)

    def skip(self, name: str, reason: str) -> None:
        """Note a file, or a frame, that could not be read or written, if there is a reason."""
        if reason:
            self.skipped.append(dict(file_name=name, reason=reason))

    def __enter__(self) -> 'Results':
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not None and not issubclass(kind, Exception):
            return
        for name, found in self.kinds.items():
            write_whole(self.out / f'results.{name}.json', json.dumps(found).encode())
        categories = [
            dict(id=id_, name=name) for id_, name in zip(self.ids.categories, self.ids.classes)
        ]
        listed = dict(images=self.images, categories=categories, skipped=self.skipped)
        write_whole(self.out / 'images.json', json.dumps(listed, indent=1).encode())


def in_coco_format(found: dict, image: int, categories: Sequence[int]) -> Dict[str, List[dict]]:
    """Convert a detector's results for an image to COCO's format, by kind.

    Args:
        found: lists of ``labels``, ``scores``, ``bboxes`` (left, top, right, bottom) and, if there
            are any, ``masks`` as RLE, with ``mask_scores`` if their scores are others.
        image: id of the image.
        categories: id of each label.
    """
    labels = [categories[label] for label in found['labels']]
    boxes = [
        [left, top, right - left, bottom - top] for left, top, right, bottom in found['bboxes']
    ]
    parts = dict(bbox=('bbox', found['scores'], boxes))
    if 'masks' in found:
        parts['segm'] = 'segmentation', found.get('mask_scores', found['scores']), found['masks']
    return {
        kind: [
            {'image_id': image, 'category_id': label, 'score': score, key: value}
            for label, score, value in zip(labels, scores, values)
        ]
        for kind, (key, scores, values) in parts.items()
    }


def classes_in_coco_format(scores: np.ndarray, image: int) -> List[dict]:
    """Convert a classifier's scores (classes,) for an image to one result for each best class."""
    return [
        dict(image_id=image, category_id=label, score=float(scores[label]))
        for label in best_classes(scores)
    ]
