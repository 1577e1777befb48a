"""Checkpoints that are whole or not there, whenever a training is killed."""
import errno
import logging
import os
import re
import zipfile
from pathlib import Path
from typing import Optional

from mmengine.fileio import register_backend
from mmengine.fileio.backends import LocalBackend
from mmengine.logging import print_log

from ..checkpoint import CheckpointError, read_checkpoint

CHECKPOINT = re.compile(r'(epoch|iter)_\d+\.pth')  # mmengine's names of what can be resumed

# Why a disk cannot be written: full, over quota, read-only, over a limit, not allowed.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM)


@register_backend('whole', force=True)
class WholeFileBackend(LocalBackend):
    """Local files, replaced in one step.

    A file is written under another name and renamed once it is on the disk. What is
    removed stays until the next file is: mmengine removes an old checkpoint before
    it writes the new one, so that a kill or a full disk in between would leave none.
    """

    outdated = []  # of all instances, for mmengine makes a new one for each call

    def put(self, obj: bytes, filepath) -> None:
        part = f'{filepath}.part'
        try:
            with open(part, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, filepath)
        except OSError as error:
            Path(part).unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(filepath)) from None
        while self.outdated:
            Path(self.outdated.pop()).unlink(missing_ok=True)

    def remove(self, filepath) -> None:
        self.outdated.append(filepath)


def newest_checkpoint(folder: str) -> Optional[str]:
    """The newest whole checkpoint of a work folder; warns of each newer one that is not.

    ``last_checkpoint`` is not asked: it may itself be half-written, or be older than
    what it should name.
    """
    found = [path for path in Path(folder).glob('*.pth') if CHECKPOINT.fullmatch(path.name)]
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if is_whole(path):
            return str(path)
        if int(os.environ.get('RANK', 0)) == 0:
            print_log(f"Checkpoint '{path}' is cut short or damaged: the one before it is taken.",
                      level=logging.WARNING)
    return None


def is_whole(path: Path) -> bool:
    """Whether a checkpoint can be read, and all its bytes are those that were written."""
    try:
        with zipfile.ZipFile(path) as file:  # as torch.save writes, a checksum for each part
            if file.testzip() is not None:
                return False
        read_checkpoint(str(path))
        return True
    except (CheckpointError, OSError, zipfile.BadZipFile):
        return False
