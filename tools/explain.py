"""Pictures of what a CrossFormer does with an image.

    python tools/explain.py configs/mask_rcnn/cf_s_1x.py mask-rcnn-cf-s-coco-1x.pth photo.jpg \\
        --out pictures

writes
    groups.png                which positions attend to each other, in each stage
    attention.png             where one position attends, at short and at long distance
    features.png              the four features
    position_bias.png         the learnt bias of each offset between query and key, by head
    position_bias_sizes.png   the same as a surface, for groups of several sizes
    embedding.png             which kernel of the cross-scale embedding carries how much
    contact_sheet.png         all of these
Those that are there already are replaced.

    python tools/explain.py configs/mask_rcnn/cf_s_1x.py mask-rcnn-cf-s-coco-1x.pth photo.jpg \\
        --html photo.html

writes one page that a browser opens by itself: point at a position to see where it attends.
"""

import argparse
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from einops import rearrange
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope
from torch import Tensor, nn

from crossformer_mm.checkpoint import load_backbone
from crossformer_mm.compat import is_cut_short
from crossformer_mm.engine.command_line import (
    DENSE,
    check_file,
    check_writable,
    fail,
    innermost,
    kind_of,
    load_config,
    run,
)
from crossformer_mm.engine.option_checks import add_cfg_options
from crossformer_mm.engine.pictures import as_picture
from crossformer_mm.explain_page import write_page
from crossformer_mm.grouping import AxisRule, group_map, is_small, stage_rules
from crossformer_mm.position_bias import bias_of_pairs

HIGHLIGHT = ((0.98, 0.75, 0.18), (0.20, 0.60, 0.86), (0.91, 0.30, 0.24), (0.18, 0.72, 0.47))
KERNELS = ('#1b4965', '#2a9d8f', '#e9c46a', '#e76f51', '#9b5de5', '#8d99ae')
HEADS_SHOWN = 3
MEGABYTES = 15  # of a page, if not said


class Attended(NamedTuple):
    """One block's attention on the image.

    Args:
        block (int): its index in the stage.
        x, out (Tensor): (1, H, W, C) what attention took and returned.
        rows, columns (AxisRule): the groups.
    """

    block: int
    x: Tensor
    rows: AxisRule
    columns: AxisRule
    out: Tensor


class Seen(NamedTuple):
    """What a backbone did with an image.

    Args:
        features: (C, H, W) of each stage, as the next one gets them.
        blocks: of each stage, what its blocks did.
        embeddings: (H, W, C) of each cross-scale embedding, without its norm.
    """

    features: List[Tensor]
    blocks: List[List[Attended]]
    embeddings: List[Tensor]

    @property
    def short(self) -> List[Attended]:
        """The last block of each stage at short distance."""
        return [blocks[(len(blocks) - 1) // 2 * 2] for blocks in self.blocks]

    @property
    def long(self) -> List[Optional[Attended]]:
        """The last block of each stage at long distance; None where there is none."""
        return [
            blocks[len(blocks) // 2 * 2 - 1] if len(blocks) > 1 else None for blocks in self.blocks
        ]


@torch.no_grad()
def look(backbone: nn.Module, image: Tensor) -> Seen:
    """Run a backbone on an image (1, 3, H, W) and keep what the pictures are made of."""
    features, embeddings, handles = [], [], []
    attended: List[List[Attended]] = [[] for _ in backbone.layers]

    def keep_attention(stage: int):
        def hook(module, inputs, out):
            attended[stage].append(Attended(len(attended[stage]), *inputs, out))

        return hook

    for stage, layer in enumerate(backbone.layers):
        handles.append(
            layer.register_forward_hook(
                lambda module, inputs, out: features.append(out[0].permute(2, 0, 1))
            )
        )
        for block in layer.blocks:
            handles.append(block.attn.register_forward_hook(keep_attention(stage)))
    for convs in embedding_convs(backbone):
        handles.append(
            convs.register_forward_hook(lambda module, inputs, out: embeddings.append(out[0]))
        )
    try:
        backbone(image)
    finally:
        for handle in handles:
            handle.remove()
    return Seen(features, attended, embeddings)


def embedding_convs(backbone: nn.Module) -> List[nn.Module]:
    """The convolutions of the first embedding and of each merging."""
    merging = [layer.downsample for layer in backbone.layers if layer.downsample is not None]
    return [backbone.patch_embed.projs, *(m.reductions for m in merging)]


class Weights(NamedTuple):
    """Attention inside one group.

    Args:
        members (Tensor): (N,) tokens, row * W + column.
        query (int): which of the members is the chosen position.
        weights (Tensor): (heads, N, N), queries before keys.
        values (Tensor): (heads, N, d).
    """

    members: Tensor
    query: int
    weights: Tensor
    values: Tensor


@torch.no_grad()
def attention_weights(attention: nn.Module, attended: Attended, token: int) -> Weights:
    """The attention weights of a token's group, which fast paths never store.

    Args:
        attention (GroupAttention): the block's.
        attended (Attended): what it took.
        token (int): row * W + column of a position.
    """
    x, rows, columns = attended.x, attended.rows, attended.columns
    for table in group_map(*x.shape[1:3], rows, columns):
        at = (table == token).nonzero()
        if len(at):
            group, row, column = at[0].tolist()
            break
    height, width = table.shape[1:]
    members = table[group].flatten()
    q, k, v = rearrange(
        attention.qkv(x.flatten(0, 2)[members]),
        'n (three h d) -> three h n d',
        three=3,
        h=attention.num_heads,
    )
    bias = bias_of_pairs(attention.pos(rows.size, columns.size), height, width)
    return Weights(
        members, row * width + column, (q @ k.mT * attention.scale + bias).softmax(-1), v
    )


def attention_map(
    attended: Attended, attention: nn.Module, position: Tuple[int, int], head: Optional[int]
) -> np.ndarray:
    """(H, W) how much a position (row, column) attends to each other; NaN outside its group."""
    _, height, width, _ = attended.x.shape
    found = attention_weights(attention, attended, position[0] * width + position[1])
    row = found.weights[:, found.query]
    shown = np.full(height * width, np.nan)
    shown[found.members] = row.mean(0) if head is None else row[head]
    return shown.reshape(height, width)


def group_numbers(height: int, width: int, rules: Tuple[AxisRule, AxisRule]) -> np.ndarray:
    """(H, W) the number of each position's group."""
    numbers, first = np.empty(height * width, int), 0
    for table in group_map(height, width, *rules):
        numbers[table.numpy()] = np.arange(first, first + len(table))[:, None, None]
        first += len(table)
    return numbers.reshape(height, width)


def group_colours(
    height: int, width: int, rules: Tuple[AxisRule, AxisRule], position: Tuple[int, int]
) -> np.ndarray:
    """(H, W, 4) the group of a position in one colour, up to three groups beside it in others."""
    numbers = group_numbers(height, width, rules)
    row, column = position
    beside = []
    for place, line in ((row, numbers[:, column]), (column, numbers[row])):
        others = np.flatnonzero(line != line[place])
        nearest = others[np.abs(others - place).argmin()] if len(others) else place
        beside.append((place, nearest))
    chosen = [numbers[row, column] for row in beside[0] for column in beside[1]]
    colours = np.zeros((height, width, 4))
    for number, colour in reversed(list(zip(chosen, HIGHLIGHT))):
        colours[numbers == number] = (*colour, 0.8)
    return colours


def principal_colours(feature: Tensor) -> np.ndarray:
    """(C, H, W) to (H, W, 3): the three directions of largest variance as red, green and blue."""
    points = feature.flatten(1).T
    points = points - points.mean(0)
    _, _, directions = torch.linalg.svd(points, full_matrices=False)
    directions = directions[:3]
    largest = directions.abs().argmax(1, keepdim=True)  # signs are arbitrary: fix them
    shown = points @ (directions * directions.gather(1, largest).sign()).T
    low, high = (torch.quantile(shown, q, dim=0) for q in (0.01, 0.99))
    shown = ((shown - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).numpy()
    shown = np.pad(shown, ((0, 0), (0, 3 - shown.shape[1])))  # of a map of one or two positions
    return shown.reshape(*feature.shape[1:], 3)


def kernel_shares(convs: nn.Module, embedding: Tensor) -> Dict[int, Tuple[float, float]]:
    """Of each kernel size: its share of the channels, and of the embedding's variance over the map.

    Args:
        convs (CrossScaleConvs): side by side, their outputs joined on channels.
        embedding (Tensor): (H, W, C) what they made of an image.
    """
    channels = [conv.out_channels for conv in convs]
    parts = embedding.flatten(0, 1).split(channels, dim=1)
    variances = torch.stack([part.var(0, correction=0).sum() for part in parts])
    shares = (variances / variances.sum().clamp(min=1e-12)).tolist()
    return {
        conv.kernel_size[0]: (count / sum(channels), share)
        for conv, count, share in zip(convs, channels, shares)
    }


class Scene(NamedTuple):
    """What all pictures share.

    Args:
        backbone: the model's.
        picture: (H, W, 3) the image as the backbone sees it, RGB from 0 to 1.
        seen: what the backbone did with it.
        position: x, y in pixels of the picture.
        head: the head to show attention of; None: their mean.
    """

    backbone: nn.Module
    picture: np.ndarray
    seen: Seen
    position: Tuple[int, int]
    head: Optional[int]

    def place(self, stage: int) -> Tuple[int, int]:
        """Row and column of the position in a stage's map."""
        _, height, width = self.seen.features[stage].shape
        stride = self.stride(stage)
        return (
            min(self.position[1] // stride, height - 1),
            min(self.position[0] // stride, width - 1),
        )

    def stride(self, stage: int) -> int:
        return int(np.prod([convs.stride for convs in embedding_convs(self.backbone)[: stage + 1]]))


def show(axes, scene: Scene, stage: int, cells: np.ndarray, faded: bool = False, **options) -> None:
    """Draw the cells of a stage's map where they lie in the image, with the image below."""
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


def bare(axes) -> None:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def say(axes, sentence: str) -> None:
    axes.text(0.5, 0.5, sentence, ha='center', va='center', fontsize=9, transform=axes.transAxes)


def mark(axes, scene: Scene, stage: int) -> None:
    """Outline the chosen position."""
    row, column = scene.place(stage)
    stride = scene.stride(stage)
    axes.add_patch(rectangle((column * stride, row * stride), stride, stride, 'black', 1.6))
    axes.add_patch(rectangle((column * stride, row * stride), stride, stride, 'white', 0.8))


def rectangle(corner, width: float, height: float, colour: str, line: float):
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=line)


def grid(figure, rows: Sequence[str], columns: Sequence[str], title: str, shape=(1, 1)):
    """Axes for pictures of a shape, with names of rows at the left and of columns above."""
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    figure.suptitle(title, fontsize=12, fontweight='bold')
    for panel in axes.flat:
        bare(panel)
        panel.set_box_aspect(shape[0] / shape[1])
    for panel, name in zip(axes[0], columns):
        panel.set_title(name, fontsize=9)
    for panel, name in zip(axes[:, 0], rows):
        panel.set_ylabel(name, fontsize=9)
    return axes


def stage_names(scene: Scene) -> List[str]:
    return [
        f'stage {stage + 1}\n{feature.shape[1]} x {feature.shape[2]} positions'
        for stage, feature in enumerate(scene.seen.features)
    ]


def draw_groups(figure, scene: Scene) -> None:
    """The groups of the chosen position and of positions beside it, by each rule."""
    kinds = ['interval', 'block']
    if scene.backbone.layers[0].lda == 'shifted':
        kinds.append('shifted')
    axes = grid(
        figure,
        ['short distance', *(f"long distance,\n'{kind}'" for kind in kinds)],
        stage_names(scene),
        'Who attends to whom: four groups, one colour each',
        scene.picture.shape,
    )
    for stage, layer in enumerate(scene.backbone.layers):
        _, height, width = scene.seen.features[stage].shape
        size, interval, stride = layer.group_size, layer.interval, scene.stride(stage)
        all_rules = [stage_rules(height, width, size, interval, layer.lda)[0]]
        all_rules += [stage_rules(height, width, size, interval, kind)[1] for kind in kinds]
        for panel, rules in zip(axes[:, stage], all_rules):
            colours = group_colours(height, width, rules, scene.place(stage))
            show(panel, scene, stage, colours, faded=True)
            for side, rule, line in zip((height, width), rules, (panel.axhline, panel.axvline)):
                for edge in range(-rule.lead, side, rule.size * rule.interval):
                    line(edge * stride, color='white', linewidth=0.6)
            mark(panel, scene, stage)
            rows, columns = (
                min(rule.size, -(-side // rule.interval))
                for rule, side in zip(rules, (height, width))
            )
            apart = '' if rules[0].interval == 1 else f', every {ordinal(rules[0].interval)}'
            panel.set_xlabel(f'{rows} x {columns}{apart}', fontsize=8)
        if is_small(height, width, size):
            for panel in axes[1:, stage]:
                panel.set_xlabel('small map: short distance', fontsize=8)


def ordinal(number: int) -> str:
    return f'{number}{ {2: "nd", 3: "rd"}.get(number, "th") }'


def draw_attention(figure, scene: Scene) -> None:
    """Where the chosen position attends."""
    heads = 'mean of all heads' if scene.head is None else f'head {scene.head}'
    axes = grid(
        figure,
        ['short distance', f"long distance,\n'{scene.backbone.layers[0].lda}'"],
        stage_names(scene),
        f'Where the framed position attends ({heads}; black: no weight)',
        scene.picture.shape,
    )
    for stage, layer in enumerate(scene.backbone.layers):
        for panel, attended in zip(
            axes[:, stage], (scene.seen.short[stage], scene.seen.long[stage])
        ):
            attention = layer.blocks[0 if attended is None else attended.block].attn
            if attended is None or scene.head is not None and scene.head >= attention.num_heads:
                say(panel, 'no such block' if attended is None else 'no such head')
                continue
            weights = attention_map(attended, attention, scene.place(stage), scene.head)
            show(panel, scene, stage, weights, faded=True, cmap='magma', vmin=0, alpha=0.85)
            mark(panel, scene, stage)
            panel.set_xlabel(
                f'block {attended.block + 1}: up to {np.nanmax(weights):.0%}', fontsize=8
            )


def draw_features(figure, scene: Scene) -> None:
    """The four features, their main directions as colours."""
    axes = grid(
        figure,
        [''],
        ['image', *stage_names(scene)],
        'Features: the three main directions of their channels as red, green, blue',
        scene.picture.shape,
    )
    axes[0, 0].imshow(scene.picture)
    for stage, feature in enumerate(scene.seen.features):
        panel = axes[0, stage + 1]
        show(panel, scene, stage, principal_colours(feature))
        panel.set_xlabel(f'{len(feature)} channels', fontsize=8)


def shown_block(scene: Scene, stage: int) -> Attended:
    """The block whose position bias is shown: at long distance where there is one."""
    return scene.seen.long[stage] or scene.seen.short[stage]


@torch.no_grad()
def bias_table(scene: Scene, stage: int, size: int) -> np.ndarray:
    """(heads, 2*size-1, 2*size-1) the bias in groups of size x size members."""
    block = scene.backbone.layers[stage].blocks[shown_block(scene, stage).block]
    return block.attn.pos(size, size).numpy()


def draw_bias(figure, scene: Scene) -> None:
    """The bias of each offset, for some heads of a block of each stage."""
    layers = scene.backbone.layers
    names = [
        f'stage {stage + 1}, block {shown_block(scene, stage).block + 1}'
        for stage in range(len(layers))
    ]
    axes = grid(
        figure,
        [f'head {head}' for head in range(HEADS_SHOWN)],
        names,
        'Position bias by offset: groups of the framed size, and twice as large',
    )
    for stage, layer in enumerate(layers):
        size = layer.group_size
        table = bias_table(scene, stage, 2 * size)
        for head, panel in enumerate(axes[:, stage]):
            if head >= len(table):
                say(panel, 'no such head')
                continue
            reach = 2 * size - 0.5
            low, high = table[head].min(), table[head].max()
            # A difference of 0.01 changes a weight by a hundredth: no colours for less.
            panel.imshow(
                table[head],
                cmap='viridis',
                vmin=low,
                vmax=max(high, low + 0.01),
                extent=(-reach, reach, reach, -reach),
            )
            panel.add_patch(
                rectangle((0.5 - size, 0.5 - size), 2 * size - 1, 2 * size - 1, 'white', 1.2)
            )
            low, high = (round(float(value), 2) + 0.0 for value in (low, high))  # no -0.00
            panel.set_xlabel(f'{low:.2f} to {high:.2f}', fontsize=8)


def draw_bias_surfaces(figure, scene: Scene) -> None:
    """The bias as surfaces: one head, at the config's group size and at larger ones."""
    stage = max(
        (stage for stage in range(len(scene.seen.long)) if scene.seen.long[stage]),
        key=lambda stage: len(scene.backbone.layers[stage].blocks),
        default=0,
    )
    layer = scene.backbone.layers[stage]
    sizes = [layer.group_size * factor for factor in (1, 2, 4)]
    head = scene.head or 0
    tables = [bias_table(scene, stage, size) for size in sizes]
    head = min(head, len(tables[0]) - 1)
    figure.suptitle(
        f'The same bias for groups of three sizes (stage {stage + 1}, head {head})',
        fontsize=12,
        fontweight='bold',
    )
    low, high = tables[-1][head].min(), tables[-1][head].max()
    axes = figure.subplots(1, 3, subplot_kw=dict(projection='3d'))
    for panel, size, table in zip(axes, sizes, tables):
        offsets = np.arange(1 - size, size)
        panel.plot_surface(
            *np.meshgrid(offsets, offsets),
            table[head],
            cmap='viridis',
            vmin=low,
            vmax=high,
            rstride=1,
            cstride=1,
            linewidth=0,
        )
        if low < high:
            panel.set_zlim(low, high)
        panel.set_title(
            f'{size} x {size}' + ' members (as configured)' * (size == sizes[0]), fontsize=9
        )
        panel.set_xlabel('columns', fontsize=8, labelpad=-6)
        panel.set_ylabel('rows', fontsize=8, labelpad=-6)
        panel.tick_params(labelsize=6, pad=-3)
        panel.tick_params('z', pad=1)
        panel.locator_params('z', nbins=4)


def draw_embedding(figure, scene: Scene) -> None:
    """What each kernel of the embeddings carries."""
    convs = embedding_convs(scene.backbone)
    shares = [kernel_shares(*pair) for pair in zip(convs, scene.seen.embeddings)]
    maps, bars = figure.subfigures(1, 2, width_ratios=(1, 1))
    figure.suptitle(
        'Cross-scale embedding: what each kernel carries', fontsize=12, fontweight='bold'
    )

    parts = scene.seen.embeddings[0].split([conv.out_channels for conv in convs[0]], dim=-1)
    columns = -(-len(parts) // 2)
    panels = maps.subplots(-(-len(parts) // columns), columns, squeeze=False).ravel()
    for panel in panels:
        bare(panel)
    for panel, part, kernel in zip(panels, parts, shares[0]):
        strength = (part - part.mean((0, 1))).norm(dim=-1).numpy()
        show(panel, scene, 0, strength, cmap='magma')
        panel.set_title(f'stage 1, kernel {kernel} x {kernel}', fontsize=9)

    axes = bars.subplots()
    kernels = sorted({kernel for share in shares for kernel in share})
    for stage, share in enumerate(shares):
        for place, _name, index in ((0.2, 'channels', 0), (-0.2, 'variance', 1)):
            left = 0
            for kernel, values in share.items():
                colour = KERNELS[kernels.index(kernel) % len(KERNELS)]
                axes.barh(
                    place - stage * 1.1,
                    values[index],
                    0.36,
                    left=left,
                    color=colour,
                    alpha=0.45 if index == 0 else 1,
                )
                if values[index] > 0.06:
                    dark = index == 1 and KERNELS.index(colour) in (0, 4)
                    axes.text(
                        left + values[index] / 2,
                        place - stage * 1.1,
                        f'{values[index]:.0%}',
                        ha='center',
                        va='center',
                        fontsize=7,
                        color='white' if dark else 'black',
                    )
                left += values[index]
    axes.set_yticks(
        [place - stage * 1.1 for stage in range(len(shares)) for place in (0.2, -0.2)],
        [
            f'stage {stage + 1}: {name}'
            for stage in range(len(shares))
            for name in ('channels', 'variance')
        ],
        fontsize=8,
    )
    axes.set(xlim=(0, 1), xticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    handles = [rectangle_patch(KERNELS[i % len(KERNELS)]) for i in range(len(kernels))]
    axes.legend(
        handles,
        [f'{kernel} x {kernel}' for kernel in kernels],
        fontsize=8,
        ncols=len(kernels),
        loc='upper center',
        bbox_to_anchor=(0.4, 0.02),
        frameon=False,
        handlelength=1,
        columnspacing=1,
    )


def rectangle_patch(colour: str):
    from matplotlib.patches import Patch

    return Patch(color=colour)


# Name, what draws it, width and height in inches for a square image.
PICTURES = (
    ('groups', draw_groups, 9, 7),
    ('attention', draw_attention, 9, 5),
    ('features', draw_features, 11, 2.8),
    ('position_bias', draw_bias, 9, 7),
    ('position_bias_sizes', draw_bias_surfaces, 9, 3.4),
    ('embedding', draw_embedding, 10, 3.8),
)


def draw_contact_sheet(figure, scene: Scene) -> None:
    figure.suptitle('CrossFormer on one image', fontsize=18, fontweight='bold')
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1), wspace=0.02)
    for part, (heights, drawn) in zip(
        (left, right),
        (
            ((3, 2.05, 1.3), (draw_groups, draw_attention, draw_features)),
            ((3, 1.6, 1.75), (draw_bias, draw_bias_surfaces, draw_embedding)),
        ),
    ):
        for inner, draw in zip(part.subfigures(3, 1, height_ratios=heights, hspace=0.03), drawn):
            draw(inner, scene)


def save(draw, scene: Scene, width: float, height: float, dpi: int, path: Path) -> None:
    """Draw and write a PNG of at most 256 colours, a fifth of the bytes."""
    import matplotlib

    matplotlib.use('agg')
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(width, height), layout='constrained')
    draw(figure, scene)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi)
    Image.open(buffer).convert('RGB').quantize(256, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


def read_image(
    cfg: Config, path: str, sides: Optional[Sequence[int]], channels: int
) -> Tuple[np.ndarray, float]:
    """Load an image as the config's test pipeline does, and resize it so, or to ``sides``.

    Returns:
        tuple: (H, W, channels), in BGR if these are three, and the factor of its sides.
    """
    import mmcv

    pipeline = cfg.test_dataloader.dataset if cfg.get('test_dataloader') else {}
    pipeline = innermost(pipeline).get('pipeline') or cfg.get('test_pipeline') or []
    load = TRANSFORMS.build(pipeline[0] if pipeline else dict(type='LoadImageFromFile'))
    try:
        loaded = None if is_cut_short(Path(path).read_bytes()) else load(dict(img_path=path))
    except Exception:  # broken bytes fail in any way in a decoder
        loaded = None
    if loaded is None:
        fail(f"image: file '{path}' could not be read as an image.")
    image = loaded['img'].reshape(*loaded['img'].shape[:2], -1)
    if image.shape[2] != channels:
        fail(
            f"image: file '{path}' has {image.shape[2]} channels as the config's test pipeline "
            f'loads it, and the model takes {channels}.'
        )
    scales = (step.get('scale') for step in pipeline if kind_of(step) == 'Resize')
    scale = sides or next(scales, None)
    if scale is None:
        return image, 1.0
    resized, factor = mmcv.imrescale(image, tuple(scale), return_scale=True)
    return resized.reshape(*resized.shape[:2], channels), factor


def normalised(cfg: Config, image: np.ndarray) -> Tensor:
    """(H, W, C) to (1, C, H, W) as the model's preprocessor would have it."""
    known = cfg.model.get('data_preprocessor') or {}
    if known.get('bgr_to_rgb') or known.get('rgb_to_bgr'):
        image = image[..., ::-1]
    mean, std = (
        np.array(known.get(name) or default) for name, default in (('mean', 0.0), ('std', 1.0))
    )
    return torch.from_numpy((image - mean) / std).float().permute(2, 0, 1)[None]


def parse_args():
    parser = argparse.ArgumentParser(
        description='Make pictures of the groups, the attention, the position bias, the embedding '
        'and the features of a CrossFormer on an image'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file of the model, or of the backbone')
    parser.add_argument('image', help='image file')
    parser.add_argument('--out', metavar='DIR', help='folder for the pictures')
    parser.add_argument(
        '--html',
        metavar='FILE',
        help='write one page for a browser, on which to point at positions of the image',
    )
    parser.add_argument(
        '--max-mb',
        type=float,
        metavar='MB',
        help='largest size of the page: values are rounded until they fit, and the page says how '
        f'exact they are (default: {MEGABYTES})',
    )
    parser.add_argument(
        '--position',
        type=int,
        nargs=2,
        metavar=('X', 'Y'),
        help='pixel of the image whose attention is shown (default: the centre)',
    )
    parser.add_argument(
        '--head',
        type=int,
        metavar='N',
        help='show the attention of this head, counted from 0 (default: the mean of all)',
    )
    parser.add_argument(
        '--scale',
        type=int,
        nargs=2,
        metavar=('LONG', 'SHORT'),
        help="largest sides that the image is resized to (default: the config's when testing)",
    )
    add_cfg_options(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    if not args.out and not args.html:
        fail('nothing to write: name a folder by --out, or a file by --html.')
    if args.out and find_spec('matplotlib') is None:
        fail('the package matplotlib is needed, which is not installed.')
    cfg = load_config(args.config, args.cfg_options, DENSE)
    check_file('checkpoint', args.checkpoint)
    check_file('image', args.image)
    if args.scale and min(args.scale) < 1:
        fail(f'--scale must be two numbers of at least 1, got {args.scale[0]} {args.scale[1]}.')
    if args.out and Path(args.out).exists() and not Path(args.out).is_dir():
        fail(f"--out: '{args.out}' is not a folder.")
    if args.html and Path(args.html).is_dir():
        fail(f"--html: '{args.html}' is a folder; name a file.")
    if args.max_mb is not None and not args.html:
        fail('--max-mb is of the page that --html writes.')
    if args.max_mb is not None and not args.max_mb > 0:
        fail(f'--max-mb must be above 0, got {args.max_mb}.')
    init_default_scope(cfg.default_scope)
    kind = kind_of(cfg.model.backbone)
    if kind != 'CrossFormer':
        fail(f"config '{args.config}' has the backbone {kind}, no CrossFormer.")
    try:
        backbone = MODELS.build(cfg.model.backbone).eval()
    except ValueError as error:
        fail(str(error))
    load_backbone(backbone, args.checkpoint)
    heads = max(layer.blocks[0].attn.num_heads for layer in backbone.layers)
    if args.head is not None and not 0 <= args.head < heads:
        fail(f'--head must be from 0 to {heads - 1}, got {args.head}.')

    image, scale = read_image(cfg, args.image, args.scale, backbone.in_channels)
    height, width = (round(side / scale) for side in image.shape[:2])
    x, y = args.position or (width // 2, height // 2)
    if not (0 <= x < width and 0 <= y < height):
        fail(
            f'--position must lie in the image, which is {width} wide and {height} high, '
            f'got {x} {y}.'
        )
    position = (min(int(x * scale), image.shape[1] - 1), min(int(y * scale), image.shape[0] - 1))
    if args.html:
        check_writable('--html', Path(args.html).parent)
    scene = Scene(
        backbone,
        as_picture(image)[..., ::-1] / 255.0,
        look(backbone, normalised(cfg, image)),
        position,
        args.head,
    )
    if args.out:
        write_pictures(scene, Path(args.out), min(max(height / width, 0.5), 1.5))
    if args.html:
        write_html(scene, args)


def write_pictures(scene: Scene, out: Path, shape: float) -> None:
    """All pictures; ``shape`` is the height of those made of images for a width of 1."""
    out.mkdir(parents=True, exist_ok=True)
    for name, draw, inches_wide, inches_high in PICTURES:
        if draw in (draw_groups, draw_attention, draw_features):  # made of images alone
            inches_high *= shape
        save(draw, scene, inches_wide, inches_high, 120, out / f'{name}.png')
        print(out / f'{name}.png', flush=True)
    save(draw_contact_sheet, scene, 16, 13, 120, out / 'contact_sheet.png')
    print(out / 'contact_sheet.png')


def write_html(scene: Scene, args: argparse.Namespace) -> None:
    colours = [principal_colours(feature) for feature in scene.seen.features]
    names = dict(model=Path(args.config).stem, image=Path(args.image).name)
    limit = int((args.max_mb or MEGABYTES) * 1e6)
    try:
        written = write_page(Path(args.html), scene, colours, names, limit)
    except ValueError as error:
        fail(f'--max-mb: {error}')
    print(
        f'{args.html}: {written["bytes"] / 1e6:.2f} MB; its attention weights are off by '
        f'{written["usual"]:.1%} of their value (root mean square), and by at most '
        f'{written["worst"] * 100:.2g} percentage points, where compared'
    )


if __name__ == '__main__':
    run(main)
