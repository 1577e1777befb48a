import pytest

from ..trainings import make_data


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """Four images to train on and one to validate."""
    return make_data(tmp_path_factory.mktemp('data') / 'shapes', train=4, val=1, size=48)
