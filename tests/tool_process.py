"""Tools in processes of their own that can be killed, without importing everything each time, or in
the process of the test."""

import functools
import gc
import importlib
import importlib.util
import multiprocessing
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from unittest import mock

from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = [
    'mmdet.apis',
    'mmseg.apis',
    'mmdet.datasets',
    'mmseg.datasets',
    'mmdet.evaluation',
    'mmseg.evaluation',
    'mmdet.visualization',
    'mmseg.visualization',
    'crossformer_mm',
]
PROCESSES = multiprocessing.get_context('forkserver')
PROCESSES.set_forkserver_preload(LIBRARIES)


def load_script(file: Path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leave_configs_unformatted() -> None:
    """Make MMEngine keep configs as one line for each setting: to lay them out, which it does five
    times in a training, takes longer than a training of the tests."""
    from yapf.yapflib import yapf_api

    yapf_api.FormatCode = lambda text, **options: (text, True)


@functools.cache
def leave_libraries_uncollected() -> None:
    """Make the garbage collector pass over what the libraries consist of: MMEngine calls it for each
    data set, where it takes 0.3 s."""
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()


def run_as_main(file, *arguments) -> None:
    """Run a script in this process, for speed; what it ends in is raised.

    First what MMEngine keeps of runs is dropped, for a new process would have none. It is found by
    the second in which a run begins: another that begins in the same would write to its log, and
    look for its models in its library.
    """
    for kind in (DefaultScope, MMLogger, MessageHub, Visualizer, *Visualizer.__subclasses__()):
        kind._instance_dict.clear()
    with mock.patch.object(sys, 'argv', [str(file), *map(str, arguments)]):
        runpy.run_path(str(file), run_name='__main__')


class ToolProcess:
    """A tool at work.

    Args:
        log (Path): where its output goes.
        *command: the tool's file and its arguments.
        environment (dict, optional): variables that are set for it.
    """

    def __init__(self, log: Path, *command, environment=None):
        self.log = Path(log)
        self.log.write_text('')
        self.process = PROCESSES.Process(
            target=run_tool, args=(str(log), environment or {}, *(str(part) for part in command))
        )
        self.process.start()

    @property
    def output(self) -> str:
        return self.log.read_text(errors='replace')

    def wait(self, timeout: float = 300) -> int:
        """The exit status; a process that does not end is killed, which is an error."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(self.output[-3000:])
        return self.process.exitcode

    def wait_until(self, condition, timeout: float = 300) -> None:
        """Return once ``condition()`` holds."""
        end = time.monotonic() + timeout
        while not condition():
            if self.process.exitcode is not None or time.monotonic() > end:
                self.kill()
                raise TimeoutError(self.output[-3000:])
            time.sleep(0.01)

    def kill(self) -> None:
        """End it as a power cut does: it gets no chance to tidy up."""
        if self.process.exitcode is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


def run_tool(log: str, environment: dict, tool: str, *arguments: str) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(ROOT)
    import torch

    torch.set_num_threads(1)
    leave_configs_unformatted()
    gc.freeze()
    sys.argv = [tool, *arguments]
    runpy.run_path(tool, run_name='__main__')
