"""A headless Chromium that tests drive by the DevTools protocol, over pipes: no package needed."""

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Optional

# Chromium reads commands from descriptor 3 and writes to 4, as --remote-debugging-pipe has it.
EXEC = (
    'import os, sys; os.dup2({read}, 3); os.dup2({write}, 4); os.execvp(sys.argv[1], sys.argv[1:])'
)
OPTIONS = '--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars'


def find() -> Optional[str]:
    """The browser to test with."""
    names = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
    return next((found for found in map(shutil.which, names) if found), None)


class Chromium:
    """One browser with one page.

    Args:
        program: what to run.
        profile: an empty folder.
        patience: seconds to wait for an answer.
    """

    def __init__(self, program: str, profile: Path, patience: float = 60):
        self.patience, self.number, self.rest = patience, 0, b''
        ours_read, theirs_write = os.pipe()
        theirs_read, ours_write = os.pipe()
        # Away from 3 and 4, which the program's own will be.
        inherited = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_read, theirs_write)]
        code = EXEC.format(read=inherited[0], write=inherited[1])
        command = [sys.executable, '-S', '-c', code, program, *OPTIONS.split()]
        command += ['--remote-debugging-pipe', f'--user-data-dir={profile}', 'about:blank']
        silent = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.DEVNULL)
        self.process = subprocess.Popen(command, pass_fds=inherited, **silent)
        for end in (theirs_read, theirs_write, *inherited):
            os.close(end)
        self.read, self.write = ours_read, ours_write
        self.session = None
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        attached = self.call('Target.attachToTarget', targetId=target, flatten=True)
        self.session = attached['sessionId']
        self.problems: list = []
        self.call('Runtime.enable')

    def call(self, method: str, **parameters) -> dict:
        """Give a command and wait for its result."""
        self.number += 1
        message = dict(id=self.number, method=method, params=parameters)
        if self.session:
            message['sessionId'] = self.session
        os.write(self.write, json.dumps(message).encode() + b'\0')
        deadline = time.monotonic() + self.patience
        while True:
            answer = self.receive(deadline)
            if answer.get('method') == 'Runtime.exceptionThrown':
                self.problems.append(answer['params']['exceptionDetails'])
            if answer.get('id') == self.number:
                assert 'error' not in answer, (method, answer['error'])
                return answer['result']

    def receive(self, deadline: float) -> dict:
        while b'\0' not in self.rest:
            ready, _, _ = select.select([self.read], [], [], max(deadline - time.monotonic(), 0))
            assert ready, 'Chromium does not answer'
            part = os.read(self.read, 1 << 20)
            assert part, 'Chromium has ended'
            self.rest += part
        message, self.rest = self.rest.split(b'\0', 1)
        return json.loads(message)

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript; of a promise, what it comes to."""
        result = self.call(
            'Runtime.evaluate', expression=expression, awaitPromise=True, returnByValue=True
        )
        assert 'exceptionDetails' not in result, result['exceptionDetails']
        return result['result'].get('value')

    def open(self, page: Path, address: str = '') -> None:
        """Load a page, with what follows its name, and wait until it says that it is ready."""
        self.problems.clear()
        self.call('Page.navigate', url=page.as_uri() + address)
        deadline = time.monotonic() + self.patience
        while not self.evaluate("document.readyState === 'complete' && 'explain' in window"):
            assert time.monotonic() < deadline, self.problems
            time.sleep(0.02)
        self.evaluate('explain.ready.then(() => null)')

    def size(self, width: int, height: int, mobile: bool = False) -> None:
        sizes = dict(width=width, height=height, deviceScaleFactor=2 if mobile else 1)
        self.call('Emulation.setDeviceMetricsOverride', mobile=mobile, **sizes)
        self.call('Emulation.setTouchEmulationEnabled', enabled=mobile)

    def settle(self) -> None:
        """Wait until what was asked for is drawn."""
        self.evaluate(
            'new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))'
        )

    def mouse(self, kind: str, x: float, y: float, **more) -> None:
        self.call('Input.dispatchMouseEvent', type=f'mouse{kind}', x=x, y=y, **more)
        self.settle()

    def click(self, x: float, y: float) -> None:
        self.mouse('Moved', x, y)
        for kind in ('Pressed', 'Released'):
            self.mouse(kind, x, y, button='left', clickCount=1)

    def touch(self, *points) -> None:
        """A finger that comes down on the first of some points and goes up on the last."""
        for kind, (x, y) in zip(['touchStart'] + ['touchMove'] * len(points), points):
            self.call('Input.dispatchTouchEvent', type=kind, touchPoints=[dict(x=x, y=y)])
            self.settle()
        self.call('Input.dispatchTouchEvent', type='touchEnd', touchPoints=[])
        self.settle()

    def press(self, key: str, shift: bool = False) -> None:
        codes = dict(Home=36, ArrowLeft=37, ArrowUp=38, ArrowRight=39, ArrowDown=40)
        event = dict(key=key, code=key, windowsVirtualKeyCode=codes.get(key, ord(key[0])))
        for kind in ('keyDown', 'keyUp'):
            self.call('Input.dispatchKeyEvent', type=kind, modifiers=8 if shift else 0, **event)
        self.settle()

    def close(self) -> None:
        """End the browser."""
        try:
            self.session = None
            self.call('Browser.close')
            self.process.wait(10)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.read)
        os.close(self.write)
