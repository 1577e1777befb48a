"""Operators that PyTorch's exporter cannot write as ONNX.

Each module has one operator of its own name: its definition in PyTorch, the same as a function of
standard operators in ONNX's text form, and ``to_onnx``, which calls that function in a file.
"""

from typing import Any, Callable, Dict

import torch

from . import (
    fixed_attention,
    map_attention,
    nms,
    offsets,
    padded_axis,
    resize,
    resize_image,
    roi_features,
)

DOMAIN = 'crossformer_mm'
OPERATORS = (offsets, map_attention, fixed_attention, nms, roi_features, resize, resize_image)
TRANSLATIONS: Dict[Any, Callable] = {
    getattr(torch.ops.crossformer_mm, module.__name__.rpartition('.')[2]).default: module.to_onnx
    for module in OPERATORS
}
# ONNX functions that others call.
HELPERS = (padded_axis.FIT_RULE, padded_axis.PADDED_AXIS, resize_image.SAMPLES)
