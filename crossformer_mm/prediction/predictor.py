"""Models of MMDetection and MMSegmentation, ready to predict."""

import sys
from contextlib import nullcontext
from typing import Any, NamedTuple, Sequence, Tuple

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, FUNCTIONS, Registry
from torch import Tensor, nn

from ..checkpoint import CheckpointError, fit_checkpoint, read_checkpoint
from ..class_names import names_and_colours, recorded
from ..config_parts import innermost, kind_of
from ..engine.config import ensure_visualizer
from ..errors import UserError
from .sources import Pipeline


class Predictor(NamedTuple):
    """Model with what is needed around it."""

    inferencer: Any  # of MMDetection or MMSegmentation
    pipeline: Pipeline
    classes: Sequence[str]
    detection: bool
    first_value: int  # of label maps


def build_predictor(cfg: Config, config: str, checkpoint: str, device: torch.device) -> Predictor:
    """Build the library's inferencer with weights that all fit.

    Args:
        cfg: of a detector or segmentor with a test_dataloader; changed.
        config: its file, for error messages.
        checkpoint: file of the weights.
        device: of the model.

    Raises:
        ValueError, FileNotFoundError: the config or the checkpoint cannot be used.
    """
    if cfg.default_scope == 'mmdet':
        from mmdet.apis import DetInferencer as Inferencer
    else:
        from mmseg.apis import MMSegInferencer as Inferencer
    cfg.test_dataloader.dataset = innermost(cfg.test_dataloader.dataset)
    pipeline = cfg.test_dataloader.dataset.pipeline
    pipeline[:] = [step for step in pipeline if 'Annotation' not in kind_of(step)]
    pipeline[0].type = kind_of(pipeline[0])  # in a pure Python config it is a class
    if pipeline[0].type != 'LoadImageFromFile':
        raise UserError(
            f"config '{config}': its test pipeline must begin with LoadImageFromFile, found "
            f"'{pipeline[0].type}'."
        )
    ensure_visualizer(cfg).vis_backends = None  # pictures are written here
    if cfg.default_scope not in FUNCTIONS.children:
        # MMEngine warns that it takes the collate function from its own registry.
        Registry('function', parent=FUNCTIONS, scope=cfg.default_scope)
    inferencer = Inferencer(cfg, device=str(device), scope=cfg.default_scope)
    content = read_checkpoint(checkpoint)
    try:
        fit_checkpoint(inferencer.model, content, checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f'{error} Give the config that it was trained with.') from None
    dataset = DATASETS.build({**cfg.test_dataloader.dataset, 'lazy_init': True})
    meta = names_and_colours(dataset.metainfo, content)
    inferencer.model.dataset_meta = inferencer.visualizer.dataset_meta = meta
    check_names(inferencer.model, meta['classes'], bool(recorded(content).get('classes')), config)
    grey = 'grayscale' in pipeline[0].get('color_type', 'color')
    return Predictor(
        inferencer,
        Pipeline(inferencer.pipeline, grey),
        meta['classes'],
        cfg.default_scope == 'mmdet',
        int(bool(getattr(dataset, 'reduce_zero_label', False))),
    )


def check_names(model: nn.Module, classes: Sequence[str], trained: bool, config: str) -> None:
    """Compare the names of classes with the number that a model has. Too few are a warning if they
    are those of the training (``trained``), otherwise a UserError."""
    head = getattr(model, 'roi_head', model)
    head = getattr(head, 'bbox_head', None) or getattr(head, 'decode_head', None)
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    needed = getattr(head, 'num_classes', 0)
    if trained and len(classes) < needed:
        print(
            f'warning: the model has {needed} classes, but was trained on {len(classes)}, '
            f'{classes[0]} to {classes[-1]}: objects of the others are left out, label maps may '
            'have numbers without a name.',
            file=sys.stderr,
        )
    elif len(classes) < needed:
        raise UserError(
            f"config '{config}': the model has {needed} classes, but the names of "
            f'{len(classes)} are known; name them in test_dataloader.dataset.metainfo.classes.'
        )


def use_bfloat16(model: nn.Module, device: torch.device, detection: bool):
    """Prepare a model for bfloat16, and return the context to run it in."""
    autocast = torch.autocast(device.type, torch.bfloat16)
    if not detection:
        return autocast
    extract = model.extract_feat

    def extract_feat(*args, **kwargs) -> Tuple[Tensor, ...]:
        with autocast:
            return tuple(feature.float() for feature in extract(*args, **kwargs))

    model.extract_feat = extract_feat  # mmcv's operators on regions and boxes take no bfloat16
    return nullcontext()
