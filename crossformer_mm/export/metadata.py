"""Metadata of an exported file: everything that is needed to run it."""

import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.registry import DATASETS, TRANSFORMS

from ..class_names import names_and_colours
from ..config_parts import innermost, kind_of
from ..errors import UserError
from ..version import __version__
from ..without_torch.model import LOAD
from .options import Options

# Outputs of whole models, by library; {} is their size.
OUTPUTS = dict(
    mmdet=dict(
        boxes='(n, 4) float32: left, top, right, bottom in pixels of the image that was given, '
        'best first',
        scores='(n,) float32, from 0 to 1',
        labels='(n,) int64: indices into classes',
        masks='(n, height, width) float32, from 0 to 1: to be stretched over each box and cut at '
        'mask_threshold',
    ),
    mmseg=dict(
        labels='(batch, height, width) int64: indices into classes, of the size {}',
        logits='(batch, classes, height, width) float32, of the size {}',
    ),
    mmpretrain=dict(scores='(batch, classes) float32, from 0 to 1, those of an image sum up to 1'),
)
TASKS = dict(mmseg='label map', mmpretrain='classes')
# The ways to decode an image to 8 bits and three channels, as tools/run_onnx.py does.
COLOUR_TYPES = ('color', 'color_ignore_orientation')


def of_network(cfg: Config, what: str) -> Dict[str, str]:
    """Describe a file that takes normalised images."""
    known = cfg.model.get('data_preprocessor') or {}
    channels = channels_of(cfg)
    order = 'RGB ' if known.get('bgr_to_rgb') or known.get('to_rgb') else 'BGR '
    return dict(
        what=what,
        input=f'{order if channels == 3 else ""}images (batch, {channels}, height, width), '
        'normalised: (value from 0 to 255 - mean) / std',
        mean=json.dumps(known.get('mean')),
        std=json.dumps(known.get('std')),
        model=kind_of(cfg.model),
        crossformer_mm=__version__,
    )


def of_whole_model(
    cfg: Config, options: Options, content: Mapping, outputs: List[str], fill: Sequence[int]
) -> Dict[str, str]:
    """Describe a file that takes images as they are.

    Args:
        cfg (Config): of the model and its data.
        options: of the export.
        content: the checkpoint.
        outputs: names of the file's outputs.
        fill: colour of padding.

    Returns:
        dict: JSON texts.

    Raises:
        UserError: the data set, or what its pipeline does, cannot be described.
    """
    scope, fixed, resize_inside = cfg.default_scope, options.fixed_shape, options.resize_inside
    detection, checkpoint = scope == 'mmdet', options.checkpoint
    dataset = test_dataset(cfg)
    try:
        built = DATASETS.build({**dataset, 'lazy_init': True}) if dataset else None
    except ValueError as error:
        raise UserError(str(error)) from None
    prepared = preparation(dataset.get('pipeline') or ())
    rule, crop = prepared.pop('resize'), prepared.get('crop')
    if fixed and crop not in (None, list(fixed)):
        raise UserError(
            f'--fixed-shape must be {crop[0]} {crop[1]}, to which the test pipeline crops.'
        )
    steps = ' and '.join(['resize', *(name for name in prepared if name != 'load')])
    before = '' if resize_inside else f', after {steps}'
    size = 'of the image' if resize_inside else 'that was asked for'
    described = dict(
        task=TASKS.get(scope, 'instances' if 'masks' in outputs else 'boxes'),
        input=f'RGB images as they are, values from 0 to 255{before}: image '
        + ('(1, 3, height, width)' if detection else '(batch, 3, height, width)'),
        resize=None if resize_inside else rule,
        **prepared,
        outputs={name: OUTPUTS[scope][name].format(size) for name in outputs},
        **names_and_colours(getattr(built, 'metainfo', {}), content),
        model=kind_of(cfg.model),
        config=str(options.config),
        checkpoint=Path(checkpoint).name if checkpoint else None,
        checkpoint_sha256=(
            hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()
            if checkpoint and Path(checkpoint).is_file()
            else None
        ),
        crossformer_mm=__version__,
    )
    if resize_inside:
        described['resize_inside'] = rule
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
    if fixed:
        described.update(fixed_shape=fixed, fill=fill)
    return {key: json.dumps(value) for key, value in described.items()}


def channels_of(cfg: Config) -> int:
    """Return the number of channels of a backbone's images."""
    return (cfg.model.get('backbone') or {}).get('in_channels', 3)


def test_dataset(cfg: Config) -> dict:
    """Return the config of the test data set, without wrappers; empty if there is none."""
    return innermost(cfg.test_dataloader.dataset) if cfg.get('test_dataloader') else {}


def preparation(pipeline: Sequence[dict]) -> Dict[str, Any]:
    """Read from a test pipeline how images are prepared.

    Returns:
        dict: ``load``, options of decoding; ``resize``, a rule or None; and, if images are cropped
        around their centre, ``crop``, its height and width.

    Raises:
        UserError: the test pipeline does something else.
    """
    load = loading(pipeline[0]) if pipeline else LOAD
    found: Dict[str, Any] = dict(load=load, resize=None)
    for step in pipeline[1:]:
        kind = kind_of(step)
        first = found['resize'] is None and 'crop' not in found
        if kind in ('Resize', 'ResizeEdge') and first and step.get('scale'):
            scale = step['scale']
            if kind == 'ResizeEdge':
                rule = dict(edge=step.get('edge', 'short'), size=scale)
            else:
                width, height = [scale] * 2 if np.isscalar(scale) else scale
                rule = dict(width=width, height=height)
                rule['keep_ratio'] = bool(step.get('keep_ratio', False))
            rule['interpolation'] = step.get('interpolation', 'bilinear')
            found['resize'] = dict(rule, backend=step.get('backend') or 'cv2')
        elif kind == 'CenterCrop' and 'crop' not in found and not step.get('auto_pad'):
            size = step['crop_size']
            found['crop'] = [size] * 2 if np.isscalar(size) else list(size)[::-1]
        elif not (kind.startswith('Pack') or is_of_annotations(step)):
            raise UserError(
                'the test pipeline may load an image, resize it once to a scale, crop the middle, '
                f'load annotations and pack, found {kind}'
            )
    return found


def is_of_annotations(step: dict) -> bool:
    """Check whether a step of a pipeline loads annotations."""
    kind = kind_of(step)
    return kind.startswith('Load') and 'Annotation' in kind


def loading(step: dict) -> Dict[str, Any]:
    """Read from the first step of a test pipeline how it decodes image files.

    Returns:
        dict: ``color_type``, one of COLOUR_TYPES, and ``to_float32``.

    Raises:
        UserError: tools/run_onnx.py cannot decode them so.
    """
    if kind_of(step) != 'LoadImageFromFile':
        raise UserError(
            'the test pipeline must begin with LoadImageFromFile, which an exported file can be '
            f'told of, found {kind_of(step)}'
        )
    try:
        built = TRANSFORMS.build(step)
    except ValueError as error:
        raise UserError(str(error)) from None
    if type(built) is not LoadImageFromFile:
        raise UserError(
            'the test pipeline must begin with the LoadImageFromFile of MMCV, found that of '
            f'{type(built).__module__}'
        )
    backend = built.imdecode_backend or mmcv.image.io.imread_backend
    if backend != 'cv2':
        raise UserError(
            "LoadImageFromFile.imdecode_backend must be 'cv2', by which tools/run_onnx.py decodes "
            f"images, got '{backend}'"
        )
    if built.color_type not in COLOUR_TYPES:
        raise UserError(
            'LoadImageFromFile.color_type of a whole model must be '
            f"{' or '.join(map(repr, COLOUR_TYPES))}, got '{built.color_type}'; --what head "
            'exports a model for normalised images of any kind'
        )
    return dict(color_type=built.color_type, to_float32=bool(built.to_float32))


def rule_for_inside(cfg: Config) -> dict:
    """Return the rule by which a file resizes images itself.

    Raises:
        UserError: it cannot.
    """
    prepared = preparation(test_dataset(cfg).get('pipeline') or ())
    rule = prepared['resize']
    known = rule and 'edge' not in rule and rule['backend'] == 'cv2'
    whole = not prepared['load']['to_float32']
    if not known or rule['interpolation'] != 'bilinear' or 'crop' in prepared or not whole:
        raise UserError(
            "--resize-inside takes a test pipeline with a bilinear Resize by 'cv2' of images in 8 "
            f'bits and no crop, found {prepared}'
        )
    return rule
