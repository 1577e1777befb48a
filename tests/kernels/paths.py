"""Paths of kernels that run here, as parameters of tests."""

from importlib.util import find_spec

import pytest
import torch

from crossformer_mm.compat import TRITON, missing_torch
from crossformer_mm.grouping import AxisRule
from crossformer_mm.kernels import Call, native

from ..helpers import interpreter_lacks
from .definition import GPU

CPU = torch.device('cpu')
RULE = AxisRule(3, 1), AxisRule(3, 1)

SEVERAL = 'fused, in several blocks'


# The best first.
INSTRUCTIONS = ('amx', 'avx512bf16', 'avx512', 'avx2', 'generic', 'emulated')


def lacks(path: str) -> str:
    """Return what a path lacks here, or ''."""
    if path == 'plain':
        return ''
    if path == 'native':
        return native.why_not(Call(CPU))
    no_triton = '' if find_spec('triton') else 'the package triton is not installed'
    return missing_torch(TRITON) or no_triton or interpreter_lacks()


def marked(*paths: str) -> list:
    return [
        pytest.param(
            path, marks=pytest.mark.skipif(bool(lacks(path)), reason=f'{path}: {lacks(path)}')
        )
        for path in paths
    ]


def device_of(path: str) -> torch.device:
    return GPU if path == 'fused' else CPU


def of(*paths: str):
    return pytest.mark.parametrize('path', marked(*paths), indirect=True)


every_path = of('plain', 'native', 'fused', SEVERAL)
every_kernel = of('native', 'fused')
