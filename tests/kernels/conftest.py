"""Fixtures of kernels: paths, instruction sets, numbers of threads, self-tests not run yet."""

import pytest
import torch

from crossformer_mm.kernels import native, self_test

from .definition import small_tiles
from .paths import INSTRUCTIONS, SEVERAL


@pytest.fixture
def path(request, monkeypatch) -> str:
    if request.param != SEVERAL:
        return request.param
    from crossformer_mm.kernels import triton_launch

    small = small_tiles(triton_launch)
    for tiles in ('TILES', 'WIDE_TILES'):
        monkeypatch.setattr(triton_launch, tiles, small)
    return 'fused'


@pytest.fixture
def untested(monkeypatch) -> None:
    for memory in ('PASSED', 'BROKEN', 'FAILURES'):
        monkeypatch.setattr(self_test, memory, type(getattr(self_test, memory))())
    self_test.say.cache_clear()


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request, monkeypatch):
    if request.param not in native._native.supported():
        pytest.skip(f'this processor has no {request.param}')
    monkeypatch.setenv(native.VARIABLE, request.param)
    return request.param


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
