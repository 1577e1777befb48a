"""Data sets that tests spoil, and what is said of them."""

import functools
import json
from pathlib import Path

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


def build(kind, data: Path, split: str, tmp_path: Path, skip_to: str = None):
    """The data set that the tools train on or test on."""
    cfg = Config.fromfile(write_config(kind, tmp_path / 'config.py', data))
    init_default_scope(cfg.default_scope)
    skip = functools.partial(list_skipped, skip_to) if skip_to else None
    with explained_data(), annotations_checked(skip):
        dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
    check_files(dataset, skip_to)
    dataset.prepare_data = Guard(dataset, skip_to)
    return dataset


def refusal(build_or_load) -> str:
    """The sentence of the error."""
    with pytest.raises(DataError) as refused:
        build_or_load()
    said = str(refused.value)
    assert '\n' not in said and said.endswith('.')
    return said


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])
