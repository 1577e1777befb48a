"""Parameters and multiply-accumulates of a model and of its parts.

One image runs through the model. Convolutions, linear layers and the products of attention count,
a multiplication with its addition as 1; norms, activations, pooling and resizing do not. Shapes
are propagated and nothing is computed, so the attention path makes no difference.

The cost of a detector's second stage depends on the number of objects. As in the published tables,
each box head gets 1000 proposals and each mask head 100. A segmentor's auxiliary head has
parameters, but only training runs it.
"""

from typing import Dict, Iterator, Sequence, Tuple

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .attention import GroupAttention
from .block import CrossFormerBlock
from .grouping import AxisRule

# Of the published tables, by default_scope: height, width.
SHAPES = {'mmdet': (800, 1280), 'mmseg': (1024, 1024), 'mmpretrain': (224, 224)}
PROPOSALS, MASKS = 1000, 100


class Inference(nn.Module):
    """Run all layers that one image passes, the second stage without its selection of boxes.

    Args:
        model (nn.Module): a detector of one or two stages, a segmentor, a classifier, or any model
            of MMEngine's with ``mode='tensor'``.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> None:
        if not getattr(self.model, 'with_roi_head', False):
            self.model(image, None, mode='tensor')  # without data samples
            return
        features = self.model.extract_feat(image)
        if self.model.with_rpn:
            self.model.rpn_head(features)
        roi_head = self.model.roi_head
        self.second_stage(roi_head.bbox_head, roi_head.bbox_roi_extractor, PROPOSALS, image)
        if roi_head.with_mask:
            extractor = roi_head.mask_roi_extractor
            if roi_head.share_roi_extractor:
                extractor = roi_head.bbox_roi_extractor
            self.second_stage(roi_head.mask_head, extractor, MASKS, image)

    @staticmethod
    def second_stage(heads: nn.Module, extractors: nn.Module, count: int, like: Tensor) -> None:
        """Run a head, or one for each stage of a cascade, on ``count`` regions."""
        if not isinstance(heads, nn.ModuleList):
            heads, extractors = [heads], [extractors]
        for head, extractor in zip(heads, extractors):
            size = extractor.roi_layers[0].output_size
            head(like.new_empty(count, extractor.out_channels, *size))


def parts_of(model: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    """Yield the parts of a model with their names: stages of the backbone, neck, heads."""
    for name, child in model.named_children():
        if name == 'backbone' and any(child.children()):
            for inner, part in child.named_children():
                if inner == 'layers':
                    yield from ((f'backbone.layers.{i}', stage) for i, stage in enumerate(part))
                else:
                    yield f'backbone.{inner}', part
        elif name == 'roi_head':
            yield from ((f'roi_head.{inner}', part) for inner, part in child.named_children())
        else:
            yield name, child


class Meter:
    """Count the operations of a part of a model, wherever its modules are called from.

    Args:
        part (nn.Module): gets hooks.
        counter (FlopCounterMode): counts once it is entered.
    """

    def __init__(self, part: nn.Module, counter: FlopCounterMode):
        self.counter = counter
        self.flops = self.depth = 0
        for module in part.modules():
            module.register_forward_pre_hook(self.enter)
            module.register_forward_hook(self.leave)

    def enter(self, *_) -> None:
        if not self.depth:
            self.flops -= self.counter.get_total_flops()
        self.depth += 1

    def leave(self, *_) -> None:
        self.depth -= 1
        if not self.depth:
            self.flops += self.counter.get_total_flops()


def input_channels(model: nn.Module) -> int:
    """Count the channels of the images that a model takes, by its first convolution."""
    convs = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    return next((conv.in_channels for conv in convs), 3)


def build_empty(model: dict) -> nn.Module:
    """Build a model whose tensors have shapes and no data."""
    try:
        with torch.device('meta'):
            return MODELS.build(model)
    except RuntimeError:  # MMDetection's Swin and PVT read tensors while they are built
        return MODELS.build(model).to('meta')


def operation_counter(model: nn.Module) -> FlopCounterMode:
    """Build a counter of a model's operations, 2 for a multiplication with its addition.

    It counts once it is entered. The model is changed: its attention takes the plain path, and
    blocks that were counted before are skipped.
    """
    counter = FlopCounterMode(display=False)
    blocks: Dict[tuple, int] = {}
    for module in model.modules():
        if isinstance(module, GroupAttention):
            # The other paths hide their products, and take tensors with data only.
            module.attention_path = 'plain'
        elif type(module) is nn.LayerNorm:  # forward of a subclass may take more than a tensor
            # Not counted, and many small operators to PyTorch: half of the time.
            module.forward = nn.Identity().forward
        elif isinstance(module, CrossFormerBlock):
            module.forward = counted_once(module, counter, blocks)  # type: ignore[method-assign]
    return counter


def counted_once(block: CrossFormerBlock, counter: FlopCounterMode, known: Dict[tuple, int]):
    """Wrap a block's forward pass to do nothing where an equal block has been counted.

    Most blocks of a stage are equal.

    Args:
        block (CrossFormerBlock): the block.
        counter (FlopCounterMode): the counter.
        known (dict): the operations of blocks; shared by all of a model.
    """
    forward = block.forward
    weights = tuple((name, weight.shape) for name, weight in block.named_parameters())

    def counted(x: Tensor, rows: AxisRule, columns: AxisRule) -> Tensor:
        kind = weights, x.shape, rows, columns
        if kind in known:
            counter.flop_counts['Global']['of blocks like others'] += known[kind]
            return x
        before = counter.get_total_flops()
        x = forward(x, rows, columns)
        known[kind] = counter.get_total_flops() - before
        return x

    return counted


def count(cfg: Config, shape: Sequence[int]) -> dict:
    """Count parameters and multiply-accumulates of the model of a config.

    Args:
        cfg (Config): with ``default_scope`` and ``model``.
        shape (Sequence[int]): height and width of the image.

    Returns:
        dict: ``params``, ``flops``, ``shape``, and ``parts``: for each part that has any
        parameters its ``params`` and ``flops``. The parts add up to the whole.
    """
    init_default_scope(cfg.default_scope)
    model = build_empty(cfg.model).eval()
    image = torch.empty(1, input_channels(model), *shape, device='meta')
    counter = operation_counter(model)
    meters = {name: Meter(part, counter) for name, part in parts_of(model)}
    with torch.no_grad(), counter:
        Inference(model)(image)
    parts = {
        name: dict(params=parameters_of(part), flops=meters[name].flops // 2)
        for name, part in parts_of(model)
        if parameters_of(part)
    }
    return dict(
        params=parameters_of(model),
        flops=counter.get_total_flops() // 2,
        shape=list(shape),
        parts=parts,
    )


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
