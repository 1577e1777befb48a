"""Atomic writes, and checks that a folder can be written before long work."""

import tempfile
from pathlib import Path
from typing import Union

from .errors import UserError
from .without_torch.files import atomic_write, write_whole  # noqa: F401


def check_writable(option: str, folder: Union[str, Path]) -> None:
    """Make a folder. Raise a UserError, which names the option, if no file can be written to it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UserError(f"{option}: '{folder}' cannot be written: {error.strerror}.") from None
