"""Write what real_input.sh measured as a Markdown table:  real_input_table.py WORK_DIR"""

import json
import statistics
import sys
from pathlib import Path


def single_values(means: list) -> list:
    """The values whose running means are given: the log averages over up to 50 iterations."""
    assert len(means) <= 50
    return [
        n * mean - (n - 1) * before
        for n, (mean, before) in enumerate(zip(means, [0.0, *means]), start=1)
    ]


work = Path(sys.argv[1])
print('| config | iterations | loss, first 5 | loss, last 5 | s per iteration, median | metrics |')
print('|---|---|---|---|---|---|')
for name in ('mask_rcnn', 'retinanet', 'upernet'):
    # One JSON object a line while training; the test's metrics alone in the newest file.
    scalars = max(work.glob(f'{name}/*/vis_data/scalars.json'), key=lambda p: p.stat().st_size)
    rows = [json.loads(line) for line in scalars.read_text().splitlines()]
    losses, seconds = (
        single_values([row[key] for row in rows if 'loss' in row]) for key in ('loss', 'time')
    )
    tested = max(work.glob(f'{name}/*/*.json'), key=lambda p: p.stat().st_mtime)
    metrics = {
        key: value
        for key, value in json.loads(tested.read_text()).items()
        if key in ('coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP', 'mIoU', 'aAcc')
    }
    print(
        f'| {name} | {len(losses)} | {statistics.mean(losses[:5]):.3f} '
        f'| {statistics.mean(losses[-5:]):.3f} | {statistics.median(seconds):.1f} '
        f'| {", ".join(f"{key} {value:.4g}" for key, value in metrics.items())} |'
    )
