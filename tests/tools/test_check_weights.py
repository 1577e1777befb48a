"""A file of weights is recognised, and what is wrong with it said, in one line."""

import hashlib
import re
from pathlib import Path

import pytest
import torch

from ..helpers import build_model


@pytest.fixture(scope='module')
def weights() -> dict:
    """A model's weights, each of one number in memory and in the file."""
    with torch.device('meta'):
        own = build_model('configs/retinanet/cf_s_1x.py').state_dict()
    return {key: torch.zeros(1).expand(value.shape) for key, value in own.items()}


@pytest.fixture
def file(weights, tmp_path) -> Path:
    torch.save(dict(state_dict=weights), tmp_path / 'downloaded.pth')
    return tmp_path / 'downloaded.pth'


@pytest.fixture
def check(output_of):
    return lambda file, expect: output_of('check_weights.py', file, expect=expect)


def test_complete_weights_are_named_by_their_config(weights, check, file):
    (line,) = [line for line in check(file, 0).splitlines() if str(file) in line]
    assert f'complete: configs/retinanet/cf_s_1x.py, {len(weights)} tensors, 40.8 M' in line
    assert hashlib.sha256(file.read_bytes()).hexdigest() in line


def test_incomplete_weights_are_told_from_the_closest_config(weights, check, file):
    torch.save(dict(state_dict=dict(list(weights.items())[:-1])), file)
    said = check(file, 2)
    assert said.strip().splitlines()[-1].startswith('error: ')
    assert f'closest, configs/retinanet/cf_s_1x.py: missing {list(weights)[-1]}.' in said


def test_a_damaged_file_is_an_error(check, file):
    file.write_bytes(file.read_bytes()[:-1000])
    said = check(file, 2)
    assert re.search("^error: Checkpoint .* could not be read: it is cut short", said, re.M)


def test_a_hash_in_the_name_is_compared(check, file):
    digits = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    file = file.rename(file.with_name('downloaded-00000000.pth'))
    assert 'is damaged: its SHA-256 begins with' in check(file, 2)
    check(file.rename(file.with_name(f'downloaded-{digits}.pth')), 0)
