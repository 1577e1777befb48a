"""CrossFormer in timm's model registry, for timm and for libraries that build timm's models.

``import crossformer_mm.timm_models`` registers ``crossformer_{tiny,small,base,large}`` and
``crossformer_pp_{small,base,large,huge}``. They take the options of timm's models and those of
:class:`~crossformer_mm.backbone.CrossFormer`::

    timm.create_model('crossformer_small', num_classes=10, drop_path_rate=0.1)
    timm.create_model('crossformer_small', features_only=True, out_indices=(1, 2, 3))
    timm.create_model('crossformer_small', pretrained=True,
                      pretrained_cfg_overlay=dict(file='crossformer-s.pth'))
"""

import logging
import re
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Set, Tuple, Union

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead
from timm.models import (
    adapt_input_conv,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .architectures import ARCHITECTURES, PP_GROUPS, TIMM_NAMES
from .backbone import CrossFormer
from .checkpoint import fit_backbone, fit_checkpoint, model_weights, read_checkpoint
from .classification import NormedGlobalAveragePooling

MODELS: Dict[str, dict] = {
    name: dict(arch=arch, **(PP_GROUPS if ARCHITECTURES[arch]['cooling'] else {}))
    for arch, name in TIMM_NAMES.items()
}
FIRST_CONVS = tuple(f'backbone.patch_embed.projs.{i}' for i in range(4))
LINEAR = ('head.fc.weight', 'head.fc.bias')
# timm finds it by this name. Images are prepared for a test as in configs/imagenet/.
default_cfgs = generate_default_cfgs(
    {
        name: dict(
            num_classes=1000,
            input_size=(3, 224, 224),
            pool_size=(7, 7),
            crop_pct=0.875,
            interpolation='bicubic',
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            first_conv=FIRST_CONVS,
            classifier='head.fc',
        )
        for name in MODELS
    }
)
# torch.fx records the backbone as one node: its padding depends on the sides of an image.
register_notrace_module(CrossFormer)


class CrossFormerClassifier(nn.Module):
    """The backbone, a LayerNorm, pooling and a linear layer, with the methods of timm's models.

    Parameters have the names of this package's classifier for MMPretrain
    (``configs/_base_/models/classifier.py``): each loads the other's checkpoints, and a detector
    loads the backbone of both.

    Args:
        in_chans (int): channels of the image.
        num_classes (int): outputs of the linear layer; 0: no linear layer.
        global_pool (str): timm's name of a pooling; '' for none.
        drop_rate (float): dropout before the linear layer.
        proj_drop_rate (float): ``drop_rate`` of the backbone.
        options: of :class:`~crossformer_mm.backbone.CrossFormer`.

    Raises:
        ValueError: an option of the backbone is wrong; the message names it.
        TypeError: there is no such option; the message names the nearest.
    """

    output_fmt = 'NHWC'  # of forward_features

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        **options,
    ):
        super().__init__()
        self.in_chans = in_chans
        self.backbone = CrossFormer(in_channels=in_chans, drop_rate=proj_drop_rate, **options)
        self.backbone.init_weights()
        self.stages, channels = self.backbone.out_indices, self.backbone.out_channels
        self.feature_info = [
            dict(num_chs=count, reduction=stride, module=f'backbone.layers.{stage}')
            for stage, count, stride in zip(self.stages, channels, self.backbone.out_strides)
        ]
        self.num_features = channels[-1]
        self.neck = NormedGlobalAveragePooling(self.num_features)
        self.head = ClassifierHead(
            self.num_features, num_classes, global_pool, drop_rate, input_fmt='NHWC'
        )
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised last feature, (B, H, W, num_features)."""
        return self.neck.norm(self.backbone(x)[-1].permute(0, 2, 3, 1))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a feature of :meth:`forward_features` and apply the linear layer."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images (B, in_chans, H, W) of any size."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, Sequence[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Return the backbone's features and, before them, that of :meth:`forward_features`.

        Args:
            x (Tensor): (B, in_chans, H, W).
            indices (int | Sequence[int], optional): the last n features, or those with these
                numbers; negative ones count from the end. None: all.
            norm (bool): apply the classifier's norm to the last of the backbone's features.
            stop_early (bool): without effect: :meth:`prune_intermediate_layers` removes stages.
            output_fmt (str): 'NCHW'.
            intermediates_only (bool): return only the list of features.

        Raises:
            ValueError: another ``output_fmt``.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"CrossFormer: output_fmt must be 'NCHW', got {output_fmt!r}.")
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        stages, features = self.backbone.out_indices, list(self.backbone(x))
        last = self.neck.norm(features[-1].permute(0, 2, 3, 1))
        if norm:
            features[-1] = last.permute(0, 3, 1, 2).contiguous()
        intermediates = [features[stages.index(self.stages[i])] for i in taken]
        return intermediates if intermediates_only else (last, intermediates)

    def prune_intermediate_layers(
        self,
        indices: Union[int, Sequence[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Remove what some features do not need, so that no parameter is without a gradient.

        Args:
            indices (int | Sequence[int]): as in :meth:`forward_intermediates`.
            prune_norm (bool): remove the classifier's norm, too.
            prune_head (bool): remove pooling and linear layer.

        Returns:
            list[int]: the numbers, none of them negative.
        """
        taken, last = feature_take_indices(len(self.feature_info), indices)
        shortened, kept = last + 1 < len(self.feature_info), sorted(set(taken))
        backbone = self.backbone
        for i in set(range(len(self.stages))) - set(kept):
            delattr(backbone, f'norm{self.stages[i]}')
        backbone.out_indices = tuple(self.stages[i] for i in kept)
        backbone.out_channels = tuple(self.feature_info[i]['num_chs'] for i in kept)
        backbone.out_strides = tuple(self.feature_info[i]['reduction'] for i in kept)
        backbone.layers = backbone.layers[: max(backbone.out_indices) + 1]
        backbone.layers[-1].downsample = None
        self.num_features = backbone.out_channels[-1]
        if prune_norm or shortened:
            self.neck.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, '')
        return taken

    def get_classifier(self) -> nn.Module:
        """Return the linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the linear layer by one of random weights and, if named, the pooling."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        if num_classes:
            nn.init.trunc_normal_(self.head.fc.weight, std=0.02)
            nn.init.zeros_(self.head.fc.bias)
        self.global_pool = self.head.global_pool.pool_type
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass: less memory, more time, same values."""
        for stage in self.backbone.layers:
            stage.with_cp = enable

    def no_weight_decay(self) -> Set[str]:
        """Return the names of learnt positions; timm adds norms and biases."""
        return {
            f'{prefix}.{name}'
            for prefix, module in self.backbone.named_modules(prefix='backbone')
            for name in getattr(module, 'undecayed', ())
        }

    def group_matcher(self, coarse: bool = False) -> Union[Dict[str, str], Callable[[str], int]]:
        """Return what assigns parameters to layers, by stages or by blocks.

        Depths of blocks are those of :meth:`~crossformer_mm.backbone.CrossFormer.get_layer_depth`,
        so that layer decay gives the same learning rates in timm as in MMEngine.
        """
        if coarse:
            return dict(
                stem=r'^backbone\.(?:patch_embed|absolute_pos)', blocks=r'^backbone\.layers\.(\d+)'
            )
        return lambda name: self.backbone.get_layer_depth(name, 'backbone.')[0]

    def load_pretrained(self, path: str) -> None:
        """Load the authors' ImageNet file or a classifier's checkpoint; timm calls it.

        Raises:
            FileNotFoundError: no such file.
            CheckpointError: as in :meth:`fit`, or the file cannot be read as plain data.
        """
        self.fit(read_checkpoint(path), path)

    def fit(self, checkpoint: Mapping, name: str) -> None:
        """Load a checkpoint strictly, except for a linear layer of another shape.

        Such a layer keeps its random weights, with a warning; ``num_classes=0`` needs none.

        Raises:
            CheckpointError: the checkpoint holds no weights, or they do not fit; the message lists
                what is missing, unexpected or of another shape.
        """
        weights, own = self.named_weights(checkpoint, name), self.state_dict()
        theirs = weights.get(LINEAR[0])
        linear = {key: own[key] for key in LINEAR if key in own}
        if theirs is not None and (not linear or theirs.shape != linear[LINEAR[0]].shape):
            for key in LINEAR:
                weights.pop(key, None)
            weights.update(linear)
            if linear:
                logging.getLogger(__name__).warning(
                    "The linear layer in '%s' has another shape %s: this one, for %d classes, "
                    'starts from random weights.',
                    name,
                    tuple(theirs.shape),
                    self.num_classes,
                )
        fit_checkpoint(self, dict(state_dict=weights), name)

    def named_weights(self, checkpoint: Mapping, name: str) -> Dict[str, Tensor]:
        """Return a checkpoint's weights by their names here, for ``in_chans`` channels.

        For grey images the weights of an RGB image's channels are added up, as timm does.
        """
        weights = model_weights(self, checkpoint, name)
        for key, weight in weights.items():
            if re.search(r'patch_embed\.projs\.\d+\.weight$', key):
                if weight.shape[1] == 3 != self.in_chans:
                    weights[key] = adapt_input_conv(self.in_chans, weight)
        return weights


class CrossFormerFeatures(CrossFormerClassifier):
    """The model that ``features_only=True`` builds first: it loads any checkpoint of a backbone."""

    def fit(self, checkpoint: Mapping, name: str) -> None:
        """Load the backbone's weights strictly; those of a neck and of heads are left out.

        Raises:
            CheckpointError: as in :func:`~crossformer_mm.checkpoint.load_backbone`.
        """
        fit_backbone(self.backbone, self.named_weights(checkpoint, name), name)


def create(
    name: str,
    pretrained: bool = False,
    pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
    features_only: bool = False,
    output_stride: int = 32,
    **given,
) -> nn.Module:
    """Build a model of ``MODELS``; timm calls it from ``timm.create_model``.

    Args:
        name (str): key of ``MODELS``.
        pretrained (bool): load weights.
        pretrained_cfg_overlay (dict, optional): ``dict(file=PATH)`` names their file.
        features_only (bool): return the backbone's features instead of logits.
        output_stride (int): 32.
        given: options of timm's models and of the backbone.

    Raises:
        ValueError: another ``output_stride``.
    """
    if output_stride != 32:
        raise ValueError(
            f'{name}: output_stride must be 32, got {output_stride}: CrossFormer has no dilated '
            'stages.'
        )

    def fitted(checkpoint: Mapping, model: CrossFormerClassifier) -> Dict[str, Tensor]:
        model.fit(checkpoint, 'weights from timm')
        return model.state_dict()

    return build_model_with_cfg(
        CrossFormerFeatures if features_only else CrossFormerClassifier,
        name,
        pretrained,
        # By load_pretrained above: timm's own reader refuses the configuration in the authors'
        # files, and for another number of classes it accepts any missing weight.
        pretrained_cfg_overlay={'custom_load': True, **(pretrained_cfg_overlay or {})},
        # What timm reads otherwise, as from a folder.
        pretrained_filter_fn=fitted,
        features_only=features_only,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls='getter'),
        **{**MODELS[name], **given},
    )


def register(name: str) -> Callable[..., nn.Module]:
    """Add a model of ``MODELS`` to timm's registry and return its function."""

    def build(pretrained: bool = False, **given) -> nn.Module:
        return create(name, pretrained, **given)

    build.__name__ = build.__qualname__ = name
    return register_model(build)


globals().update({name: register(name) for name in MODELS})
