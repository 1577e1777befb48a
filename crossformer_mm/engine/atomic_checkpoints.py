"""Atomic checkpoint writes: a training can be killed at any time."""

import errno
import os
import shutil
from pathlib import Path
from typing import List

from mmengine.fileio import register_backend
from mmengine.fileio.backends import LocalBackend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS

from ..checkpoint import CheckpointError, read_checkpoint
from ..errors import UserError
from .config import name_of_config
from .newest_checkpoint import checkpoint_folders, numbered_files
from .runner_access import is_resumed

# Errors of a disk that cannot be written: full, over quota, read-only, over a limit, not allowed.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM)


@register_backend('whole', force=True)
class WholeFileBackend(LocalBackend):
    """Local files, written atomically: ``CheckpointHook(backend_args=dict(backend='whole'))``.

    A file is written under another name and renamed once it is on the disk. Removing is put off
    until the next file is written: mmengine removes an old checkpoint before it writes the new one,
    so that a kill or a full disk in between would leave none.
    """

    outdated: List[str] = []  # shared by all instances: mmengine makes a new one for each call

    def put(self, obj: bytes, filepath) -> None:
        part = f'{filepath}.part'
        try:
            Path(filepath).parent.mkdir(parents=True, exist_ok=True)
            with open(part, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            Path(part).unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(filepath)) from None
        self.finish(part, filepath)

    @classmethod
    def finish(cls, part, filepath) -> None:
        """Rename a written file or folder, and remove what is outdated."""
        if Path(filepath).is_dir():
            shutil.rmtree(filepath)
        os.replace(part, filepath)
        while cls.outdated:
            old = Path(cls.outdated.pop())
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink(missing_ok=True)

    def remove(self, filepath) -> None:
        self.outdated.append(filepath)

    def rmtree(self, dir_path) -> None:
        self.outdated.append(dir_path)


@HOOKS.register_module()
class WholeFilesHook(Hook):
    """Make every CheckpointHook write atomically, see :class:`WholeFileBackend`, and never over the
    checkpoints of another config.

    Raises:
        UserError: a training that starts anew would write over those of another config.
    """

    def before_run(self, runner) -> None:
        for hook in runner.hooks:
            if (
                isinstance(hook, CheckpointHook)
                and '://' not in str(hook.out_dir)
                and hook.backend_args is None
                and hook.file_client_args is None
            ):
                hook.backend_args = dict(backend='whole')

    def before_train(self, runner) -> None:
        mine = name_of_config(runner.cfg.filename)
        if is_resumed(runner) or runner.rank or not mine:
            return
        for folder, template, backend in checkpoint_folders(runner):
            for _, path in numbered_files(folder, template, backend):
                try:
                    theirs = (read_checkpoint(path).get('meta') or {}).get('config_file')
                except (CheckpointError, FileNotFoundError):
                    continue  # an unreadable file is no loss
                if theirs and theirs != mine:
                    raise UserError(
                        f"'{folder}' has checkpoints of '{theirs}', which a training "
                        f"of '{mine}' would replace: give it a folder of its own with "
                        '--work-dir.'
                    )
                return  # all in a folder are of one config

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        checkpoint['meta']['config_file'] = name_of_config(runner.cfg.filename)
