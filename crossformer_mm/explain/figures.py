"""Draw the pictures of a scene with Matplotlib."""

import io
from itertools import cycle
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Sequence, Tuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch import Tensor, nn

from ..grouping import Rules, group_map, is_small
from .capture import (
    BlockCapture,
    Scene,
    attention_map,
    embedding_convs,
    group_rules,
    principal_colours,
)

HIGHLIGHT = ((0.98, 0.75, 0.18), (0.20, 0.60, 0.86), (0.91, 0.30, 0.24), (0.18, 0.72, 0.47))
KERNEL_COLOURS = ('#1b4965', '#2a9d8f', '#e9c46a', '#e76f51', '#9b5de5', '#8d99ae')
DARK_COLOURS = ('#1b4965', '#9b5de5')


def group_numbers(height: int, width: int, rules: Rules) -> np.ndarray:
    """Return (H, W) the number of each position's group."""
    numbers, first = np.empty(height * width, int), 0
    for table in group_map(height, width, *rules):
        numbers[table.numpy()] = np.arange(first, first + len(table))[:, None, None]
        first += len(table)
    return numbers.reshape(height, width)


def group_colours(height: int, width: int, rules: Rules, query: Tuple[int, int]) -> np.ndarray:
    """Return (H, W, 4): the query's group in one colour, up to three neighbour groups in others."""
    numbers = group_numbers(height, width, rules)
    row, column = query
    pairs = []
    for at, line in ((row, numbers[:, column]), (column, numbers[row])):
        others = np.flatnonzero(line != line[at])
        pairs.append((at, others[np.abs(others - at).argmin()] if len(others) else at))
    chosen = [numbers[row, column] for row in pairs[0] for column in pairs[1]]
    colours = np.zeros((height, width, 4))
    for number, colour in reversed(list(zip(chosen, HIGHLIGHT))):
        colours[numbers == number] = (*colour, 0.8)
    return colours


def kernel_shares(convs: nn.Module, embedding: Tensor) -> Dict[int, Tuple[float, float]]:
    """Return each kernel size's share of the channels and of the embedding's variance over the map.

    Args:
        convs (CrossScaleConvs): parallel convolutions, their outputs concatenated.
        embedding (Tensor): (H, W, C) their output for an image.
    """
    channels = [conv.out_channels for conv in convs]
    parts = embedding.flatten(0, 1).split(channels, dim=1)
    variances = torch.stack([part.var(0, correction=0).sum() for part in parts])
    shares = (variances / variances.sum().clamp(min=1e-12)).tolist()
    return {
        conv.kernel_size[0]: (count / sum(channels), share)
        for conv, count, share in zip(convs, channels, shares)
    }


def show(axes, scene: Scene, stage: int, cells: np.ndarray, faded: bool = False, **options) -> None:
    """Draw the positions of a stage's map over the image."""
    height, width = scene.picture.shape[:2]
    if faded:
        grey = scene.picture.mean(-1, keepdims=True).repeat(3, -1)
        axes.imshow(0.35 + 0.45 * grey, extent=(0, width, height, 0))
    stride = scene.stride(stage)
    axes.imshow(
        cells,
        extent=(0, cells.shape[1] * stride, cells.shape[0] * stride, 0),
        interpolation='nearest',
        **options,
    )
    axes.set(xlim=(0, width), ylim=(height, 0))


def hide_frame(axes) -> None:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def write_centred(axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha='center', va='center', fontsize=9, transform=axes.transAxes)


def mark_query(axes, scene: Scene, stage: int) -> None:
    """Outline the query."""
    row, column = scene.query(stage)
    stride = scene.stride(stage)
    for colour, line in (('black', 1.6), ('white', 0.8)):
        axes.add_patch(outline((column * stride, row * stride), stride, stride, colour, line))


def outline(corner: Tuple[float, float], width: float, height: float, colour: str, line: float):
    return Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=line)


def grid(figure, rows: Sequence[str], columns: Sequence[str], title: str, shape=(1, 1)):
    """Add axes for pictures of a shape, with row names at the left and column names above."""
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    figure.suptitle(title, fontsize=12, fontweight='bold')
    for panel in axes.flat:
        hide_frame(panel)
        panel.set_box_aspect(shape[0] / shape[1])
    for panel, name in zip(axes[0], columns):
        panel.set_title(name, fontsize=9)
    for panel, name in zip(axes[:, 0], rows):
        panel.set_ylabel(name, fontsize=9)
    return axes


def stage_names(scene: Scene) -> List[str]:
    return [
        f'stage {stage + 1}\n{feature.shape[1]} x {feature.shape[2]} positions'
        for stage, feature in enumerate(scene.captured.features)
    ]


def draw_groups(figure, scene: Scene) -> None:
    """Draw the query's group and groups next to it, of each kind."""
    rules_by_stage = [
        group_rules(layer, *feature.shape[1:])
        for layer, feature in zip(scene.backbone.layers, scene.captured.features)
    ]
    axes = grid(
        figure,
        ['short distance', *(f"long distance,\n'{kind}'" for kind in list(rules_by_stage[0])[1:])],
        stage_names(scene),
        'Who attends to whom: four groups, one colour each',
        scene.picture.shape,
    )
    for stage, layer in enumerate(scene.backbone.layers):
        _, height, width = scene.captured.features[stage].shape
        stride = scene.stride(stage)
        for panel, rules in zip(axes[:, stage], rules_by_stage[stage].values()):
            colours = group_colours(height, width, rules, scene.query(stage))
            show(panel, scene, stage, colours, faded=True)
            for side, rule, line in zip((height, width), rules, (panel.axhline, panel.axvline)):
                for edge in range(-rule.lead, side, rule.size * rule.interval):
                    line(edge * stride, color='white', linewidth=0.6)
            mark_query(panel, scene, stage)
            rows, columns = (
                min(rule.size, -(-side // rule.interval))
                for rule, side in zip(rules, (height, width))
            )
            apart = '' if rules[0].interval == 1 else f', every {ordinal(rules[0].interval)}'
            panel.set_xlabel(f'{rows} x {columns}{apart}', fontsize=8)
        if is_small(height, width, layer.group_size):
            for panel in axes[1:, stage]:
                panel.set_xlabel('small map: short distance', fontsize=8)


def ordinal(number: int) -> str:
    return f'{number}{ {2: "nd", 3: "rd"}.get(number, "th") }'


def draw_attention(figure, scene: Scene) -> None:
    """Draw the query's attention weights."""
    heads = 'mean of all heads' if scene.head is None else f'head {scene.head}'
    axes = grid(
        figure,
        ['short distance', f"long distance,\n'{scene.backbone.layers[0].lda}'"],
        stage_names(scene),
        f'Attention weights of the framed query ({heads}; black: 0)',
        scene.picture.shape,
    )
    for stage, layer in enumerate(scene.backbone.layers):
        for panel, captured in zip(
            axes[:, stage], (scene.captured.short[stage], scene.captured.long[stage])
        ):
            attention = layer.blocks[0 if captured is None else captured.block].attn
            if captured is None or scene.head is not None and scene.head >= attention.num_heads:
                write_centred(panel, 'no such block' if captured is None else 'no such head')
                continue
            weights = attention_map(captured, attention, scene.query(stage), scene.head)
            show(panel, scene, stage, weights, faded=True, cmap='magma', vmin=0, alpha=0.85)
            mark_query(panel, scene, stage)
            panel.set_xlabel(
                f'block {captured.block + 1}: up to {np.nanmax(weights):.0%}', fontsize=8
            )


def draw_features(figure, scene: Scene) -> None:
    """Draw the four features, their first three principal components as RGB."""
    axes = grid(
        figure,
        [''],
        ['image', *stage_names(scene)],
        'Features: the first three principal components of their channels as RGB',
        scene.picture.shape,
    )
    axes[0, 0].imshow(scene.picture)
    for stage, feature in enumerate(scene.captured.features):
        panel = axes[0, stage + 1]
        show(panel, scene, stage, principal_colours(feature))
        panel.set_xlabel(f'{len(feature)} channels', fontsize=8)


def shown_block(scene: Scene, stage: int) -> BlockCapture:
    """Return the block whose position bias is drawn: a long-distance one if there is one."""
    return scene.captured.long[stage] or scene.captured.short[stage]


@torch.no_grad()
def bias_table(scene: Scene, stage: int, size: int) -> np.ndarray:
    """Return (heads, 2*size-1, 2*size-1), the bias in groups of size x size members."""
    block = scene.backbone.layers[stage].blocks[shown_block(scene, stage).block]
    return block.attn.pos(size, size).numpy()


def draw_bias(figure, scene: Scene) -> None:
    """Draw the bias of each offset, for the head of each stage in which it varies most."""
    layers = scene.backbone.layers
    axes = grid(
        figure,
        [''],
        [f'stage {stage + 1}' for stage in range(len(layers))],
        'Position bias: factor on the weight by offset of the key (purple: less, orange: more)',
    )
    for stage, layer in enumerate(layers):
        panel, size = axes[0, stage], layer.group_size
        table = bias_table(scene, stage, 2 * size)
        head = int(np.ptp(table, axis=(1, 2)).argmax())
        # Offsets are query minus key: turned round, keys to the right are drawn at the right.
        shown = table[head, ::-1, ::-1] - table[head].mean()
        reach = 2 * size - 0.5
        limit = max(np.abs(shown).max(), 0.05)  # colours of 5 % at least
        panel.imshow(
            shown, cmap='PuOr_r', vmin=-limit, vmax=limit, extent=(-reach, reach, reach, -reach)
        )
        panel.add_patch(outline((0.5 - size, 0.5 - size), 2 * size - 1, 2 * size - 1, 'black', 1.2))
        panel.plot(0, 0, '+', color='black', markersize=7)
        low, high = np.exp(shown.min()), np.exp(shown.max())
        panel.set_xlabel(
            f'block {shown_block(scene, stage).block + 1}, head {head}: {low:.2f} to {high:.2f}',
            fontsize=8,
        )


def draw_embedding(figure, scene: Scene) -> None:
    """Draw the share of each kernel in the embeddings."""
    convs = embedding_convs(scene.backbone)
    shares = [kernel_shares(*pair) for pair in zip(convs, scene.captured.embeddings)]
    maps, bars = figure.subfigures(1, 2)
    figure.suptitle(
        'Cross-scale embedding: the share of each kernel', fontsize=12, fontweight='bold'
    )

    parts = scene.captured.embeddings[0].split([conv.out_channels for conv in convs[0]], dim=-1)
    columns = -(-len(parts) // 2)
    panels = maps.subplots(-(-len(parts) // columns), columns, squeeze=False).ravel()
    for panel in panels:
        hide_frame(panel)
    for panel, part, kernel in zip(panels, parts, shares[0]):
        strength = (part - part.mean((0, 1))).norm(dim=-1).numpy()
        show(panel, scene, 0, strength, cmap='magma')
        panel.set_title(f'stage 1, kernel {kernel} x {kernel}', fontsize=9)

    axes = bars.subplots()
    kernels = sorted({kernel for share in shares for kernel in share})
    colours = dict(zip(kernels, cycle(KERNEL_COLOURS)))
    heights: Dict[str, float] = {}
    for stage, share in enumerate(shares):
        for index, name in enumerate(('channels', 'variance')):
            left, y = 0.0, (0.2, -0.2)[index] - stage * 1.1
            heights[f'stage {stage + 1}: {name}'] = y
            for kernel, values in share.items():
                colour, width = colours[kernel], values[index]
                bar = axes.barh(y, width, 0.36, left=left, color=colour, alpha=(0.45, 1)[index])
                if width > 0.06:
                    ink = 'white' if index == 1 and colour in DARK_COLOURS else 'black'
                    text = [f'{width:.0%}']
                    axes.bar_label(bar, text, label_type='center', fontsize=7, color=ink)
                left += width
    hide_frame(axes)
    axes.set_yticks([*heights.values()], [*heights], fontsize=8)
    axes.set(xlim=(0, 1))
    axes.legend(
        [Patch(color=colour) for colour in colours.values()],
        [f'{kernel} x {kernel}' for kernel in kernels],
        fontsize=8,
        ncols=len(kernels),
        loc='upper center',
        bbox_to_anchor=(0.4, 0.02),
        frameon=False,
        handlelength=1,
        columnspacing=1,
    )


# Name, function, width, height of titles and fixed parts, height of square images; in inches.
PICTURES = (
    ('groups', draw_groups, 9, 1.2, 5.8),
    ('attention', draw_attention, 9, 1, 4),
    ('features', draw_features, 11, 0.95, 2.15),
    ('position_bias', draw_bias, 11, 3.3, 0),
    ('embedding', draw_embedding, 10, 3.8, 0),
)


def draw_contact_sheet(figure, scene: Scene) -> None:
    figure.suptitle('CrossFormer on one image', fontsize=18, fontweight='bold')
    left, right = figure.subfigures(1, 2, wspace=0.02)
    for part, heights in (
        (left, {draw_groups: 3, draw_attention: 2.05}),
        (right, {draw_features: 1.45, draw_bias: 1.6, draw_embedding: 2}),
    ):
        rows = part.subfigures(len(heights), 1, height_ratios=[*heights.values()], hspace=0.03)
        for inner, draw in zip(rows, heights):
            draw(inner, scene)


def save(draw: Callable, scene: Scene, width: float, height: float, path: Path) -> None:
    """Draw and write a PNG of at most 256 colours, a fifth of the bytes."""
    figure = Figure(figsize=(width, height), layout='constrained')
    draw(figure, scene)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    image = Image.open(buffer).convert('RGB').quantize(256, dither=Image.Dither.NONE)
    image.save(path, optimize=True)


def write_pictures(scene: Scene, out: Path) -> Iterator[Path]:
    """Write all pictures to a folder, which is made, and yield the path of each."""
    height, width = scene.picture.shape[:2]
    shape = min(max(height / width, 0.5), 1.5)
    out.mkdir(parents=True, exist_ok=True)
    for name, draw, wide, fixed, high in (
        *PICTURES,
        ('contact_sheet', draw_contact_sheet, 16, 10.5, 0),
    ):
        save(draw, scene, wide, fixed + high * shape, out / f'{name}.png')
        yield out / f'{name}.png'
