"""Marks for what older PyTorch cannot do, each by the name of what it lacks."""

import importlib.util
import warnings
from importlib import metadata

import pytest
import torch

from crossformer_mm.compat import missing_torch


def needs_torch(release: str, what: str):
    """Skip a test before a release, for ``what`` came with it."""
    return pytest.mark.skipif(
        bool(missing_torch(release)), reason=f'{what} came with PyTorch {release}'
    )


def float16_on_cpu_lacks() -> str:
    """Name what this PyTorch cannot do in float16 on the CPU, or ''."""
    try:
        torch.nn.functional.conv2d(*torch.ones(2, 1, 1, 1, 1, dtype=torch.float16))
    except RuntimeError as error:
        return str(error)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # for other types, autocast warns and does nothing
        try:
            with torch.autocast('cpu', torch.float16):
                return ''
        except (RuntimeError, UserWarning) as error:
            return str(error)


needs_float16 = pytest.mark.skipif(
    bool(float16_on_cpu_lacks()), reason=f'float16 on the CPU: {float16_on_cpu_lacks()}'
)
FLOAT16 = pytest.param(torch.float16, marks=needs_float16)


def interpreter_lacks() -> str:
    """Why Triton's interpreter, which runs kernels where there is no GPU, cannot; or nothing."""
    if torch.cuda.is_available() or not importlib.util.find_spec('triton'):
        return ''
    triton, numpy = (
        tuple(map(int, metadata.version(name).split('.')[:2])) for name in ('triton', 'numpy')
    )
    return 'NumPy 2.4 lacks a conversion it uses' if triton < (3, 7) and numpy >= (2, 4) else ''


needs_interpreter = pytest.mark.skipif(
    bool(interpreter_lacks()), reason=f"Triton's interpreter: {interpreter_lacks()}"
)
