"""Prediction on image files with an exported model, and pictures of the results."""

import time
from itertools import compress
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import cv2
import numpy as np

from .errors import UserError
from .files import read_image, unique_names, write_image, write_labels
from .model import Model, best_classes
from .results import (
    KINDS,
    Ids,
    Results,
    classes_in_coco_format,
    in_coco_format,
    label_path,
    picture_path,
)


def predict_files(
    model: Model, files: Sequence[Path], out: Path, ann_file: Optional[str], score_thr: float
) -> Tuple[Results, float]:
    """Predict on image files, and write pictures, results, label maps and images.json.

    Args:
        model: the model.
        files: the images.
        out: folder to write.
        ann_file: COCO annotations whose ids the results get.
        score_thr: lowest score of the objects in pictures.

    Returns:
        tuple: the results, and the seconds that the model took.

    Raises:
        UserError: the model's results cannot be written, or the annotations do not fit.
    """
    about, task = model.about, model.about['task']
    detection = task in ('boxes', 'instances')
    if ann_file and not detection:
        raise UserError('--ann-file is for detectors only; other results have no ids.')
    if task == 'label map' and 'labels' not in model.outputs:
        raise UserError(f"model: '{model.file}' returns logits; label maps need labels.")
    if 'masks' in model.outputs:
        try:
            import pycocotools  # noqa: F401
        except ImportError:
            raise UserError('masks in COCO format need the package pycocotools.') from None
    ids = Ids(ann_file, about['classes'], 1 if detection else about['first_value'])
    names = unique_names([file.absolute() for file in files])
    numbers = ids.annotated(files, list(map(str, files))) or range(1, len(files) + 1)
    seconds = 0.0
    results = Results(out, ids)
    for kind in compress(KINDS, (detection, 'masks' in model.outputs, task == 'classes')):
        results.add(kind, [])

    def predict(file: Path, name: str, stem: str, number: int) -> str:
        """Predict on one file; return the reason if it could not be read or written, or ''."""
        nonlocal seconds
        image, reason = read_image(file, model.decode)
        if image is None:
            return reason
        start = time.perf_counter()
        found = model(image)
        seconds += time.perf_counter() - start
        entry = dict(id=number, file_name=name, height=image.shape[0], width=image.shape[1])
        if task == 'label map':
            path = label_path(out, stem)
            reason = write_labels(path, found['labels'] + about['first_value'])
            if reason:
                return reason
            entry['label_map'] = path.relative_to(out).as_posix()
        for kind, new in entries_of(found, number, ids, task).items():
            results.add(kind, new)
        results.images.append(entry)
        return write_image(picture_path(out, stem), draw(image, found, about, score_thr))

    with results:
        for file, (name, stem), number in zip(files, names, numbers):
            results.skip(name, predict(file, name, stem, number))
    return results, seconds


def entries_of(found: dict, image: int, ids: Ids, task: str) -> Dict[str, List[dict]]:
    """Convert what a model returns for an image to the entries of files of results."""
    if task == 'label map':
        return {}
    if task == 'classes':
        return dict(classes=classes_in_coco_format(found['scores'], image))
    lists = {key: found[key].tolist() for key in ('labels', 'scores')}
    lists['bboxes'] = found['boxes'].tolist()
    if 'masks' in found:
        from pycocotools import mask as coco

        masks = [coco.encode(np.asfortranarray(mask, np.uint8)) for mask in found['masks']]
        lists['masks'] = [{**mask, 'counts': mask['counts'].decode()} for mask in masks]
    return in_coco_format(lists, image, ids.categories)


def draw(image: np.ndarray, found: dict, about: dict, threshold: float) -> np.ndarray:
    """Draw results over a copy of an image."""
    drawn = image.copy()
    if about['task'] == 'classes':
        for line, label in enumerate(best_classes(found['scores'])):
            text = f'{name_of(about, label)} {found["scores"][label]:.2f}'
            write_on(drawn, text, 5, 18 * (line + 1))
        return drawn
    palette = np.array(about['palette'] or [[255, 0, 0]], np.uint8)[:, ::-1]
    if about['task'] == 'label map':
        colours = palette[found['labels'] % len(palette)]
        return cv2.addWeighted(image, 0.5, colours, 0.5, 0)
    shown = np.flatnonzero(found['scores'] >= threshold)
    for index in shown[::-1]:
        label = int(found['labels'][index])
        colour = [int(value) for value in palette[label % len(palette)]]
        if 'masks' in found:
            mask = found['masks'][index]
            drawn[mask] = (0.5 * drawn[mask] + 0.5 * np.array(colour)).astype(np.uint8)
        left, top, right, bottom = (int(round(float(side))) for side in found['boxes'][index])
        cv2.rectangle(drawn, (left, top), (right, bottom), colour, 2)
        text = f'{name_of(about, label)} {found["scores"][index]:.2f}'
        write_on(drawn, text, left, max(top - 4, 10))
    return drawn


def name_of(about: dict, label: int) -> str:
    return about['classes'][label] if label < len(about['classes']) else str(label)


def write_on(image: np.ndarray, text: str, left: int, bottom: int) -> None:
    """Draw white letters with a dark edge."""
    for ink, thickness in ((0, 3), (255, 1)):
        cv2.putText(
            image, text, (left, bottom), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (ink, ink, ink), thickness,
            cv2.LINE_AA,
        )  # fmt: skip
