"""The path of kernels that a test is of."""

import pytest

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
