"""The page that ``tools/explain.py --html`` writes: page.html, page.css and page.js with the data.

A page computes attention when it is pointed at: all weights of one block at 800 x 1216 would be
60800 x 950 numbers for each head. It gets, of each block, what queries and keys are made of and
the position bias, and takes the softmax itself. What it gets is rounded so that the page stays
small, which is where its weights differ from those of the model. Both ways to round turn the
numbers so that the error of each is as bad for the logits as that of any other, and then round all
to multiples of one step; those that are smaller than the step are left out.

``OfHeads``: queries and keys of each head. The logits of all pairs are a matrix ``q k^T``; along
its i-th singular vectors queries and keys have variance 1, and add their product times ``s_i`` to
a logit. So both are rounded to multiples of ``step / s_i``.

``OfInput``: what queries and keys of all heads are computed from, with the matrices that do so:
half as many numbers, which pays where positions are many and channels few.
"""

import base64
import html
import json
import math
import zlib
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple, Union

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import write_whole
from ..grouping import AxisRule, is_small, stage_rules
from ..position_bias import DynamicPositionBias, NoPositionBias

HERE = Path(__file__).resolve().parent
# Root mean square of the error of a logit, which is the relative one of a weight: less is not worth
# the bytes, more is no use; and where a page is likely to end.
FINEST, COARSEST, USUAL = 0.001, 1.0, 0.01
LARGEST = 32767  # of 16 bits
LEAST = 0.45  # numbers with a deviation of fewer steps cost more than they are worth
LARGEST_GROUP = 40  # to show the bias of: beyond, drawing 79 x 79 points gets slow
CHECKED = 12  # positions of each block whose weights are compared with the model's


class Rounded(NamedTuple):
    """A block's numbers as a page has them.

    Args:
        numbers (ndarray): (axes, positions), whole.
        axes: of each head, or a number if all heads share theirs.
        values (ndarray): what the page computes with them, see page.js.
        logits: of a position with others, in each head, as the page computes them.
    """

    numbers: np.ndarray
    axes: Union[int, List[int]]
    values: np.ndarray
    logits: Callable[[int, np.ndarray], np.ndarray]


def bits_expected(relative: np.ndarray) -> float:
    """Of numbers with these deviations, in steps, if normally distributed; Huffman takes one."""
    relative = relative[relative > LEAST]
    return np.maximum(1, np.log2(math.sqrt(2 * math.pi * math.e) * relative)).sum()


class OfHeads:
    """Queries and keys of each head, in the axes of its logits.

    Args:
        queries, keys (ndarray): (heads, positions, head_dim); queries scaled.
    """

    def __init__(self, queries: np.ndarray, keys: np.ndarray):
        self.heads = [self.axes_of(q, k) for q, k in zip(queries, keys)]

    @staticmethod
    def axes_of(queries: np.ndarray, keys: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """(2, axes, positions) of variance 1, and the strengths of the axes."""
        count = len(queries)
        q, left = np.linalg.qr(queries)
        # The mean of the keys adds the same to all logits of a query.
        k, right = np.linalg.qr(keys - keys.mean(0))
        u, strengths, v = np.linalg.svd(left @ right.T)
        both = np.stack([(q @ u).T, (k @ v.T).T]) * count**0.5
        return both.astype(np.float32), strengths / count

    @staticmethod
    def step(error: float, axes: int) -> float:
        """A step makes an error of step / sqrt(12), and there are two of them on each axis."""
        return error * math.sqrt(6 / axes)

    def expected(self, error: float) -> float:
        """The bytes for a root mean square error of a logit."""
        return sum(
            4 * len(strengths)
            + 2 * both.shape[2] / 8 * bits_expected(strengths / self.step(error, len(strengths)))
            for both, strengths in self.heads
        )

    def rounded(self, error: float) -> Rounded:
        heads, factors = [], []
        for both, strengths in self.heads:
            step = self.step(error, len(strengths))
            kept = strengths > LEAST * step
            both, strengths = both[:, kept], strengths[kept, None]
            largest = np.abs(both).max((0, 2), initial=0)[:, None]
            steps = np.maximum(step / strengths, largest / LARGEST)
            heads.append(np.rint(both / steps).astype(np.int16))
            factors.append((strengths * steps**2)[:, 0])

        def logits(token: int, members: np.ndarray) -> np.ndarray:
            return np.stack(
                [(f * both[0][:, token]) @ both[1][:, members] for f, both in zip(factors, heads)]
            )

        numbers = np.concatenate([both.reshape(-1, both.shape[2]) for both in heads])
        return Rounded(numbers, [len(f) for f in factors], np.concatenate(factors), logits)


class OfInput:
    """What queries and keys are computed from, and how.

    Args:
        x (ndarray): (positions, channels).
        to_queries (tuple): (heads, head_dim, channels) and (heads, head_dim), scaled.
        to_keys (ndarray): (heads, head_dim, channels).
    """

    def __init__(self, x: np.ndarray, to_queries: Tuple[np.ndarray, ...], to_keys: np.ndarray):
        weight, bias = to_queries
        mean = x.mean(0)
        x = x - mean
        self.offset = bias + weight @ mean  # that of keys adds the same to all logits of a query
        covariance = x.T @ x / len(x)
        metric = 0.0  # of an error of x: what it does to the squares of all heads' logits
        for q, offset, k in zip(weight, self.offset, to_keys):
            queries = q @ covariance @ q.T + np.outer(offset, offset)
            metric = metric + k.T @ queries @ k + q.T @ (k @ covariance @ k.T) @ q
        values, vectors = np.linalg.eigh(metric)
        root = np.sqrt(np.maximum(values, 1e-12 * values.max()))
        turn = vectors * root
        variances, axes = np.linalg.eigh(turn.T @ covariance @ turn)
        self.deviations = np.sqrt(np.maximum(variances, 0))
        self.numbers = (axes.T @ (turn.T @ x.T)).astype(np.float32)
        back = vectors / root @ axes
        self.to_queries, self.to_keys = weight @ back, to_keys @ back

    @property
    def step_of_error(self) -> float:
        """Each head gets its part of the error of every axis, which is step / sqrt(12)."""
        heads, _, axes = self.to_keys.shape
        return math.sqrt(12 * heads / axes)

    def expected(self, error: float) -> float:
        """As of OfHeads; the matrices are in float32."""
        relative = self.deviations / (error * self.step_of_error)
        matrices = 8 * self.to_keys[0, :, 0].size * len(self.to_keys) * (relative > LEAST).sum()
        return matrices + self.numbers.shape[1] / 8 * bits_expected(relative)

    def rounded(self, error: float) -> Rounded:
        step = error * self.step_of_error
        kept = self.deviations > LEAST * step
        numbers = self.numbers[kept]
        steps = np.maximum(step, np.abs(numbers).max(1, initial=0) / LARGEST)
        numbers = np.rint(numbers / steps[:, None]).astype(np.int16)
        to_queries, to_keys = (
            (weight[..., kept] * steps).astype(np.float32)
            for weight in (self.to_queries, self.to_keys)
        )
        offset = self.offset.astype(np.float32)
        parts = [part.reshape(-1) for part in (offset, to_queries, to_keys)]

        def logits(token: int, members: np.ndarray) -> np.ndarray:
            queries = offset + to_queries @ numbers[:, token]
            return np.einsum('hd,hda->ha', queries, to_keys) @ numbers[:, members]

        return Rounded(numbers, len(numbers), np.concatenate(parts), logits)


def block_numbers(attention: nn.Module, x: Tensor) -> Union[OfHeads, OfInput]:
    """A block's in the way that takes fewer bytes."""
    channels, heads = x.shape[-1], attention.num_heads
    weight = attention.qkv.weight.detach().double()[: 2 * channels]
    bias = attention.qkv.bias
    bias = torch.zeros(2 * channels) if bias is None else bias.detach()[: 2 * channels]
    (q, k), (q_bias, k_bias) = (
        parameter.double().unflatten(0, (2, heads, -1)).numpy() for parameter in (weight, bias)
    )
    q, q_bias = q * attention.scale, q_bias * attention.scale
    x = x.reshape(-1, channels).double().numpy()
    of_input = OfInput(x, (q, q_bias), k)
    of_heads = OfHeads(x @ q.swapaxes(1, 2) + q_bias[:, None], x @ k.swapaxes(1, 2))
    return of_heads if of_heads.expected(USUAL) <= of_input.expected(USUAL) else of_input


def packed(numbers: np.ndarray) -> str:
    """Whole numbers as base64 of zlib: low bytes of all, then high bytes.

    The sign is in the lowest bit, so that the high bytes are mostly 0.
    """
    numbers = numbers.ravel()
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
    found = {'short': stage_rules(height, width, size, interval, layer.lda)[0]}
    for kind in kinds_of(layer)[1:]:
        found[kind] = stage_rules(height, width, size, interval, kind)[1]
    return found


def members_of(position: int, length: int, rule: AxisRule) -> np.ndarray:
    """Positions of an axis in the group of one of them."""
    place = position + rule.lead
    within = place % (rule.size * rule.interval)
    first = place - within + within % rule.interval - rule.lead
    found = first + rule.interval * np.arange(rule.size)
    return found[(found >= 0) & (found < length)]


@torch.no_grad()
def differences(
    attention: nn.Module,
    rules: Dict[str, Tuple[AxisRule, AxisRule]],
    x: Tensor,
    rounded: Rounded,
    seed: int,
) -> Tuple[float, List[float]]:
    """By how much the page's weights differ from the model's, at some positions.

    Returns:
        the largest difference, and of each position and head the relative difference of weights
        squared, on average by weight.
    """
    random, worst, relative = np.random.default_rng(seed), 0.0, []
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
            shown = rounded.logits(token, members)
            exact, shown = (torch.from_numpy(both + bias).softmax(-1) for both in (logits, shown))
            difference = exact - shown
            worst = max(worst, difference.abs().max().item())
            relative += (difference**2 / exact.clamp(min=1e-30)).sum(-1).tolist()
    return worst, relative


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


def round_blocks(
    blocks: Dict[str, Union[OfHeads, OfInput]], limit: int
) -> Tuple[float, Dict[str, Rounded], Dict[str, str]]:
    """Round all blocks as finely as fits into some bytes.

    Returns:
        the error of a logit, the numbers and their texts.

    Raises:
        ValueError: not even the coarsest fit.
    """
    error, per_byte = FINEST, 4 / 3  # of base64
    while True:
        while sum(block.expected(error) for block in blocks.values()) * per_byte > limit:
            error *= 1.05
            if error > COARSEST:
                raise ValueError('the page takes more, however coarsely its values are rounded.')
        rounded = {name: block.rounded(error) for name, block in blocks.items()}
        texts = {}
        for name, block in rounded.items():
            texts[name], texts[f'values-{name}'] = packed(block.numbers), floats([block.values])
        taken = sum(map(len, texts.values()))
        if taken <= limit:
            return error, rounded, texts
        per_byte *= 1.01 * taken / limit  # these numbers are not normally distributed


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
            blocks[name] = block_numbers(*attentions[name])
            facts = dict(
                heads=block.attn.num_heads,
                kind='long' if number % 2 else 'short',
                bias=biases[stage][number].data(),
            )
            stages[stage]['blocks'].append(facts)
    rest = sum(map(len, texts.values())) + len(json.dumps(stages))
    error, rounded, block_texts = round_blocks(blocks, limit - rest)
    worst, relative = 0.0, []
    for stage, facts in enumerate(stages):
        for number, block in enumerate(facts['blocks']):
            name = f'block-{stage}-{number}'
            block['axes'] = rounded[name].axes
            attention, x = attentions[name]
            found = differences(attention, facts['rules'], x, rounded[name], number)
            worst = max(worst, found[0])
            relative += found[1]
    usual = float(np.mean(relative)) ** 0.5
    facts = dict(stages=stages, largestGroup=largest, error=error, usual=usual, worst=worst)
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
        and of the differences of weights that were found, ``usual``, the root mean square of the
        relative one, and ``worst``, the largest.

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
    parts = []
    for mark, text in (
        ('<!-- title -->', html.escape(names['image'])),
        ('/* style */', style),
        ('<!-- data -->', '\n'.join(data)),
        ('/* script */', script),
    ):
        before, page = page.split(mark)  # what was put in is not looked at again
        parts += [before, text]
    content = ''.join([*parts, page]).encode()
    write_whole(path, content)
    return dict(bytes=len(content), **{name: facts[name] for name in ('error', 'usual', 'worst')})
