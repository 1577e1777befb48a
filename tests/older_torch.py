"""Marks for what older PyTorch cannot do, each by the name of what it lacks."""

import warnings

import numpy as np
import pytest
import torch

from crossformer_mm.compat import TORCH, missing_torch


def needs_torch(release: str, what: str):
    """Skip a test before a release, for ``what`` came with it."""
    return pytest.mark.skipif(
        bool(missing_torch(release)), reason=f'{what} came with PyTorch {release}'
    )


def float16_on_cpu_lacks() -> str:
    """What this PyTorch cannot do in float16 on the CPU, or nothing."""
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

# Without a GPU kernels run in Triton's interpreter, which made numbers of arrays of one number.
needs_interpreter = pytest.mark.skipif(
    not torch.cuda.is_available()
    and TORCH <= (2, 6)
    and tuple(map(int, np.__version__.split('.')[:2])) >= (2, 4),
    reason="the interpreter of this PyTorch's Triton uses a conversion that NumPy 2.4 has no more",
)
