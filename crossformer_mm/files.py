"""Atomic writes, and checks that a folder can be written before long work."""

import os
import tempfile
from pathlib import Path
from typing import Union

from .errors import UserError


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file atomically, and make the folders that lead to it.

    Raises:
        OSError: it cannot be written.
    """
    part = path.with_name(f'.{os.getpid()}')  # no longer than the name of any file
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """:func:`atomic_write` for a file that the user named.

    Raises:
        UserError: it cannot be written.
    """
    try:
        atomic_write(path, data)
    except OSError as error:
        raise UserError(f"'{path}' could not be written: {error}.") from None


def check_writable(option: str, folder: Union[str, Path]) -> None:
    """Make a folder and check that files can be written to it.

    Args:
        option (str): what named the folder, for the message.

    Raises:
        UserError: they cannot.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UserError(f"{option}: '{folder}' cannot be written: {error.strerror}.") from None
