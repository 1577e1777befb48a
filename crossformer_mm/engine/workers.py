"""Workers of data loaders that end with the training, but not on its signals."""

import ctypes
import os
import signal
import sys
import threading
from typing import Callable, Optional

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def start_worker(signals, start: Optional[Callable], index: int) -> None:
    """Start a worker of a data loader that ends with the training, but not on its signals.

    A signal often goes to all processes of a job. PyTorch's workers would end on it, which is an
    error in the iteration that waits for them.
    """
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        threading.Thread(target=obey_training, args=(signals,), daemon=True).start()
    if start is not None:
        start(index)


def obey_training(signals) -> None:
    """End this worker on a signal that the training sends."""
    training = os.getppid()
    while signal.sigwaitinfo(signals).si_pid != training:
        pass
    os._exit(0)
