"""Operators that PyTorch's exporter cannot write as ONNX.

Each module has one operator of its own name: its definition in PyTorch, and ``to_onnx``, which
computes the same by operators of ONNX. It gets an opset of onnxscript, ``op``, and the exporter
records the calls.
"""

from typing import Any, Callable, Dict

import torch

from . import (
    any_size_attention,
    fixed_size_attention,
    nms,
    offsets,
    resize,
    resize_image,
    roi_features,
)

OPERATORS = (
    offsets,
    any_size_attention,
    fixed_size_attention,
    nms,
    roi_features,
    resize,
    resize_image,
)
TRANSLATIONS: Dict[Any, Callable] = {
    getattr(torch.ops.crossformer_mm, module.__name__.rpartition('.')[2]).default: module.to_onnx
    for module in OPERATORS
}
