"""The page that ``tools/explain.py --html`` writes: page.html, page.css and page.js with the data.

A page computes attention when it is pointed at: all weights of one block at 800 x 1216 would be
60800 x 950 numbers for each head. It gets, of each block, queries and keys of every position and
the position bias, and takes the softmax itself. Queries and keys are rounded so that the page
stays small, which is where its weights differ from those of the model.

Of each head, the logits of all pairs of positions are a matrix ``q k^T``. Its singular value
decomposition gives the axes in which queries and keys need the fewest digits: along the i-th,
both have variance 1 and it adds the product of theirs, times the strength ``s_i``, to a logit.
Rounding both to multiples of ``c / s_i`` costs every axis the same error; an axis with a strength
far below ``c`` needs no digits at all. Keys are first reduced by their mean, which adds the same to
all logits of a query.
"""

import base64
import html
import json
import math
import zlib
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossformer_mm.grouping import AxisRule, fit_rule, is_small, long_distance, short_distance
from crossformer_mm.position_bias import DynamicPositionBias, NoPositionBias

HERE = Path(__file__).resolve().parent
FINEST, COARSEST = 0.001, 1.0  # error of a logit, root mean square
LARGEST_LEVEL = 32767  # of 16 bits
LARGEST_GROUP = 40  # to show the bias of: beyond, drawing 79 x 79 points gets slow
CHECKED = 12  # positions of each block whose weights are compared with the model's


class Axes(NamedTuple):
    """Queries and keys of one head in the axes of its logits.

    Args:
        queries, keys (ndarray): (axes, positions), of variance 1.
        strengths (ndarray): (axes,), largest first.
    """

    queries: np.ndarray
    keys: np.ndarray
    strengths: np.ndarray


class Rounded(NamedTuple):
    """The same as whole numbers: logits are ``(factors * queries).T @ keys``."""

    queries: np.ndarray
    keys: np.ndarray
    factors: np.ndarray


def axes_of(queries: np.ndarray, keys: np.ndarray) -> Axes:
    """Of one head's queries, already scaled, and keys, both (positions, head_dim)."""
    count = len(queries)
    q, left = np.linalg.qr(queries)
    k, right = np.linalg.qr(keys - keys.mean(0))
    u, strengths, v = np.linalg.svd(left @ right.T)
    return Axes((q @ u).T * count**0.5, (k @ v.T).T * count**0.5, strengths / count)


def round_axes(axes: Axes, error: float) -> Rounded:
    """Whole numbers for a root mean square error of a logit of at most about ``error``."""
    step = step_for(error, len(axes.strengths))
    kept = axes.strengths > step / 4  # of lesser strength all numbers but outliers would be 0
    strengths = axes.strengths[kept, None]
    queries, keys = axes.queries[kept], axes.keys[kept]
    largest = np.maximum(np.abs(queries), np.abs(keys)).max(1, keepdims=True, initial=0)
    steps = np.maximum(step / strengths, largest / LARGEST_LEVEL)
    return Rounded(
        *(np.rint(values / steps).astype(np.int16) for values in (queries, keys)),
        (strengths * steps**2)[:, 0],
    )


def step_for(error: float, axes: int) -> float:
    """Rounding to multiples of c / s gives queries and keys an error of c / s / sqrt(12) each."""
    return error * math.sqrt(6 / axes)


def bytes_expected(heads: Sequence[Axes], error: float) -> float:
    """The entropy of rounded numbers, were they normally distributed."""
    bits = 0.0
    for axes in heads:
        relative = axes.strengths / step_for(error, len(axes.strengths))
        levels = math.sqrt(2 * math.pi * math.e) * relative[relative > 0.25]
        bits += 2 * axes.queries.shape[1] * np.log2(1 + levels).sum()
    return bits / 8


def packed(rounded: Sequence[Rounded]) -> str:
    """Whole numbers of all heads as base64 of zlib: low bytes of all, then high bytes.

    The sign is in the lowest bit, so that the high bytes are mostly 0.
    """
    numbers = [part.ravel() for head in rounded for part in (head.queries, head.keys)]
    numbers = np.concatenate(numbers)
    unsigned = ((numbers << 1) ^ (numbers >> 15)).view(np.uint16)
    return deflated(np.concatenate([unsigned & 255, unsigned >> 8]).astype(np.uint8))


def deflated(data: np.ndarray) -> str:
    # Runs and Huffman codes: on numbers without repetitions as small as any other strategy.
    squeeze = zlib.compressobj(6, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    return base64.b64encode(squeeze.compress(data.tobytes()) + squeeze.flush()).decode()


def floats(values: Sequence[Tensor]) -> str:
    """Parameters as base64 of float32, one after another."""
    joined = np.concatenate([np.asarray(value, '<f4').ravel() for value in values])
    return base64.b64encode(joined.tobytes()).decode()


@torch.no_grad()
def queries_and_keys(attention: nn.Module, x: Tensor) -> Tuple[Tensor, Tensor]:
    """(heads, positions, head_dim) each in float64, queries scaled."""
    channels = x.shape[-1]
    weight, bias = attention.qkv.weight[: 2 * channels], attention.qkv.bias
    both = F.linear(x.reshape(-1, channels), weight, bias if bias is None else bias[: 2 * channels])
    q, k = both.double().unflatten(1, (2, attention.num_heads, -1)).permute(1, 2, 0, 3)
    return q * attention.scale, k


class Bias:
    """The position bias of a block as the page gets it: an MLP, or tables for some groups."""

    def __init__(self, pos: nn.Module, groups: Sequence[Tuple[int, int]]):
        self.pos, self.groups = pos, groups

    @torch.no_grad()
    def data(self) -> dict:
        pos = self.pos
        if isinstance(pos, DynamicPositionBias):
            parts = [pos.pos_proj, *pos.pos1, *pos.pos2, *pos.pos3]
            parameters = [p for part in parts for p in part.parameters()]
            return dict(
                kind='mlp',
                width=pos.pos_proj.out_features,
                residual=pos.residual,
                epsilon=pos.pos1[0].eps,
                values=floats(parameters),
            )
        if isinstance(pos, NoPositionBias):
            return dict(kind='none')
        tables = {
            f'{rows}x{columns}': floats([pos(rows, columns)]) for rows, columns in self.groups
        }
        return dict(kind='tables', tables=tables)


def kinds_of(layer: nn.Module) -> List[str]:
    """Kinds of groups to choose from: the papers' three, and the layer's own."""
    return ['short', 'interval', 'block', *({layer.lda} & {'shifted'})]


def rules_of(layer: nn.Module, height: int, width: int) -> Dict[str, Tuple[AxisRule, AxisRule]]:
    """Of each kind of group the rules of rows and columns, in the smallest numbers."""
    size, interval = layer.group_size, layer.interval
    # On a small map all are short distance, of a size that the definition says.
    found = {'short': short_distance(height, width, size, layer.lda)}
    for kind in kinds_of(layer)[1:]:
        found[kind] = long_distance(height, width, size, interval, kind)
    return {
        kind: (fit_rule(height, rows), fit_rule(width, columns))
        for kind, (rows, columns) in found.items()
    }


def members_of(position: int, length: int, rule: AxisRule) -> np.ndarray:
    """Positions of an axis in the group of one of them."""
    place = position + rule.lead
    within = place % (rule.size * rule.interval)
    first = place - within + within % rule.interval - rule.lead
    found = first + rule.interval * np.arange(rule.size)
    return found[(found >= 0) & (found < length)]


@torch.no_grad()
def largest_difference(
    attention: nn.Module,
    rules: Dict[str, Tuple[AxisRule, AxisRule]],
    x: Tensor,
    rounded: Sequence[Rounded],
    seed: int,
) -> float:
    """By how much a weight of the page differs from the model's, at some positions."""
    random, worst = np.random.default_rng(seed), 0.0
    _, height, width, _ = x.shape
    queries, keys = (part.numpy() for part in queries_and_keys(attention, x))
    for rows, columns in set(rules.values()):
        table = attention.pos(rows.size, columns.size).numpy()
        centre = rows.size - 1, columns.size - 1
        for _ in range(CHECKED):
            row, column = int(random.integers(height)), int(random.integers(width))
            row_members = members_of(row, height, rows)
            column_members = members_of(column, width, columns)
            token = row * width + column
            members = (row_members[:, None] * width + column_members).ravel()
            bias = table[
                :,
                centre[0] + (row - row_members)[:, None] // rows.interval,
                centre[1] + (column - column_members) // columns.interval,
            ].reshape(len(table), -1)
            logits = np.einsum('hd,hnd->hn', queries[:, token], keys[:, members])
            shown = np.stack(
                [
                    (head.factors * head.queries[:, token]) @ head.keys[:, members]
                    for head in rounded
                ]
            )
            exact, shown = (torch.from_numpy(both + bias).softmax(-1) for both in (logits, shown))
            worst = max(worst, (exact - shown).abs().max().item())
    return worst


def levels(values: np.ndarray) -> Tuple[str, List[float]]:
    """A map as 256 levels, deflated, and the range that they divide."""
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / max(high - low, 1e-12) * 255
    return deflated(np.rint(scaled).astype(np.uint8)), [low, high]


def stage_data(layer: nn.Module, feature: Tensor, stride: int, colours: np.ndarray) -> Tuple:
    """What the page says of a stage, and its features as two texts."""
    channels, height, width = feature.shape
    magnitude, magnitude_range = levels(feature.square().mean(0).sqrt().numpy())
    facts = dict(
        height=height,
        width=width,
        stride=stride,
        channels=channels,
        groupSize=layer.group_size,
        interval=layer.interval,
        small=bool(is_small(height, width, layer.group_size)),
        definition=layer.lda,
        rules=rules_of(layer, height, width),
        magnitude=magnitude_range,
        blocks=[],
    )
    return facts, (deflated(np.rint(colours * 255).astype(np.uint8)), magnitude)


def biases_of(backbone: nn.Module, stages: Sequence[dict]) -> Tuple[int, List[List[Bias]]]:
    """The largest group to show the bias of, and the bias of each block."""
    configured = max(layer.group_size for layer in backbone.layers)
    used = [[(rows.size, columns.size) for rows, columns in s['rules'].values()] for s in stages]
    largest = min(
        max(2 * configured, *(max(size) for sizes in used for size in sizes)), LARGEST_GROUP
    )
    if not all(
        isinstance(block.attn.pos, (DynamicPositionBias, NoPositionBias))
        for layer in backbone.layers
        for block in layer.blocks
    ):
        largest = min(largest, 2 * configured)  # tables take bytes
    squares = [(size, size) for size in range(2, largest + 1)]
    return largest, [
        [Bias(block.attn.pos, sorted({*sizes, *squares})) for block in layer.blocks]
        for layer, sizes in zip(backbone.layers, used)
    ]


def heads_of(attention: nn.Module, x: Tensor) -> List[Axes]:
    """In float32: exact beyond what is kept of them, and half of the memory."""
    return [
        Axes(*(part.astype(np.float32) for part in axes_of(q, k)))
        for q, k in zip(*(part.numpy() for part in queries_and_keys(attention, x)))
    ]


def round_blocks(
    blocks: Dict[str, List[Axes]], limit: int
) -> Tuple[float, Dict[str, List[Rounded]], Dict[str, str]]:
    """Round all blocks as finely as fits into some bytes.

    Returns:
        the error of a logit, the numbers and their texts.

    Raises:
        ValueError: not even the coarsest fit.
    """
    error = FINEST
    while True:
        while sum(bytes_expected(heads, error) for heads in blocks.values()) > limit * 3 / 4:
            error *= 1.1
            if error > COARSEST:
                raise ValueError(f'what the page needs does not fit into {limit} bytes.')
        rounded = {
            name: [round_axes(axes, error) for axes in heads] for name, heads in blocks.items()
        }
        texts = {name: packed(heads) for name, heads in rounded.items()}
        if sum(map(len, texts.values())) <= limit:
            return error, rounded, texts
        error *= 1.25


def page_data(scene, colours: Sequence[np.ndarray], limit: int) -> Tuple[dict, Dict[str, str]]:
    """What page.js reads: facts as JSON has them, and texts by name.

    Args:
        scene (Scene): of explain.py.
        colours: (H, W, 3) from 0 to 1, of the features of each stage.
        limit (int): bytes of both.

    Raises:
        ValueError: not even the coarsest numbers fit.
    """
    backbone, seen = scene.backbone, scene.seen
    stages, texts, blocks, attentions = [], {}, {}, {}
    for stage, layer in enumerate(backbone.layers):
        facts, (texts[f'colours-{stage}'], texts[f'magnitude-{stage}']) = stage_data(
            layer, seen.features[stage], scene.stride(stage), colours[stage]
        )
        stages.append(facts)
    largest, biases = biases_of(backbone, stages)
    for stage, layer in enumerate(backbone.layers):
        for number, block in enumerate(layer.blocks):
            name = f'block-{stage}-{number}'
            attentions[name] = block.attn, seen.blocks[stage][number].x
            blocks[name] = heads_of(*attentions[name])
            facts = dict(
                heads=block.attn.num_heads,
                kind='long' if number % 2 else 'short',
                bias=biases[stage][number].data(),
            )
            stages[stage]['blocks'].append(facts)
    rest = sum(map(len, texts.values())) + len(json.dumps(stages))
    error, rounded, block_texts = round_blocks(blocks, limit - rest)
    worst = 0.0
    for stage, facts in enumerate(stages):
        for number, block in enumerate(facts['blocks']):
            name = f'block-{stage}-{number}'
            block['factors'] = [head.factors.tolist() for head in rounded[name]]
            attention, x = attentions[name]
            difference = largest_difference(attention, facts['rules'], x, rounded[name], number)
            worst = max(worst, difference)
    facts = dict(stages=stages, largestGroup=largest, error=error, worst=worst)
    return facts, {**texts, **block_texts}


def write_page(
    path: Path, scene, colours: Sequence[np.ndarray], names: Dict[str, str], limit: int
) -> dict:
    """Write one self-contained page.

    Args:
        path: the file.
        scene (Scene): of explain.py.
        colours: (H, W, 3) from 0 to 1, of the features of each stage.
        names: ``model`` and ``image``, as the page calls them.
        limit (int): bytes of the page.

    Returns:
        dict: ``bytes`` of the page, ``error`` of a logit (root mean square) that was aimed at,
        and ``worst``, the largest difference of a weight that was found.

    Raises:
        ValueError: the page cannot be made as small as that.
    """
    import cv2

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
    page, style, script = (
        (HERE / f'page.{kind}').read_text(encoding='utf-8') for kind in ('html', 'css', 'js')
    )
    taken = sum(map(len, (page, style, script, about['jpeg']))) + 20_000
    facts, texts = page_data(scene, colours, limit - taken)
    # In a script element only "</" and "<!--" mean anything, and JSON may write "<" in another way.
    known = json.dumps({**about, **facts}, separators=(',', ':')).replace('<', '\\u003c')
    data = [f'<script type="application/json" id="facts">{known}</script>']
    data += [
        f'<script type="text/plain" id="{name}">{text}</script>' for name, text in texts.items()
    ]
    for mark, text in (
        ('<!-- title -->', html.escape(names['image'])),
        ('/* style */', style),
        ('<!-- data -->', '\n'.join(data)),
        ('/* script */', script),
    ):
        before, after = page.split(mark)
        page = before + text + after
    content = page.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return dict(bytes=len(content), error=facts['error'], worst=facts['worst'])
