"""CrossFormer as the papers write it, in plain PyTorch: pad, regroup, mask, attend.

The package never pads a map or forms a mask; this does both, slowly and in the
open, so that the two can be held against each other. Nothing of the package is
used: the architecture is read off the names and shapes of the weights.

    >>> plain = plain_features(dict(backbone.named_parameters()), image)

is what ``backbone.eval()(image)`` must return, and has the same gradients.
"""

from typing import Mapping, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Weights = Mapping[str, Tensor]


def plain_features(
    weights: Weights,
    image: Tensor,
    group_size: Sequence[int] = (7, 7, 7, 7),
    interval: Sequence[int] = (8, 4, 2, 1),
    lda: str = 'interval',
    qk_scale: Optional[float] = None,
) -> Tuple[Tensor, ...]:
    """The feature (B, C, H, W) of every stage that ``weights`` has.

    Args:
        weights: named parameters of a CrossFormer, or a released state dict.
        image: (B, channels, H, W) of any size.
        group_size, interval, lda, qk_scale: as the backbone was built.
    """
    x = layer_norm(weights, 'patch_embed.norm', embed(weights, 'patch_embed.projs', image))
    features = []
    while f'layers.{len(features)}.blocks.0.norm1.weight' in weights:
        stage = len(features)
        index = 0
        while f'layers.{stage}.blocks.{index}.norm1.weight' in weights:
            x = block(
                weights,
                f'layers.{stage}.blocks.{index}',
                x,
                index % 2 == 1,
                group_size[stage],
                interval[stage],
                lda,
                qk_scale,
            )
            index += 1
        normed = f'norm{stage}.weight' in weights  # the package's option, out_norm
        out = layer_norm(weights, f'norm{stage}', x) if normed else x
        features.append(rearrange(out, 'b h w c -> b c h w'))
        merging = f'layers.{stage}.downsample'
        if f'{merging}.norm.weight' in weights:
            x = rearrange(layer_norm(weights, f'{merging}.norm', x), 'b h w c -> b c h w')
            x = embed(weights, f'{merging}.reductions', x)
    return tuple(features)


def plain_logits(weights: Weights, feature: Tensor) -> Tensor:
    """Logits (B, classes) of the authors' classifier for the last feature (B, C, H, W)."""
    tokens = rearrange(feature, 'b c h w -> b (h w) c')
    return linear(weights, 'head', layer_norm(weights, 'norm', tokens).mean(dim=1))


def embed(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Cross-scale embedding: (B, C, H, W) to (B, H / stride, W / stride, C'), zeros at the end."""
    stride = weights[f'{name}.0.weight'].shape[-1]  # that of the first kernel
    x = pad_to_multiple(x, stride)
    scales = []
    while f'{name}.{len(scales)}.weight' in weights:
        weight, bias = (weights[f'{name}.{len(scales)}.{part}'] for part in ('weight', 'bias'))
        scales.append(F.conv2d(x, weight, bias, stride, padding=(weight.shape[-1] - stride) // 2))
    return rearrange(torch.cat(scales, dim=1), 'b c h w -> b h w c')


def block(
    weights: Weights,
    name: str,
    x: Tensor,
    long: bool,
    group_size: int,
    interval: int,
    lda: str,
    qk_scale: Optional[float],
) -> Tensor:
    """(B, H, W, C) to the same shape."""
    normed = layer_norm(weights, f'{name}.norm1', x)
    x = x + attention(weights, f'{name}.attn', normed, long, group_size, interval, lda, qk_scale)
    hidden = linear(weights, f'{name}.mlp.fc1', layer_norm(weights, f'{name}.norm2', x))
    x = x + linear(weights, f'{name}.mlp.fc2', F.gelu(hidden))
    if f'{name}.ex_conv.weight' in weights:  # amplitude cooling, CrossFormer++
        x = F.conv2d(
            rearrange(x, 'b h w c -> b c h w'),
            weights[f'{name}.ex_conv.weight'],
            weights[f'{name}.ex_conv.bias'],
            padding=1,
            groups=x.shape[-1],
        )
        x = layer_norm(weights, f'{name}.ex_ln', rearrange(x, 'b c h w -> b h w c'))
    return x


def attention(
    weights: Weights,
    name: str,
    x: Tensor,
    long: bool,
    group_size: int,
    interval: int,
    lda: str,
    qk_scale: Optional[float],
) -> Tensor:
    """Short or long distance attention on (B, H, W, C), with padding and a mask."""
    height, width = x.shape[1:3]
    if min(height, width) <= group_size:  # a small map: short distance, one size that fits
        long = False
        group_size = min(height, width) if lda == 'interval' else max(height, width)

    # Patterns of a map cut into groups: y, x count groups; g, h count members.
    if not long:
        multiple, sizes = group_size, dict(g=group_size, h=group_size)
        cut, groups = 'b (y g) (x h) c', '(b y x) (g h) c'
    elif lda == 'interval':
        multiple, sizes = interval, dict(y=interval, x=interval)
        cut, groups = 'b (g y) (h x) c', '(b y x) (g h) c'
    else:
        multiple = group_size * interval
        sizes = dict(g=group_size, h=group_size, y=interval, x=interval)
        cut, groups = 'b (tile_y g y) (tile_x h x) c', '(b tile_y tile_x y x) (g h) c'

    def regroup(m: Tensor) -> Tensor:
        m = pad_to_multiple(rearrange(m, 'b h w c -> b c h w'), multiple)
        return rearrange(rearrange(m, 'b c h w -> b h w c'), f'{cut} -> {groups}', **sizes)

    padded_height, padded_width = (side + -side % multiple for side in (height, width))
    rows, columns = (
        (padded_height // interval, padded_width // interval)
        if long and lda == 'interval'
        else (group_size, group_size)
    )
    bias = position_bias(weights, f'{name}.pos', rows, columns)
    is_padding = 1 - regroup(torch.ones_like(x[..., :1]))  # (groups, N, 1)

    heads = bias.shape[0]
    q, k, v = rearrange(
        linear(weights, f'{name}.qkv', regroup(x)),
        'group n (three heads d) -> three group heads n d',
        three=3,
        heads=heads,
    )
    scale = q.shape[-1] ** -0.5 if qk_scale is None else qk_scale
    logits = q @ k.transpose(-1, -2) * scale + bias
    logits = logits - 1e6 * rearrange(is_padding, 'group n 1 -> group 1 1 n')
    out = rearrange(logits.softmax(dim=-1) @ v, 'group heads n d -> group n (heads d)')
    out = linear(weights, f'{name}.proj', out)

    tiles = dict(y=padded_height // multiple, x=padded_width // multiple)
    if long and lda == 'block':
        tiles = {f'tile_{axis}': count for axis, count in tiles.items()}
    elif long:
        tiles = dict(g=rows, h=columns)
    out = rearrange(out, f'{groups} -> {cut}', **{**sizes, **tiles})
    return out[:, :height, :width]


def position_bias(weights: Weights, name: str, rows: int, columns: int) -> Tensor:
    """Dynamic position bias (heads, N, N) of a group of ``rows x columns`` members.

    Evaluated once for each distinct offset, query - key, and indexed by it.
    """
    like = weights[f'{name}.pos_proj.weight']
    offsets = torch.cartesian_prod(torch.arange(1 - rows, rows), torch.arange(1 - columns, columns))
    bias = linear(weights, f'{name}.pos_proj', offsets.reshape(-1, 2).to(like))
    for layer in ('pos1', 'pos2', 'pos3'):
        bias = layer_norm(weights, f'{name}.{layer}.0', bias).relu()
        bias = linear(weights, f'{name}.{layer}.2', bias)

    members = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2)
    row, column = (members[:, None] - members[None, :]).unbind(-1)  # query - key, (N, N) each
    index = (row + rows - 1) * (2 * columns - 1) + column + columns - 1
    return rearrange(bias[index], 'query key heads -> heads query key')


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zeros below and right of (B, C, H, W)."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple))


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f'{name}.weight'], weights.get(f'{name}.bias'))


def layer_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f'{name}.weight'], weights[f'{name}.bias'])


# Comparisons


def parameters_of(backbone):
    return dict(backbone.named_parameters())


def out_sides(side):
    """Positions along a side of each stage: every embedding rounds up."""
    sides = [-(-side // 4)]
    for _ in range(3):
        sides.append(-(-sides[-1] // 2))
    return sides


def assert_equals_plain(backbone, probe, image, options):
    """Assert equal features, and equal gradients of ``probe`` of them."""
    weights = parameters_of(backbone)
    image.requires_grad_()
    features = backbone(image)
    references = plain_features(weights, image, **options)
    assert len(features) == len(references)
    for feature, reference in zip(features, references):
        torch.testing.assert_close(feature, reference, rtol=1e-9, atol=1e-11)
    variables = [image, *weights.values()]
    gradients = torch.autograd.grad(probe(features), variables)
    expected = torch.autograd.grad(probe(references), variables)
    for name, gradient, reference in zip(['image', *weights], gradients, expected):
        scale = max(reference.abs().max().item(), 1e-3)
        assert (gradient - reference).abs().max().item() <= 1e-9 * scale, name
