"""A file of weights is recognised, and what is wrong with it said, in one line."""

import hashlib
import re

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from crossformer_mm.engine.config import load_config

from ..helpers import ROOT


def weights_of(config: str) -> dict:
    """A model's weights, each of one number in memory and in the file."""
    cfg = load_config(config)
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        own = MODELS.build(cfg.model).state_dict()
    return {key: torch.zeros(1).expand(value.shape) for key, value in own.items()}


@pytest.fixture(scope='module')
def weights() -> dict:
    return weights_of(str(ROOT / 'configs/retinanet/cf_s_1x.py'))


@pytest.fixture
def check(output_of):
    return lambda file, expect: output_of('check_weights.py', file, expect=expect)


def test_complete_weights_are_named_by_their_config(weights, check, tmp_path):
    file = tmp_path / 'downloaded.pth'
    torch.save(dict(state_dict=weights), file)
    said = check(file, 0)
    (line,) = [line for line in said.splitlines() if str(file) in line]
    assert f'complete: configs/retinanet/cf_s_1x.py, {len(weights)} tensors, 40.8 M' in line
    assert hashlib.sha256(file.read_bytes()).hexdigest() in line


def test_incomplete_weights_are_told_from_the_closest_config(weights, check, tmp_path):
    file = tmp_path / 'downloaded.pth'
    torch.save(dict(state_dict=dict(list(weights.items())[:-1])), file)
    said = check(file, 2)
    assert said.strip().splitlines()[-1].startswith('error: ')
    assert f'closest, configs/retinanet/cf_s_1x.py: missing {list(weights)[-1]}.' in said


def test_a_damaged_file_is_an_error(weights, check, tmp_path):
    file = tmp_path / 'downloaded.pth'
    torch.save(dict(state_dict=weights), file)
    file.write_bytes(file.read_bytes()[:-1000])
    said = check(file, 2)
    assert re.search("^error: Checkpoint .* could not be read: it is cut short", said, re.M)


def test_a_hash_in_the_name_is_compared(weights, check, tmp_path):
    file = tmp_path / 'downloaded-00000000.pth'
    torch.save(dict(state_dict=weights), file)
    said = check(file, 2)
    assert 'is damaged: its SHA-256 begins with' in said
    digits = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    check(file.rename(tmp_path / f'downloaded-{digits}.pth'), 0)
