"""Short versions of `make soak`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_memory_stays_flat():
    # In a process of its own, whose size is known. What one pass keeps for the next would be 1 MB
    # or more of the 400 at each; 2000 passes at larger sizes are held to 2 %.
    code = 'from soak import growth, steps; print(growth(steps(200, largest=96)))'
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=ROOT / 'benchmarks',
        text=True,
        capture_output=True,
        check=True,
    )
    assert float(done.stdout.splitlines()[-1]) < 0.04
