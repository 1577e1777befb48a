"""Marks for what older PyTorch cannot do, each by the name of what it lacks."""
import pytest

from crossformer_mm.compat import missing_torch


def needs_torch(release: str, what: str):
    """Skip a test before a release, for ``what`` came with it."""
    return pytest.mark.skipif(bool(missing_torch(release)),
                              reason=f'{what} came with PyTorch {release}')
