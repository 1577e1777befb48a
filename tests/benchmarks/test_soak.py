"""Short versions of `make soak`."""

import torch

from ..helpers import ROOT, load_script, run_python

FOLDER = ROOT / 'benchmarks'


def test_memory_stays_flat():
    # In a process of its own, whose size is known. What one pass keeps for the next would be 1 MB
    # or more of the 400 at each; 2000 passes at larger sizes are held to 2 %.
    code = 'from soak import growth, steps; print(growth(steps(100, largest=64)))'
    done = run_python('-c', code, folder=FOLDER)
    assert float(done.stdout.splitlines()[-1]) < 0.04, done.stderr


def test_what_a_kill_has_left_is_counted(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    soak = load_script(FOLDER / 'soak.py')
    assert soak.newest(tmp_path) == 0
    for number in (1, 9, 10):
        torch.save(dict(meta=dict(iter=3 * number)), tmp_path / f'epoch_{number}.pth')
    assert soak.newest(tmp_path) == 30
    cut = tmp_path / 'epoch_10.pth'
    torch.save(dict(meta=dict(iter=29)), tmp_path / 'iter_29.pth')  # of a signal
    assert soak.newest(tmp_path) == 30
    cut.write_bytes(cut.read_bytes()[:-50])
    assert soak.newest(tmp_path) == 29
    (tmp_path / 'iter_29.pth').unlink()
    assert soak.newest(tmp_path) == 27
