"""Resume a job that torchrun has restarted, from the checkpoints that it wrote."""

import os
from pathlib import Path
from typing import Optional

MARKER = 'torchrun_job'  # file in the work folder


def may_restart() -> bool:
    """Check whether torchrun restarts this job when a process dies: ``--max-restarts``."""
    return int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', 0)) > 0


def first_start(work_dir: str) -> Optional[float]:
    """Return when this job started first, or None if it does so now.

    The first start leaves a file with the job's identity in the work folder. Its time stamp and
    those of checkpoints are of the same file system. Checkpoints that were in the folder before are
    of another job, which the user did not ask to resume.
    """
    # torchrun makes a folder of its own for each job: JOB/attempt_N/RANK/error.json
    job = str(Path(os.environ.get('TORCHELASTIC_ERROR_FILE', '')).absolute().parents[2])
    marker = Path(work_dir, MARKER)
    if marker.exists() and marker.read_text(encoding='utf-8') == job:
        return marker.stat().st_mtime
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(job, encoding='utf-8')
    return None
