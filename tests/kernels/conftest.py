"""The path of kernels that a test is of, and kernels of which nothing is known yet."""

import pytest

from crossformer_mm.kernels import self_test

from .definition import small_tiles
from .paths import SEVERAL


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
