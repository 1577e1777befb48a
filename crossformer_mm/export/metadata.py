"""What an exported file says of itself: all that its user has to know to run it."""

import hashlib
import json
from pathlib import Path
from typing import Dict, List, Mapping, Optional

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS

from ..engine.class_names import names_and_colours
from ..engine.command_line import innermost, kind_of
from ..version import __version__

OUTPUTS = dict(
    boxes='(n, 4) float32: left, top, right, bottom in pixels of the image that was given, best '
    'first',
    scores='(n,) float32, from 0 to 1',
    labels='(n,) int64: indices into classes',
    masks='(n, height, width) float32, from 0 to 1: to be stretched over each box and cut at '
    'mask_threshold',
)
LABEL_MAP = '(batch, height, width) int64: indices into classes, of the size that was asked for'
LOGITS = '(batch, classes, height, width) float32, of the size that was asked for'


def of_network(cfg: Config, what: str) -> Dict[str, str]:
    """Of a file that takes normalised images."""
    known = cfg.model.get('data_preprocessor') or {}
    order = 'RGB' if known.get('bgr_to_rgb') else 'BGR'
    return dict(
        what=what,
        input=f'{order} images (batch, 3, height, width), normalised: '
        '(value from 0 to 255 - mean) / std',
        mean=json.dumps(known.get('mean')),
        std=json.dumps(known.get('std')),
        model=kind_of(cfg.model),
        crossformer_mm=__version__,
    )


def of_whole_model(
    cfg: Config, config: str, checkpoint: Optional[str], content: Mapping, outputs: List[str]
) -> Dict[str, str]:
    """Of a file that takes images as they are.

    Args:
        cfg (Config): of the model and its data.
        config: its file.
        checkpoint: the file of the weights, if there is one.
        content: what is in it.
        outputs: names of the file's outputs.

    Returns:
        dict: JSON texts, all of them, so that one reader serves all.
    """
    detection = cfg.default_scope == 'mmdet'
    dataset = innermost(cfg.test_dataloader.dataset) if cfg.get('test_dataloader') else {}
    built = DATASETS.build({**dataset, 'lazy_init': True}) if dataset else None
    described = dict(
        task=('instances' if 'masks' in outputs else 'boxes') if detection else 'label map',
        input='RGB images as they are, values from 0 to 255, after resize: image '
        + ('(1, 3, height, width)' if detection else '(batch, 3, height, width)'),
        resize=resize_rule(dataset.get('pipeline') or ()),
        outputs={
            name: {**OUTPUTS, 'logits': LOGITS}[name]
            if detection or name == 'logits'
            else LABEL_MAP
            for name in outputs
        },
        **names_and_colours(getattr(built, 'metainfo', {}), content),
        model=kind_of(cfg.model),
        config=str(config),
        checkpoint=Path(checkpoint).name if checkpoint else None,
        checkpoint_sha256=(
            hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()
            if checkpoint and Path(checkpoint).is_file()
            else None
        ),
        crossformer_mm=__version__,
    )
    if detection:
        test = cfg.model.test_cfg
        last = test.get('rcnn', test)
        described['thresholds'] = dict(
            score=last.get('score_thr', 0),
            nms_iou=last.nms.iou_threshold,
            most_boxes=last.max_per_img,
        )
        if 'masks' in outputs:
            described['mask_threshold'] = last.mask_thr_binary
    else:
        described['first_value'] = int(bool(getattr(built, 'reduce_zero_label', False)))
    return {key: json.dumps(value) for key, value in described.items()}


def resize_rule(pipeline: List[dict]) -> Optional[dict]:
    """What to do with an image before it is given to the file; None: nothing.

    Raises:
        ValueError: a test pipeline that does something else; the message is a sentence.
    """
    rule = None
    for step in pipeline:
        kind = kind_of(step)
        if kind == 'Resize' and rule is None and step.get('scale'):
            width, height = step['scale'] if not np.isscalar(step['scale']) else [step['scale']] * 2
            rule = dict(
                width=width,
                height=height,
                keep_ratio=bool(step.get('keep_ratio', False)),
                interpolation=step.get('interpolation', 'bilinear'),
            )
        elif not kind.startswith(('Load', 'Pack')):
            raise ValueError(
                f'the test pipeline may load, resize once to a scale and pack, found {kind}'
            )
    if rule and rule['interpolation'] != 'bilinear':
        raise ValueError(f"the test pipeline must resize bilinearly, not '{rule['interpolation']}'")
    return rule
