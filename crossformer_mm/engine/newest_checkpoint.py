"""Find the newest complete checkpoint of a training."""

import io
import os
import re
import zipfile
from pathlib import Path
from typing import Iterator, Optional, Tuple

from mmengine.fileio import get_local_path, list_dir_or_file
from mmengine.hooks import CheckpointHook
from mmengine.runner import EpochBasedTrainLoop

from ..checkpoint import CheckpointError, read_plain
from ..errors import UserError
from ..openmmlab import warn
from .total_batch import batch_advice
from .weight_checks import is_resumable

TEMPLATES = ('epoch_{}.pth', 'iter_{}.pth')  # mmengine's names of resumable checkpoints


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
    for folder in checkpoint_folders(runner):
        for number, path in numbered_files(*folder):
            if since and '://' not in path and os.stat(path).st_mtime < since:
                continue
            content = read_undamaged(path)
            if content is None:
                warn(f"Checkpoint '{path}' is cut short or damaged: the one before it is used.")
                continue
            if 'meta' not in content or 'message_hub' not in content:
                done = number  # sharded: only the strategy can read it
            elif epochs and not is_resumable(runner.train_loop, content):
                mid_epoch, advice = path, batch_advice(content)
                warn(
                    f"Checkpoint '{path}' was written mid-epoch, where this loop of epochs cannot "
                    'resume with another total batch size: the one before it is used. To go on '
                    f'from it, set {advice}.'
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


def checkpoint_folders(runner) -> Iterator[Tuple[str, str, Optional[dict]]]:
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


def numbered_files(folder: str, template: str, backend: Optional[dict] = None):
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


def read_undamaged(path: str) -> Optional[dict]:
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
