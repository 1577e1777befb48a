"""Errors that say all a user needs in one sentence; what is not recognised keeps its cause."""

import site
import sys
import sysconfig
from pathlib import Path
from types import FrameType
from typing import Iterator

from ..errors import UserError, said  # noqa: F401

# Code of others that reads what a user gives: an error that it raises is of what was given.
LIBRARIES = tuple(
    {
        str(Path(folder).resolve())
        for folder in (
            *sysconfig.get_paths().values(),
            *getattr(site, 'getsitepackages', list)(),
            Path(__file__).parents[1],
        )
    }
)


class DataError(UserError):
    """Data that cannot be used; the message is one sentence that names the file."""

    def __init__(self, text: str):
        # PyTorch raises an error of a worker anew, from its printed traceback.
        super().__init__(text.strip().splitlines()[-1].split(f'{__name__}.DataError: ')[-1])


class ConfigError(UserError):
    """A config of which nothing can be built; the message is one sentence that names the part."""


def frames_of(error: BaseException) -> Iterator[FrameType]:
    """The frames that an error went through, the innermost last, those of its cause included."""
    while error.__cause__ is not None:
        error = error.__cause__
    part = error.__traceback__
    while part is not None:
        yield part.tb_frame
        part = part.tb_next


def is_of_users_code(error: BaseException) -> bool:
    """Whether an error was raised in code that is of no library and no package of OpenMMLab."""
    frames = list(frames_of(error))
    if not frames:
        return False
    file = frames[-1].f_code.co_filename
    return not file.startswith('<') and not str(Path(file).resolve()).startswith(LIBRARIES)


def fail(sentence: str) -> None:
    """End the program with one sentence on stderr and exit status 2."""
    print(f'error: {sentence}', file=sys.stderr)
    sys.exit(2)
