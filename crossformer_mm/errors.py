"""Errors whose message is all that a user needs, and where an error came from."""

import site
import sysconfig
import traceback
from pathlib import Path
from types import FrameType
from typing import List

from .without_torch.errors import UserError, said  # noqa: F401


class ConfigError(UserError):
    """A config from which something cannot be built; the message names the setting."""


class DataError(UserError):
    """Data that cannot be used; the message names the file.

    PyTorch rebuilds an error of a data loader's worker from its class and its printed traceback:
    nothing else of it leaves the worker. The message is the traceback's end.
    """

    def __init__(self, text: str):
        super().__init__(text.strip().splitlines()[-1].split(f'{__name__}.DataError: ')[-1])


# Code of others that reads what a user gives: an error that it raises is about what was given.
LIBRARIES = tuple(
    {
        str(Path(folder).resolve())
        for folder in (
            *sysconfig.get_paths().values(),
            *getattr(site, 'getsitepackages', list)(),
            Path(__file__).parent,
        )
    }
)


def frames_of(error: BaseException) -> List[FrameType]:
    """Return the frames that an error, or its first cause, went through, the innermost last."""
    while error.__cause__ is not None:
        error = error.__cause__
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def is_users_code(error: BaseException) -> bool:
    """Check whether an error was raised in code of no installed library and not of this package."""
    frames = frames_of(error)
    if not frames:
        return False
    file = frames[-1].f_code.co_filename
    return not file.startswith('<') and not str(Path(file).resolve()).startswith(LIBRARIES)
