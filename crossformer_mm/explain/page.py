"""Write a scene as one self-contained HTML page: page.html with style, scripts and data in it.

The page computes attention weights in the browser: those of one block at 800 x 1216 would be
60800 x 950 numbers for each head. Its data has queries, keys and position bias of each block. The
logits of a head are a matrix ``q k^T`` with singular values ``s_i``. In its singular vectors,
queries and keys have variance 1, and their product on axis ``i``, times ``s_i``, is what the axis
adds to a logit. Both are rounded to multiples of ``step / s_i``, so that each axis adds the same
error to a logit; an axis weaker than the step is dropped. The step is the smallest that keeps the
page within its limit. The page states its error, which :func:`weight_errors` measures.
"""

import base64
import html
import json
import math
import zlib
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Sequence, Tuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from ..attention import GroupAttention
from ..errors import UserError
from ..files import write_whole
from ..grouping import group_axis, is_small
from ..position_bias import DynamicPositionBias, NoPositionBias
from .capture import BlockCapture, Scene, attention_weights, group_rules, principal_colours

SCRIPTS = ('attention.js', 'view.js', 'surface.js', 'page.js')  # page.js last: it starts
# Root mean square errors of a logit, which are relative errors of a weight, from 0.001 to 1. Finer
# ones are not worth the bytes; coarser ones show nothing.
ERRORS = [0.001 * 2 ** (n / 4) for n in range(40)]
INT16_MAX = 32767
MIN_STEPS = 0.45  # an axis whose standard deviation is fewer steps costs more than it adds
LARGEST_GROUP = 40  # for which the bias is drawn: 79 x 79 points; more are slow
CHECKED = 12  # positions per block and kind of group whose weights are compared with the model's


class PageReport(NamedTuple):
    """Size and exactness of a page.

    Args:
        bytes (int): its size.
        error (float): root mean square error of a logit that the rounding aims at.
        usual (float): relative error of weights, root mean square, as measured.
        worst (float): largest absolute error of a weight, as measured.
    """

    bytes: int
    error: float
    usual: float
    worst: float


class RoundedHead(NamedTuple):
    """Rounded queries and keys of a head.

    Args:
        numbers (ndarray): (2, axes, positions) int16, queries before keys.
        factors (ndarray): (axes,) of the products of their numbers in a logit.
    """

    numbers: np.ndarray
    factors: np.ndarray

    def logits(self, token: int, members: Tensor) -> np.ndarray:
        queries, keys = self.numbers
        return (self.factors * queries[:, token]) @ keys[:, members]


class LogitAxes(NamedTuple):
    """Queries and keys of a head in the singular vectors of its logits.

    Args:
        numbers (ndarray): (2, axes, positions) of variance 1, queries before keys.
        strengths (ndarray): (axes,) standard deviations of their products in the logits.
    """

    numbers: np.ndarray
    strengths: np.ndarray

    def rounded(self, error: float) -> RoundedHead:
        """Round for a root mean square error of a logit."""
        # Rounding to a step has the error step / sqrt(12), once for queries and once for keys.
        step = error * math.sqrt(6 / len(self.strengths))
        kept = self.strengths > MIN_STEPS * step
        numbers, strengths = self.numbers[:, kept], self.strengths[kept]
        largest = np.abs(numbers).max((0, 2), initial=0)
        steps = np.maximum(step / strengths, largest / INT16_MAX)
        return RoundedHead(np.rint(numbers / steps[:, None]).astype(np.int16), strengths * steps**2)


@torch.no_grad()
def logit_axes(attention: GroupAttention, x: Tensor) -> List[LogitAxes]:
    """Return the queries and keys of each head for a block's input (1, H, W, C)."""
    q, k, _ = attention.project(x.flatten(0, 2))
    heads = []
    for queries, keys in zip(q.double() * attention.scale, k.double()):
        q_basis, left = torch.linalg.qr(queries)
        # The mean of the keys adds the same to all logits of a query.
        k_basis, right = torch.linalg.qr(keys - keys.mean(0))
        u, strengths, v = torch.linalg.svd(left @ right.T)
        numbers = torch.stack([(q_basis @ u).T, (k_basis @ v.T).T]) * len(x.flatten(0, 2)) ** 0.5
        heads.append(LogitAxes(numbers.float().numpy(), strengths.numpy() / len(queries)))
    return heads


def deflated(data: np.ndarray) -> str:
    """Return bytes as base64 of zlib."""
    # Run lengths and Huffman codes: matches of several bytes hardly occur.
    squeeze = zlib.compressobj(6, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    return base64.b64encode(squeeze.compress(data.tobytes()) + squeeze.flush()).decode()


def packed(heads: Iterable[RoundedHead]) -> str:
    """Return the numbers of heads as text: low bytes of all, then high bytes.

    The sign is the lowest bit, so that most high bytes are 0.
    """
    numbers = np.concatenate([head.numbers.ravel() for head in heads])
    unsigned = ((numbers << 1) ^ (numbers >> 15)).view(np.uint16)
    return deflated(np.concatenate([unsigned & 255, unsigned >> 8]).astype(np.uint8))


def floats(values: Iterable[Tensor]) -> str:
    """Return tensors, joined, as base64 of float32."""
    joined = np.concatenate([np.asarray(value, '<f4').ravel() for value in values])
    return base64.b64encode(joined.tobytes()).decode()


Blocks = Dict[str, List[RoundedHead]]


def round_blocks(
    blocks: Dict[str, List[LogitAxes]], limit: int
) -> Tuple[float, Blocks, Dict[str, str]]:
    """Round all blocks as finely as fits into a number of bytes.

    Returns:
        tuple: error of a logit, the rounded heads of each block and their texts.

    Raises:
        UserError: the coarsest rounding does not fit.
    """
    found, low, high = None, 0, len(ERRORS)  # bisection: coarser takes less
    number = 0
    while low < high:
        error = ERRORS[number]
        rounded = {name: [head.rounded(error) for head in heads] for name, heads in blocks.items()}
        texts = {name: packed(heads) for name, heads in rounded.items()}
        if sum(map(len, texts.values())) + len(json.dumps(factors_of(rounded))) <= limit:
            found, high = (error, rounded, texts), number
        else:
            low = number + 1
        number = (low + high) // 2
    if found is None:
        raise UserError(
            '--max-mb: the page takes more, however coarsely its values are rounded; allow more '
            'or show a smaller image.'
        )
    return found


def factors_of(blocks: Blocks) -> Dict[str, List[List[float]]]:
    return {
        name: [[float(f'{factor:.6g}') for factor in head.factors] for head in heads]
        for name, heads in blocks.items()
    }


@torch.no_grad()
def bias_data(pos: nn.Module, groups: Sequence[Tuple[int, int]]) -> dict:
    """Return the position bias as the page gets it: an MLP, or tables for some sizes of group."""
    if isinstance(pos, DynamicPositionBias):
        parts = [pos.pos_proj, *pos.pos1, *pos.pos2, *pos.pos3]
        return dict(
            kind='mlp',
            width=pos.pos_proj.out_features,
            residual=pos.residual,
            epsilon=pos.pos1[0].eps,
            values=floats(p for part in parts for p in part.parameters()),
        )
    if isinstance(pos, NoPositionBias):
        return dict(kind='none')
    return dict(
        kind='tables',
        tables={f'{rows}x{columns}': floats([pos(rows, columns)]) for rows, columns in groups},
    )


def largest_group(backbone: nn.Module, used: Iterable[Tuple[int, int]]) -> int:
    """Return the largest size of group to draw the bias for."""
    configured = max(layer.group_size for layer in backbone.layers)
    biases = [block.attn.pos for layer in backbone.layers for block in layer.blocks]
    if not all(pos.any_group for pos in biases):
        return min(2 * configured, LARGEST_GROUP)  # tables take bytes
    return min(max(2 * configured, *map(max, used)), LARGEST_GROUP)


def weight_errors(
    attention: nn.Module, block: BlockCapture, heads: List[RoundedHead], seed: int
) -> Tuple[float, List[float]]:
    """Compare the page's attention weights with the model's, at some positions.

    Returns:
        tuple: largest difference; mean squares of relative differences, weighted by the weights,
        of each position and head.
    """
    random, worst, relative = np.random.default_rng(seed), 0.0, []
    _, height, width, _ = block.x.shape
    for token in random.integers(height * width, size=CHECKED).tolist():
        exact = attention_weights(attention, block, token)
        logits = torch.from_numpy(np.stack([head.logits(token, exact.members) for head in heads]))
        difference = exact.weights - (logits + exact.bias).softmax(-1)
        worst = max(worst, difference.abs().max().item())
        relative += (difference**2 / exact.weights.clamp(min=1e-30)).sum(-1).tolist()
    return worst, relative


def levels(values: np.ndarray) -> Tuple[str, List[float]]:
    """Return a map as 256 levels, deflated, and its range."""
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / max(high - low, 1e-12) * 255
    return deflated(np.rint(scaled).astype(np.uint8)), [low, high]


def page_data(scene: Scene, limit: int) -> Tuple[dict, Dict[str, str]]:
    """Return the data of attention.js: facts for JSON, and texts by name.

    Args:
        scene (Scene): the image and the backbone.
        limit (int): bytes of both.

    Raises:
        UserError: the coarsest rounding does not fit.
    """
    backbone, captured = scene.backbone, scene.captured
    rules = [
        group_rules(layer, *feature.shape[1:])
        for layer, feature in zip(backbone.layers, captured.features)
    ]
    sizes = [{(rows.size, columns.size) for rows, columns in kinds.values()} for kinds in rules]
    largest = largest_group(backbone, set.union(*sizes))
    squares = {(size, size) for size in range(2, largest + 1)}
    stages, texts, axes = [], {}, {}
    for stage, layer in enumerate(backbone.layers):
        feature = captured.features[stage]
        channels, height, width = feature.shape
        colours = np.rint(principal_colours(feature) * 255).astype(np.uint8)
        texts[f'colours-{stage}'] = deflated(colours)
        texts[f'magnitude-{stage}'], magnitude = levels(feature.square().mean(0).sqrt().numpy())
        blocks = []
        for number, (block, seen) in enumerate(zip(layer.blocks, captured.blocks[stage])):
            axes[f'block-{stage}-{number}'] = logit_axes(block.attn, seen.x)
            blocks.append(
                dict(
                    heads=block.attn.num_heads,
                    kind=seen.kind,
                    bias=bias_data(block.attn.pos, sorted(sizes[stage] | squares)),
                )
            )
        stages.append(
            dict(
                height=height,
                width=width,
                stride=scene.stride(stage),
                channels=channels,
                groupSize=layer.group_size,
                small=bool(is_small(height, width, layer.group_size)),
                definition=layer.lda,
                rules=rules[stage],
                groups={
                    kind: [
                        [group for table in group_axis(*axis) for group in table.tolist()]
                        for axis in zip((height, width), both)
                    ]
                    for kind, both in rules[stage].items()
                },
                magnitude=magnitude,
                blocks=blocks,
            )
        )
    taken = sum(map(len, texts.values())) + len(json.dumps(stages))
    error, rounded, block_texts = round_blocks(axes, limit - taken)
    factors = factors_of(rounded)
    worst, relative = 0.0, []
    for stage, layer in enumerate(backbone.layers):
        for number, block in enumerate(layer.blocks):
            name = f'block-{stage}-{number}'
            stages[stage]['blocks'][number]['factors'] = factors[name]
            for rows, columns in set(rules[stage].values()):
                regrouped = captured.blocks[stage][number]._replace(rows=rows, columns=columns)
                found = weight_errors(block.attn, regrouped, rounded[name], number)
                worst = max(worst, found[0])
                relative += found[1]
    usual = float(np.mean(relative)) ** 0.5
    facts = dict(stages=stages, largestGroup=largest, error=error, usual=usual, worst=worst)
    return facts, {**texts, **block_texts}


def write_page(path: Path, scene: Scene, names: Dict[str, Any], limit: int) -> PageReport:
    """Write the page.

    Args:
        path: the file.
        scene (Scene): the image and the backbone.
        names: ``model`` and ``image``, which the page's text names, and ``caption``: None, or a
            list of one text, or of two, in English and in Chinese.
        limit (int): bytes of the page.

    Raises:
        UserError: the page cannot be made as small as that, or not be written.
    """
    height, width = scene.picture.shape[:2]
    pixels = np.rint(scene.picture[..., ::-1] * 255).astype(np.uint8)
    jpeg = cv2.imencode('.jpg', pixels, [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
    about = dict(
        names,
        height=height,
        width=width,
        position=scene.position,
        head=scene.head,
        jpeg='data:image/jpeg;base64,' + base64.b64encode(jpeg).decode(),
    )
    page, style, *scripts = (
        Path(__file__).with_name(name).read_text(encoding='utf-8')
        for name in ('page.html', 'page.css', *SCRIPTS)
    )
    script = '\n'.join(scripts)
    taken = sum(len(text.encode()) for text in (page, style, script, about['jpeg'])) + 20_000
    facts, texts = page_data(scene, limit - taken)
    # In a script element only "</" and "<!--" mean anything, and JSON may write "<" in another way.
    known = json.dumps({**about, **facts}, separators=(',', ':')).replace('<', '\\u003c')
    data = [f'<script type="application/json" id="facts">{known}</script>']
    data += [
        f'<script type="text/plain" id="{name}">{text}</script>' for name, text in texts.items()
    ]
    parts = []
    for mark, text in (
        ('<!-- title -->', html.escape(str(names['image']))),
        ('/* style */', style),
        ('<!-- data -->', '\n'.join(data)),
        ('/* script */', script),
    ):
        before, page = page.split(mark)  # what was put in is not looked at again
        parts += [before, text]
    content = ''.join([*parts, page]).encode()
    write_whole(path, content)
    return PageReport(len(content), facts['error'], facts['usual'], facts['worst'])
