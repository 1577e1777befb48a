"""Capture what a backbone computes for an image, and recompute attention weights.

Attention kernels never store the weights. :func:`attention_weights` computes those of one query
from the captured input of a block.
"""

from contextlib import ExitStack
from typing import Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from ..attention import GroupAttention
from ..grouping import AxisRule, Rules, group_map, stage_rules


class BlockCapture(NamedTuple):
    """Attention of one block.

    Args:
        block (int): its index in the stage.
        kind (str): 'short' or 'long', the distance.
        x, out (Tensor): (1, H, W, C) input and output of attention.
        rows, columns (AxisRule): the groups.
    """

    block: int
    kind: str
    x: Tensor
    rows: AxisRule
    columns: AxisRule
    out: Tensor


class Capture(NamedTuple):
    """One forward of a backbone.

    Args:
        features: (C, H, W) of each stage, the input of the next one.
        blocks: captures of the blocks, by stage.
        embeddings: (H, W, C) of each cross-scale embedding, before its norm.
    """

    features: List[Tensor]
    blocks: List[List[BlockCapture]]
    embeddings: List[Tensor]

    @property
    def short(self) -> List[BlockCapture]:
        """The last short-distance block of each stage."""
        return [{block.kind: block for block in blocks}['short'] for blocks in self.blocks]

    @property
    def long(self) -> List[Optional[BlockCapture]]:
        """The last long-distance block of each stage; None where there is none."""
        return [{block.kind: block for block in blocks}.get('long') for blocks in self.blocks]


class Scene(NamedTuple):
    """An image, a backbone's forward on it, and what to show of them.

    Args:
        backbone: a CrossFormer.
        picture: (H, W, 3) the backbone's input, RGB from 0 to 1.
        captured: the backbone's forward on it.
        position: x, y in pixels of the picture, of the query.
        head: the head to show attention of; None: their mean.
    """

    backbone: nn.Module
    picture: np.ndarray
    captured: Capture
    position: Tuple[int, int]
    head: Optional[int]

    def query(self, stage: int) -> Tuple[int, int]:
        """Row and column of the position in a stage's map."""
        _, height, width = self.captured.features[stage].shape
        column, row = (pixel // self.stride(stage) for pixel in self.position)
        return min(row, height - 1), min(column, width - 1)

    def stride(self, stage: int) -> int:
        """Pixels from one position of a stage's map to the next."""
        return int(np.prod([convs.stride for convs in embedding_convs(self.backbone)[: stage + 1]]))


@torch.no_grad()
def capture(backbone: nn.Module, image: Tensor) -> Capture:
    """Run a backbone on an image (1, 3, H, W)."""
    captured = Capture([], [[] for _ in backbone.layers], [])

    def add_hook(module: nn.Module, keep) -> None:
        handle = module.register_forward_hook(lambda _, inputs, out: keep(inputs, out))
        hooks.callback(handle.remove)

    with ExitStack() as hooks:
        for layer, blocks in zip(backbone.layers, captured.blocks):
            add_hook(layer, lambda _, out: captured.features.append(out[0].permute(2, 0, 1)))
            for number, (block, kind) in enumerate(layer.schedule('short', 'long')):
                add_hook(
                    block.attn,
                    lambda inputs, out, number=number, kind=kind, blocks=blocks: blocks.append(
                        BlockCapture(number, kind, inputs[0], inputs[1], inputs[2], out)
                    ),
                )
        for convs in embedding_convs(backbone):
            add_hook(convs, lambda _, out: captured.embeddings.append(out[0]))
        backbone(image)
    return captured


def embedding_convs(backbone: nn.Module) -> List[nn.Module]:
    """Return the convolutions of the first embedding and of each merging."""
    merging = [layer.downsample for layer in backbone.layers if layer.downsample is not None]
    return [backbone.patch_embed.projs, *(m.reductions for m in merging)]


def group_rules(layer: nn.Module, height: int, width: int) -> Dict[str, Rules]:
    """Return the rules of each kind of group on a stage's map: the papers' and the layer's own."""
    size, interval = layer.group_size, layer.interval
    # On a small map all kinds are short distance; the layer's definition gives their size.
    rules = {'short': stage_rules(height, width, size, interval, layer.lda)[0]}
    for kind in ('interval', 'block', *({layer.lda} & {'shifted'})):
        rules[kind] = stage_rules(height, width, size, interval, kind)[1]
    return rules


class AttentionWeights(NamedTuple):
    """Attention of one query to the N members of its group.

    Args:
        members (Tensor): (N,) tokens, row * W + column.
        weights (Tensor): (heads, N).
        values (Tensor): (heads, N, d).
        bias (Tensor): (heads, N) position bias (logit).
    """

    members: Tensor
    weights: Tensor
    values: Tensor
    bias: Tensor


@torch.no_grad()
def attention_weights(
    attention: GroupAttention, block: BlockCapture, token: int
) -> AttentionWeights:
    """Compute the attention weights of a query.

    Args:
        attention (GroupAttention): the block's.
        block (BlockCapture): its capture.
        token (int): row * W + column of the query.
    """
    x, rows, columns = block.x, block.rows, block.columns
    for table in group_map(x.shape[1], x.shape[2], rows, columns):
        at = (table == token).nonzero()
        if len(at):
            members = table[at[0, 0]].flatten()
            break
    q, k, v = attention.project(x.flatten(0, 2)[members])
    query = (members == token).nonzero()[0]
    height, width = table.shape[1:]
    bias = attention.position_bias(query, height, width, rows, columns)
    weights = attention.logits(q, k, query, bias).softmax(-1)
    return AttentionWeights(members, weights[:, 0], v, bias[:, 0])


def attention_map(
    block: BlockCapture, attention: nn.Module, query: Tuple[int, int], head: Optional[int]
) -> np.ndarray:
    """Return (H, W) the attention weights of a query (row, column); NaN outside its group."""
    _, height, width, _ = block.x.shape
    found = attention_weights(attention, block, query[0] * width + query[1])
    weights = np.full(height * width, np.nan)
    weights[found.members] = found.weights.mean(0) if head is None else found.weights[head]
    return weights.reshape(height, width)


def principal_colours(feature: Tensor) -> np.ndarray:
    """Map (C, H, W) to (H, W, 3): the first three principal components as RGB from 0 to 1."""
    points = feature.flatten(1).T
    points = points - points.mean(0)
    _, _, components = torch.linalg.svd(points, full_matrices=False)
    components = components[:3]
    largest = components.abs().argmax(1, keepdim=True)  # signs are arbitrary: fix them
    projected = points @ (components * components.gather(1, largest).sign()).T
    low, high = (torch.quantile(projected, q, dim=0) for q in (0.01, 0.99))
    colours = ((projected - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).numpy()
    colours = np.pad(colours, ((0, 0), (0, 3 - colours.shape[1])))  # maps of one or two positions
    return colours.reshape(*feature.shape[1:], 3)
