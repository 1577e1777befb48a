"""The CrossFormer backbone: stages and outputs."""

import inspect
import math
import re
from typing import Any, Iterator, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .architectures import GROUPS, resolve_arch
from .block import CrossFormerBlock
from .checkpoint import load_backbone, whole_model_follows
from .compat import autocast_dtype, compiled_since_2_4, is_autocast_enabled
from .embedding import PatchEmbedding, PatchMerging
from .grouping import Rules, stage_rules
from .kernels import Call, describe_path
from .openmmlab import BaseModule, register_model, set_random_weights, warn
from .options import (
    check_choices,
    check_embeddings,
    check_numbers,
    check_outputs,
    check_rates,
    check_stages,
    suggest_options,
)
from .position_bias import AbsolutePosition


class CrossFormerStage(nn.Module):
    """Blocks that alternate short and long distance attention, then a merging.

    Args:
        blocks (Sequence[CrossFormerBlock]): the blocks, the first of which attends at short
            distance.
        downsample (PatchMerging, optional): what leads to the next stage.
        group_size, interval, lda: see :class:`CrossFormer`.
        with_cp (bool): recompute each block in the backward pass.
    """

    def __init__(
        self,
        blocks: Sequence[CrossFormerBlock],
        downsample: Optional[PatchMerging],
        group_size: int,
        interval: int,
        lda: str,
        with_cp: bool,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.group_size = group_size
        self.interval = interval
        self.lda = lda
        self.with_cp = with_cp

    def rules(self, x: Tensor) -> Tuple[Rules, Rules]:
        """Return the rules of short and of long distance attention on a map (B, H, W, C).

        Stages for export override it.
        """
        height, width = x.shape[1:3]
        return stage_rules(height, width, self.group_size, self.interval, self.lda)

    def schedule(self, short: Any, long: Any) -> Iterator[Tuple[CrossFormerBlock, Any]]:
        """Pair each block with ``short`` or ``long``, by the distance at which it attends."""
        return zip(self.blocks, (short, long) * len(self.blocks))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape: the stage's feature, before merging."""
        for block, groups in self.schedule(*self.rules(x)):
            if self.with_cp and torch.is_grad_enabled():
                x = checkpoint(block, x, *groups, use_reentrant=False)
            else:
                x = block(x, *groups)
        return x

    def attention_paths(self) -> Iterator[str]:
        """Yield :func:`.kernels.describe_path` for each block, in the type of autocast if it is
        enabled."""
        weight = next(self.parameters())
        device, dtype = weight.device, weight.dtype
        if is_autocast_enabled(device.type):
            dtype = autocast_dtype(device.type)
        large = self.group_size + 1  # a side of maps that are not one group
        rules = stage_rules(large, large, self.group_size, self.interval, self.lda)
        for block, (rows, _) in self.schedule(*rules):
            attention = block.attn
            call = Call(
                device,
                dtype,
                attention.proj.in_features // attention.num_heads,
                attention.attn_drop_rate,
                has_lead=bool(rows.lead),
            )
            yield describe_path(call, attention.attention_path)


@register_model
class CrossFormer(BaseModule):
    """CrossFormer and CrossFormer++ as a backbone for dense prediction.

    `CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention
    <https://arxiv.org/abs/2108.00154>`_ and `CrossFormer++ <https://arxiv.org/abs/2303.06908>`_.
    The output depends only on the input, the weights and ``training``; one instance takes images of
    all sizes.

    Args:
        arch (str | dict): one of ``t s b l pp-s pp-b pp-l pp-h``, or a dict with ``embed_dims``
            (channels of the first stage, a multiple of 16), ``depths`` and ``num_heads`` (one
            number for each of the stages), and optionally ``drop_path_rate`` (0.) and ``cooling``
            (False).
        in_channels (int): channels of the image.
        patch_sizes (Sequence[int]): kernels of the first embedding; the first is its stride.
        merge_sizes (Sequence[Sequence[int]]): the same for each merging between stages.
        group_size (Sequence[int]): G of each stage: short distance attention covers G x G adjacent
            positions.
        interval (Sequence[int]): I of each stage: long distance attention joins every I-th
            position.
        lda (str): how long distance attention groups. ``interval``: over the whole map, so that
            groups grow with the image (the ICLR paper, and every published COCO and ADE20K result).
            ``block``: inside tiles of G*I x G*I positions, so that cost is linear in the image's
            area (the later CrossFormer++ code). At 224x224 with the default G and I they are the
            same. To compare with: ``shifted``, short distance groups moved by half their size
            (Swin's), and ``none``, short distance again.
        position_bias (str): what tells attention where a token is: ``dynamic``, or to compare with
            ``dynamic_residual``, ``relative``, ``absolute`` or ``none``; see
            :mod:`crossformer_mm.position_bias`.
        cooling (bool, optional): amplitude cooling layer after every third block of a stage but its
            last. None: what the architecture says.
        mlp_ratio (float): hidden channels of the MLPs over their input's.
        qkv_bias (bool): bias in the projection to queries, keys and values.
        qk_scale (float, optional): factor on attention logits. None: head_dim^-0.5.
        drop_rate (float): dropout of embedding and linear layers.
        attn_drop_rate (float): dropout of attention weights.
        drop_path_rate (float, optional): stochastic depth of the last block, growing linearly from
            0 at the first. None: the architecture's.
        out_indices (Sequence[int]): stages whose features are returned. Stages after the last of
            them are not built.
        out_norm (bool): a LayerNorm on each output, as Swin has. Off, because the published models
            have none; helps training from random weights.
        frozen_stages (int): stages to freeze: -1 none, 0 the first embedding, n the embedding and
            the first n stages with their mergings.
        with_cp (bool): recompute each block in the backward pass: less memory, more time, same
            values.
        init_cfg (dict, optional): ``dict(type='Pretrained', checkpoint=path)`` reads ImageNet
            weights or the backbone of a whole model's checkpoint. None, or a checkpoint of None:
            random weights.
        attention_path (str, optional): for study, how attention is computed: ``plain``, ``native``
            or ``fused`` (:mod:`crossformer_mm.kernels`). The values are the same. One that does not
            support an image raises an error. None: the fastest that does.

    Attributes:
        out_channels (tuple[int]): channels of each returned feature.
        out_strides (tuple[int]): image pixels per position of each.

    Raises:
        ValueError: an option is wrong; the message names it.
        TypeError: there is no such option; the message names the nearest.

    Examples:
        >>> import torch
        >>> from crossformer_mm import CrossFormer
        >>> backbone = CrossFormer('s', out_indices=(1, 2, 3))
        >>> backbone.out_channels, backbone.out_strides
        ((192, 384, 768), (8, 16, 32))
        >>> [tuple(f.shape) for f in backbone(torch.rand(1, 3, 100, 150))]
        [(1, 192, 13, 19), (1, 384, 7, 10), (1, 768, 4, 5)]
    """

    @suggest_options
    def __init__(
        self,
        arch: Union[str, dict] = 's',
        in_channels: int = 3,
        patch_sizes: Sequence[int] = (4, 8, 16, 32),
        merge_sizes: Sequence[Sequence[int]] = ((2, 4), (2, 4), (2, 4)),
        group_size: Sequence[int] = (7, 7, 7, 7),
        interval: Sequence[int] = (8, 4, 2, 1),
        lda: str = 'interval',
        position_bias: str = 'dynamic',
        cooling: Optional[bool] = None,
        mlp_ratio: float = 4,
        qkv_bias: bool = True,
        qk_scale: Optional[float] = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: Optional[float] = None,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_norm: bool = False,
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_cfg: Optional[dict] = None,
        attention_path: Optional[str] = None,
    ):
        super().__init__(init_cfg=init_cfg)
        arch = resolve_arch(arch)
        embed_dims, depths = arch['embed_dims'], arch['depths']
        cooling = arch['cooling'] if cooling is None else cooling
        drop_path_rate = arch['drop_path_rate'] if drop_path_rate is None else drop_path_rate
        check_stages(arch, group_size, interval)
        check_embeddings(arch, in_channels, patch_sizes, merge_sizes)
        check_choices(lda, position_bias, attention_path)
        check_numbers(embed_dims, mlp_ratio, qk_scale)
        check_outputs(len(depths), out_indices, frozen_stages)
        check_rates(
            drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate
        )

        self.in_channels = in_channels
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages

        self.patch_embed = PatchEmbedding(in_channels, embed_dims, patch_sizes)
        self.absolute_pos = (
            AbsolutePosition(embed_dims, group_size[0] * interval[0])
            if position_bias == 'absolute'
            else nn.Identity()
        )
        self.embed_drop = nn.Dropout(drop_rate)
        last_block = max(sum(depths) - 1, 1)
        drop_path = (drop_path_rate * block / last_block for block in range(sum(depths)))
        num_stages = max(out_indices) + 1
        self.layers = nn.ModuleList()
        for stage in range(num_stages):
            dims = embed_dims * 2**stage
            blocks = [
                CrossFormerBlock(
                    dims,
                    mlp_ratio,
                    drop_rate,
                    next(drop_path),
                    cooling=cooling and (block + 1) % 3 == 0 and block + 1 < depths[stage],
                    num_heads=arch['num_heads'][stage],
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    attn_drop_rate=attn_drop_rate,
                    attention_path=attention_path,
                    position_bias=position_bias,
                    group_size=group_size[stage],
                )
                for block in range(depths[stage])
            ]
            downsample = PatchMerging(dims, merge_sizes[stage]) if stage + 1 < num_stages else None
            self.layers.append(
                CrossFormerStage(
                    blocks, downsample, group_size[stage], interval[stage], lda, with_cp
                )
            )

        self.out_channels = tuple(embed_dims * 2**stage for stage in self.out_indices)
        self.out_strides = tuple(
            patch_sizes[0] * math.prod(sizes[0] for sizes in merge_sizes[:stage])
            for stage in self.out_indices
        )
        self.out_norm = out_norm
        for stage, channels in zip(self.out_indices, self.out_channels):
            self.add_module(f'norm{stage}', nn.LayerNorm(channels) if out_norm else nn.Identity())
        self._freeze_stages()

    @compiled_since_2_4
    def forward(self, image: Tensor) -> Tuple[Tensor, ...]:
        """Features of the chosen stages.

        Args:
            image (Tensor): (B, in_channels, H, W) in a floating point type, of any H, W >= 1. A
                side that is no multiple of a stage's stride is padded with zeros at the bottom or
                right.

        Returns:
            tuple[Tensor]: (B, C * 2^i, ceil(H / stride_i), ceil(W / stride_i)) for each i of
            ``out_indices``.

        Raises:
            ValueError: the input is no such batch of images.
        """
        if image.dim() != 4 or image.shape[1] != self.in_channels or 0 in image.shape:
            raise ValueError(
                f'CrossFormer takes images as a tensor (B, {self.in_channels}, H, W) '
                f'with no empty side, but got shape {tuple(image.shape)}.'
            )
        if not image.is_floating_point():
            raise ValueError(
                'CrossFormer takes images in a floating point type, but got '
                f'{image.dtype}: normalise them first.'
            )
        x = self.embed_drop(self.absolute_pos(self.patch_embed(image)))
        outputs = {}
        for stage, layer in enumerate(self.layers):
            x = layer(x)
            if stage in self.out_indices:
                out = getattr(self, f'norm{stage}')(x)
                outputs[stage] = out.permute(0, 3, 1, 2).contiguous()
            if layer.downsample is not None:
                x = layer.downsample(x)
        return tuple(outputs[stage] for stage in self.out_indices)

    def init_weights(self) -> None:
        """Set random weights, or load those that ``init_cfg`` specifies.

        Linear layers: truncated normal of standard deviation 0.02 and bias 0; LayerNorm: 1 and 0;
        convolutions: PyTorch's default, as the authors do.

        Raises:
            FileNotFoundError: the checkpoint does not exist.
            ValueError: it cannot be read, or is another architecture's.
        """
        init_cfg = self.init_cfg or {}
        if init_cfg and (not isinstance(init_cfg, dict) or init_cfg.get('type') != 'Pretrained'):
            super().init_weights()
            return
        if init_cfg.get('checkpoint'):
            load_backbone(self, init_cfg['checkpoint'], init_cfg.get('prefix', 'backbone.'))
            return
        if init_cfg and not whole_model_follows.get():
            warn(
                'CrossFormer: no pretrained checkpoint is given, training starts from random '
                'weights. The published results start from ImageNet weights: name a file in '
                'model.backbone.init_cfg.checkpoint.'
            )
        set_random_weights(self)

    def train(self, mode: bool = True) -> 'CrossFormer':
        """Set training mode, frozen stages staying in evaluation mode."""
        super().train(mode)
        self._freeze_stages()
        return self

    def _freeze_stages(self) -> None:
        if self.frozen_stages >= 0:
            first = [self.patch_embed, self.absolute_pos, self.embed_drop]
            norms = [getattr(self, f'norm{i}') for i in self.out_indices if i < self.frozen_stages]
            frozen = nn.ModuleList([*first, *self.layers[: self.frozen_stages], *norms])
            frozen.eval().requires_grad_(False)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> Tuple[int, int]:
        """Depth of a parameter, for learning rates that decay from layer to layer.

        The first embedding has depth 0, block n of all stages n + 1. A merging counts with the
        block before it. Output norms and what does not belong to the backbone are deepest.

        Args:
            param_name (str): name of the parameter.
            prefix (str): prefix of the backbone's names.

        Returns:
            tuple[int, int]: the depth, and the number of depths.
        """
        last = sum(len(stage.blocks) for stage in self.layers) + 1
        name = param_name.removeprefix(prefix)
        layer = re.match(r'layers\.(\d+)\.(?:blocks\.(\d+)|downsample)', name)
        if not param_name.startswith(prefix):
            depth = last
        elif layer is not None:
            stage = int(layer[1])
            before = sum(len(one.blocks) for one in self.layers[:stage])
            depth = before + (int(layer[2]) + 1 if layer[2] else len(self.layers[stage].blocks))
        else:
            depth = 0 if name.startswith(('patch_embed', 'absolute_pos')) else last
        return depth, last + 1

    def is_extra(self, key: str) -> bool:
        """Check for a parameter that published weights do not have: an output norm."""
        return self.out_norm and key.startswith(tuple(f'norm{i}.' for i in self.out_indices))

    def is_left_out(self, key: str) -> bool:
        """Check for a parameter of a stage or merging after the last returned stage, or of the
        output norm of a stage that is not returned."""
        norm = re.match(r'norm(\d+)\.', key)
        if norm and self.out_norm:
            return int(norm[1]) not in self.out_indices
        layer = re.match(r'layers\.(\d+)\.(downsample\.)?', key)  # which is of the next stage
        return layer is not None and int(layer[1]) + bool(layer[2]) >= len(self.layers)


def groups_of(options: dict) -> dict:
    """Return how a CrossFormer of some options groups positions, with the defaults of the rest."""
    defaults = inspect.signature(CrossFormer).parameters
    return {key: options.get(key, defaults[key].default) for key in GROUPS}
