"""Atomic checkpoint writes: a training can be killed at any time."""

import errno
import io
import logging
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Iterator, List, Optional, Tuple

from mmengine.fileio import get_local_path, list_dir_or_file, register_backend
from mmengine.fileio.backends import LocalBackend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop

from ..checkpoint import CheckpointError, read_checkpoint, read_plain
from ..errors import UserError
from .runner_access import is_resumed
from .total_batch import batch_advice
from .weight_checks import is_resumable

TEMPLATES = ('epoch_{}.pth', 'iter_{}.pth')  # mmengine's names of resumable checkpoints

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
        for folder, template, backend in places(runner):
            for _, path in numbered(folder, template, backend):
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


def name_of_config(file: Optional[str]) -> Optional[str]:
    """Return a config's name with its folders below the last one that is called ``configs``."""
    if not file:
        return None
    path = Path(file).absolute().with_suffix('')
    folders = path.parts[:-1]
    if 'configs' not in folders:
        return path.name
    return '/'.join(path.parts[len(folders) - folders[::-1].index('configs') :])


def places(runner) -> Iterator[Tuple[str, str, Optional[dict]]]:
    """Yield folder, template of names and ``backend_args`` of a runner's checkpoints."""
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            folder = runner.work_dir
            if hook.out_dir is not None and str(hook.out_dir) != folder:
                folder = str(hook.out_dir).rstrip('/')
                if not hasattr(hook, 'file_backend'):  # mmengine adds this when training begins
                    folder = f'{folder}/{Path(runner.work_dir).name}'
            for template in dict.fromkeys((hook.filename_tmpl, *TEMPLATES)):
                yield folder, template, hook.backend_args


def numbered(folder: str, template: str, backend: Optional[dict] = None):
    """List the files or folders of a template in a folder, the highest number first."""
    before, _, after = template.partition('{}')
    pattern = re.compile(f'{re.escape(before)}(\\d+){re.escape(after)}')
    if '://' not in folder and not Path(folder).is_dir():
        return []
    found = []
    for name in list_dir_or_file(folder, recursive=False, backend_args=backend):
        number = pattern.fullmatch(str(name).rstrip('/'))
        if number:
            found.append((int(number[1]), f"{folder}/{str(name).rstrip('/')}"))
    return sorted(found, reverse=True)


def newest_checkpoint(runner, since: float = 0.0) -> Tuple[Optional[str], dict]:
    """Return the newest complete checkpoint of a training.

    The numbers in names count: mtimes do not survive copying, and ``last_checkpoint`` may itself be
    half-written or out of date. A warning names each newer one that cannot be resumed.

    Args:
        runner (Runner): the training.
        since (float): modification time before which local files do not count.

    Returns:
        tuple: its path, or None; its content, empty if it is sharded.

    Raises:
        UserError: all complete checkpoints were written mid-epoch.
    """
    epochs = isinstance(runner.train_loop, EpochBasedTrainLoop)
    best: Tuple[int, Optional[str], dict] = (-1, None, {})
    mid_epoch, advice = None, ''
    for place in places(runner):
        for number, path in numbered(*place):
            if since and '://' not in path and os.stat(path).st_mtime < since:
                continue
            content = whole_content(path)
            if content is None:
                print_log(
                    f"Checkpoint '{path}' is cut short or damaged: the one before it is used.",
                    'current',
                    logging.WARNING,
                )
                continue
            if 'meta' not in content or 'message_hub' not in content:
                done = number  # sharded: only the strategy can read it
            elif epochs and not is_resumable(runner.train_loop, content):
                mid_epoch, advice = path, batch_advice(content)
                print_log(
                    f"Checkpoint '{path}' was written mid-epoch, where this loop of epochs cannot "
                    'resume with another total batch size: the one before it is used. To go on '
                    f'from it, set {advice}.',
                    'current',
                    logging.WARNING,
                )
                continue
            else:
                done = content['meta']['iter']
            if done > best[0]:
                best = done, path, content
            break
    if best[1] is None and mid_epoch:
        raise UserError(
            f"'{Path(mid_epoch).parent}' has no checkpoint from the end of an epoch. From those "
            'written mid-epoch, this loop of epochs cannot resume with another total batch '
            f'size: set {advice}.'
        )
    return best[1:]


def whole_content(path: str) -> Optional[dict]:
    """Read a checkpoint and verify its checksums; None: it is damaged.

    A folder, into which each process has written a file, is verified and gives an empty dict.
    """
    try:
        if '://' not in path and Path(path).is_dir():
            files = [file for file in Path(path).rglob('*.p*t*') if file.is_file()]
            return {} if files and all(map(is_undamaged, files)) else None
        with get_local_path(path) as local:
            file = io.BytesIO(Path(local).read_bytes())  # read once, from a disk that may be slow
        if not is_undamaged(file):
            return None
        file.seek(0)
        return read_plain(file, 'cpu')
    except (CheckpointError, OSError):
        return None


def is_undamaged(file) -> bool:
    """Verify the checksums of a file of ``torch.save``, which PyTorch does not."""
    try:
        with zipfile.ZipFile(file) as parts:
            return parts.testzip() is None
    except zipfile.BadZipFile:
        return False
