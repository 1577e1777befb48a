"""Data sets that tests spoil, and what is said of them."""

import functools
import json
from pathlib import Path

import cv2
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from crossformer_mm.engine.coco_checks import annotations_checked
from crossformer_mm.engine.dataset_checks import check_files, explained_data
from crossformer_mm.engine.dataset_guard import Guard, list_skipped
from crossformer_mm.errors import DataError

from ..trainings import write_config

TRAIN_JSON = 'coco/annotations/instances_train2017.json'
VAL_JSON = 'coco/annotations/instances_val2017.json'


def change(path: Path, edit) -> None:
    """Edit an annotation file, given as a dict."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_labels(data: Path, edit, split: str = 'training') -> Path:
    """Change all label maps of a split; the first."""
    paths = sorted((data / 'ade/annotations' / split).iterdir())
    for path in paths:
        cv2.imwrite(str(path), edit(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))
    return paths[0]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])


def build(kind, data: Path, split: str, skip_to: str = None):
    """The data set that the tools train on or test on."""
    cfg = Config.fromfile(write_config(kind, data / 'config.py', data))
    init_default_scope(cfg.default_scope)
    skip = functools.partial(list_skipped, skip_to) if skip_to else None
    with explained_data(), annotations_checked(skip):
        dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
    check_files(dataset, skip_to)
    dataset.prepare_data = Guard(dataset, skip_to)
    return dataset


def count_objects(dataset) -> int:
    return sum(len(dataset.get_data_info(i)['instances']) for i in range(len(dataset)))


def refusal(function, *arguments, **options) -> str:
    """The sentence of the error that a call raises."""
    with pytest.raises(DataError) as refused:
        function(*arguments, **options)
    said = str(refused.value)
    assert '\n' not in said and said.endswith('.')
    return said
