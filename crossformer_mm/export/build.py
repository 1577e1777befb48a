"""Modules to export, from a config and a checkpoint."""

import sys
from typing import Tuple

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from ..checkpoint import fit_checkpoint, load_backbone, read_checkpoint
from ..errors import UserError
from . import metadata
from .models import UnknownModel, WholeClassifier, WholeDetector, WholeSegmentor
from .networks import Backbone, Classifier, Detector, Segmentor
from .options import Options

# Limit of an ONNX file, less what a graph and its tables take.
MAX_BYTES = 2**31 - 2**27


def build(cfg: Config, options: Options) -> Tuple[nn.Module, dict]:
    """Build the module to export and load its weights.

    Returns:
        tuple: the module, and the content of the checkpoint (empty for a backbone, or without one).

    Raises:
        UserError: the model cannot be built, loaded or exported.
    """
    scope = cfg.default_scope
    init_default_scope(scope)
    if options.what == 'model':
        check_images(cfg, options)
    try:
        model = MODELS.build(cfg.model.backbone if options.what == 'backbone' else cfg.model)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(
            f"the model of config '{options.config}' could not be built: {type(error).__name__}: "
            f'{error}'
        ) from None
    content: dict = {}
    if not options.checkpoint:
        print('warning: no checkpoint is given, so the file gets random weights.', file=sys.stderr)
    elif options.what == 'backbone':
        load_backbone(model, options.checkpoint)
    else:
        content = read_checkpoint(options.checkpoint)
        fit_checkpoint(model, content, options.checkpoint)
    model = revert_sync_batchnorm(model).eval().requires_grad_(False)
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    if options.format == 'onnx' and size > MAX_BYTES:
        raise UserError(
            f"config '{options.config}': the model's weights take {size / 1e9:.1f} GB, and an ONNX "
            f'file holds at most {MAX_BYTES / 1e9:.1f} GB of them; --format torch-export has no '
            'such limit.'
        )
    if options.what == 'backbone':
        return Backbone(model), content
    if options.what == 'model':
        rule = metadata.rule_for_inside(cfg) if options.resize_inside else None
        try:
            if scope == 'mmdet':
                return WholeDetector(model, rule), content
            if scope == 'mmseg':
                return WholeSegmentor(model, options.logits, rule), content
            return WholeClassifier(model), content
        except UnknownModel as error:
            raise UserError(f"config '{options.config}': {error}.") from None
    if options.label_map and model.out_channels == 1:
        raise UserError(
            '--label-map needs a segmentor of two or more output channels, this one has 1.'
        )
    if scope == 'mmseg':
        return Segmentor(model, options.label_map), content
    return (Detector if scope == 'mmdet' else Classifier)(model), content


def check_images(cfg: Config, options: Options) -> None:
    """Fill in the type of a whole model's images.

    Raises:
        UserError: the model does not take colour images of 8 bits.
    """
    channels = metadata.channels_of(cfg)
    if channels != 3:
        raise UserError(
            f"config '{options.config}': a whole model takes images of 3 channels, and the "
            f'backbone has in_channels={channels}; --what head or --what backbone exports it for '
            'normalised images.'
        )
    prepared = metadata.preparation(metadata.test_dataset(cfg).get('pipeline') or ())
    if prepared['load']['to_float32'] and options.input_type == 'uint8':
        raise UserError(
            '--input-type uint8: the test pipeline loads images with to_float32, and their resized '
            'values are no whole numbers; give float32 or leave the option out.'
        )
    if options.input_type is None:
        options.input_type = 'float32' if prepared['load']['to_float32'] else 'uint8'
