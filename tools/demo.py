"""Train and evaluate a small detector and a small segmentor on generated shapes.

    python tools/demo.py

Run again, it reuses the data set and resumes from the newest checkpoints.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np

from crossformer_mm.cli import run
from crossformer_mm.files import check_writable

ROOT = Path(__file__).resolve().parent.parent
WORK = Path('work_dirs/demo')
HELD_OUT = 'data/shapes/coco/val2017'

# The metrics of each config, and the marks that the demo must reach, in percent.
MARKS = {
    'mask_rcnn': {'coco/bbox_mAP_50': ('box AP50', 70), 'coco/segm_mAP_50': ('mask AP50', 70)},
    'upernet': {'mIoU': ('mIoU', 70)},
}
# Lines to show of a log that also lists the environment and the config.
SHOWN = (
    'Iter(train)',
    'Epoch(train)',
    'Epoch(test)',
    'Iter(test)',
    'Saving checkpoint',
    'Resumed',
    'error: ',
)


def run_tool(log: Path, title: str, *command) -> None:
    """Run a tool, given by its file and arguments, show its progress below a title and add its
    output to a log. End the program if it fails."""
    command = [str(part) for part in command]
    print(f'\n== {title}\n   {" ".join(command)}', flush=True)
    with (
        log.open('a') as keep,
        subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
        ) as process,
    ):
        lines = []
        for line in process.stdout:
            lines.append(line)
            keep.write(line)
            if any(word in line for word in SHOWN):
                print('  ', line.split(' - INFO - ')[-1].rstrip()[:150], flush=True)
    if process.returncode:
        print(''.join(lines[-15:]), file=sys.stderr)
        sys.exit(f"error: '{' '.join(command)}' failed, its output is in '{log}'.")


def newest(pattern: str) -> Path:
    return max(WORK.glob(pattern), key=lambda path: path.stat().st_mtime)


def prediction(name: str, checkpoint: str) -> str:
    """Return a command that predicts with a model of the demo."""
    files = ROOT / 'tools/predict.py', ROOT / f'configs/demo/{name}_shapes.py', checkpoint
    words = map(os.path.relpath, files)
    return shlex.join(['python', *words, HELD_OUT, '--out', str(WORK / name / 'predictions')])


def contact_sheet(pictures, out: Path) -> None:
    """Join pictures, two in a row; in each, the ground truth is left of the prediction."""
    images, height = [], 240
    for picture in pictures:
        image = cv2.imread(str(picture))
        size = (round(image.shape[1] * height / image.shape[0]), height)
        how = cv2.INTER_AREA if image.shape[0] > height else cv2.INTER_CUBIC
        image = cv2.resize(image, size, interpolation=how)
        images.append(np.pad(image, ((6, 6), (6, 6), (0, 0)), constant_values=255))
    rows = [np.hstack(images[i : i + 2]) for i in range(0, len(images), 2)]
    cv2.imwrite(str(out), np.vstack(rows))


def main():
    argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0]).parse_args()
    started = time.time()
    check_writable('work folder', WORK)
    tools, log = ROOT / 'tools', WORK / 'demo.log'
    title = 'Data: shapes on clutter, 400 images to train on and 100 held out'
    run_tool(log, title, tools / 'make_shapes.py', 'data/shapes')
    report, pictures, commands = [], [], []
    for name, metrics in MARKS.items():
        config = ROOT / f'configs/demo/{name}_shapes.py'
        run_tool(log, f'Training {name}', tools / 'train.py', config, '--resume')
        checkpoint = (WORK / name / 'last_checkpoint').read_text().strip()
        title, folder = f'Evaluating {name} on the held-out images', WORK / name / 'pictures'
        run_tool(log, title, tools / 'test.py', config, checkpoint, '--show-dir', folder)
        measured = json.loads(newest(f'{name}/test/*/*.json').read_text())
        for key, (label, mark) in metrics.items():
            value = measured[key] * (100 if key.startswith('coco/') else 1)
            report.append((f'{name}: {label}', value, mark))
        shown = [path for path in folder.rglob('*') if path.is_file()]
        shown.sort(key=lambda path: (path.stat().st_mtime, path.name))
        sheet = WORK / f'{name}.png'
        contact_sheet(shown[-8:], sheet)
        pictures.append(sheet)
        commands.append(prediction(name, checkpoint))

    print(f'\n== Results on the held-out images ({(time.time() - started) / 60:.1f} minutes)')
    for label, value, mark in report:
        verdict = 'reached' if value >= mark else 'MISSED'
        print(f'   {label:22} {value:5.1f}   mark {mark}   {verdict}')
    print('   ground truth next to prediction: ' + ', '.join(str(path) for path in pictures))
    print(f'\n== Predict with these models, on images of yours if you replace {HELD_OUT}')
    for command in commands:
        print(f'   {command}')
    sys.exit(any(value < mark for _, value, mark in report))


if __name__ == '__main__':
    run(main)
