"""Whole models as modules, from an image as it is to boxes, masks, labels or scores.

The steps of MMDetection and MMSegmentation around a network depend on the number of boxes. Here are
the same steps for exporters: each list of boxes has its maximum length, padded with boxes of no
score, until the last step drops the padding.

Models with other steps are not supported: an :class:`.UnknownModel` is raised.
"""

from typing import Dict, List, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .operators.nms import nms
from .operators.resize import resize
from .operators.resize_image import resize_image
from .operators.roi_features import roi_features

Outputs = Dict[str, Tensor]


class UnknownModel(UserError):
    """A model, or a setting of it, that cannot be exported whole; the message is a clause."""


def need(fits: bool, sentence: str) -> None:
    if not fits:
        raise UnknownModel(f'{sentence}; --what head exports what comes before it')


class Network(nn.Module):
    """Wrapper of a model that returns its outputs by their names."""

    any_size: dict = {}  # replacements of modules that fix sizes

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


class Preprocessor(nn.Module):
    """Normalise and pad RGB values from 0 to 255, (B, 3, H, W) of any type.

    Args:
        model (nn.Module): of MMDetection, MMSegmentation or MMPretrain, with a data_preprocessor.
        divisor (int): sides are padded with zeros to a multiple of it.
    """

    def __init__(self, model: nn.Module, divisor: int = 1):
        super().__init__()
        given = model.data_preprocessor
        names = ('channel_conversion', '_channel_conversion', 'to_rgb')
        self.rgb = any(getattr(given, name, False) for name in names)
        self.divisor = divisor
        for name, default in (('mean', 0.0), ('std', 1.0)):
            value = getattr(given, name, None)
            value = torch.tensor(default) if value is None else value.detach().clone()
            self.register_buffer(name, value.view(1, -1, 1, 1))

    @property
    def fill(self) -> List[int]:
        """RGB values to pad images with: about 0 when normalised."""
        mean = self.mean.flatten().round().int().tolist()
        return mean if self.rgb else mean[::-1]

    def forward(self, image: Tensor) -> Tensor:
        image = image.float()
        if not self.rgb:
            image = torch.cat(image.split(1, dim=1)[::-1], dim=1)
        image = (image - self.mean) / self.std
        if self.divisor > 1:
            height, width = image.shape[2:]
            image = F.pad(image, (0, -width % self.divisor, 0, -height % self.divisor))
        return image


class Boxes(NamedTuple):
    """Boxes of one image, some of which are padding.

    Args:
        boxes (Tensor): (n, 4) as left, top, right, bottom.
        scores (Tensor): (n,), at most 0 for padding.
        labels (Tensor): (n,) whole numbers; boxes of different ones do not suppress each other.
        raw (Tensor): (n,) scores before any threshold, best first on each level.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    raw: Tensor

    def suppressed(self, cfg: dict, keep: int) -> Tensor:
        """Apply non-maximum suppression; (keep,) indices, best first, then -1."""
        boxes = self.boxes
        if not cfg.get('class_agnostic', False):
            # As mmcv.ops.batched_nms, which moves boxes of different labels apart.
            largest = torch.where(self.scores[:, None] > 0, boxes, 0.0).max()
            boxes = boxes + (self.labels.float() * (largest + 1))[:, None]
        return nms(boxes, self.scores, float(cfg['iou_threshold']), keep)


def check_nms(cfg: dict, name: str) -> None:
    nms = cfg.get('nms') or {}
    need(
        nms.get('type') == 'nms' and 'iou_threshold' in nms,
        f'test_cfg{name}.nms must be of type nms with an iou_threshold, found {dict(nms)}',
    )
    known = {'type', 'iou_threshold', 'class_agnostic', 'split_thr'}
    need(set(nms) <= known, f'test_cfg{name}.nms may have {sorted(known)}, found {sorted(nms)}')
    need(cfg.get('max_per_img', 0) > 0, f'test_cfg{name}.max_per_img must be a number above 0')


def corners(height: int, width: int) -> Tensor:
    """Return the largest coordinates (4,) of a box in an image."""
    sides = [torch.scalar_tensor(side, dtype=torch.float32) for side in (width, height)]
    return torch.stack([*sides, *sides])


def inside(boxes: Tensor, limit: Tensor, coder: nn.Module) -> Tensor:
    """Clip boxes to the image, if their coder does."""
    return torch.minimum(boxes.clamp(min=0), limit) if coder.clip_border else boxes


def large_enough(boxes: Tensor, cfg: dict) -> Tensor:
    least = cfg.get('min_bbox_size', -1)
    sides = boxes[:, 2:] - boxes[:, :2]
    # Below 0 all boxes are large enough; padding has no score in any case.
    return (sides > least).all(1) if least >= 0 else torch.ones_like(boxes[:, 0], dtype=torch.bool)


class DenseHead(nn.Module):
    """Candidates of a dense head, from features.

    Args:
        head (nn.Module): RPNHead, RetinaHead, FCOSHead, ATSSHead or GFLHead.
        cfg (dict): its test_cfg.
        name (str): of that, for errors.
    """

    KNOWN = ('RPNHead', 'RetinaHead', 'RetinaSepBNHead', 'FCOSHead', 'ATSSHead', 'GFLHead')

    def __init__(self, head: nn.Module, cfg: dict, name: str = ''):
        super().__init__()
        kind = type(head).__name__
        need(
            kind in self.KNOWN,
            f'head {kind} is none whose boxes can be decoded in the file ({", ".join(self.KNOWN)})',
        )
        check_nms(cfg, name)
        need(cfg.get('nms_pre', 0) > 0, f'test_cfg{name}.nms_pre must be a number above 0')
        self.head, self.cfg = head, cfg
        self.points = kind == 'FCOSHead'
        self.distances = kind == 'GFLHead'
        self.classes = 1 if kind == 'RPNHead' else head.num_classes
        self.sigmoid = head.use_sigmoid_cls
        self.strides = head.prior_generator.strides
        if not self.points:
            for level, anchors in enumerate(head.prior_generator.base_anchors):
                self.register_buffer(f'anchors{level}', anchors.detach().clone())

    def forward(self, features: Sequence[Tensor], limit: Tensor) -> Boxes:
        """Decode features (1, C, h, w) of all levels; ``limit`` is that of :func:`corners`."""
        outs = self.head(features)
        factors = outs[2] if len(outs) > 2 else [None] * len(outs[0])
        levels = [
            self.of_level(level, classes, boxes, factor, limit)
            for level, (classes, boxes, factor) in enumerate(zip(*outs[:2], factors))
        ]
        return Boxes(*map(torch.cat, zip(*levels)))

    def of_level(
        self, level: int, classes: Tensor, boxes: Tensor, factors: Optional[Tensor], limit: Tensor
    ) -> Boxes:
        width = torch.scalar_tensor(classes.shape[3], dtype=torch.int64)
        most = self.cfg['nms_pre']
        priors = 1 if self.points else len(getattr(self, f'anchors{level}'))
        logits = flat(classes, classes.shape[1] // priors)
        if not self.sigmoid:  # the last one is the background
            logits = logits.softmax(1)[:, :-1]
        # The best pairs of prior and class are pairs of the priors with the best classes.
        best = F.pad(logits.amax(1), (0, most), value=float('-inf'))
        best, prior = best.topk(most)
        prior = prior.clamp(max=logits.shape[0] - 1)  # padding
        pairs = torch.where((best > float('-inf'))[:, None], logits[prior], float('-inf'))
        scores, pair = pairs.flatten().topk(most)
        prior, label = prior[pair // self.classes], pair % self.classes
        if self.sigmoid:
            scores = scores.sigmoid()  # 0 of -inf
        there, raw = scores > self.cfg.get('score_thr', 0), scores
        if type(self.head).__name__ == 'RPNHead':
            label = torch.full_like(label, level)  # in place of a class
        if factors is not None:
            scores = scores * flat(factors, 1)[prior, 0].sigmoid()

        position, which = prior // priors, prior % priors
        stride = torch.tensor(self.strides[level], dtype=torch.float32)
        cell = torch.stack([position % width, position // width], 1).float()
        chosen = flat(boxes, boxes.shape[1] // priors)[prior]
        coder = self.head.bbox_coder
        if self.points:
            at = (cell + self.head.prior_generator.offset) * stride
        else:
            at = (cell * stride).repeat(1, 2) + getattr(self, f'anchors{level}')[which]
        if self.distances:
            chosen = self.head.integral(chosen) * stride[0]
            at = self.head.anchor_center(at)
        decoded = inside(coder.decode(at, chosen), limit, coder)
        there = there & large_enough(decoded, self.cfg)
        return Boxes(decoded, torch.where(there, scores, -1.0), label, raw)


def flat(level: Tensor, channels: int) -> Tensor:
    """Reorder (1, priors * channels, h, w) to (h * w * priors, channels)."""
    return level[0].permute(1, 2, 0).reshape(-1, channels)


class RoiFeatures(nn.Module):
    """Features of regions, each from the level that fits its size.

    Args:
        extractor (nn.Module): SingleRoIExtractor.
    """

    def __init__(self, extractor: nn.Module):
        super().__init__()
        layers = extractor.roi_layers
        need(
            type(extractor).__name__ == 'SingleRoIExtractor'
            and all(type(layer).__name__ == 'RoIAlign' for layer in layers)
            and layers[0].pool_mode == 'avg',
            f'the RoI extractor must be a SingleRoIExtractor with RoIAlign of averages, found '
            f'{type(extractor).__name__} with {type(layers[0]).__name__}',
        )
        self.finest_scale = extractor.finest_scale
        self.scales = [float(layer.spatial_scale) for layer in layers]
        self.layer = layers[0]

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Extract (n, C, height, width) from features (1, C, h, w) for rois (n, 4)."""
        sides = rois[:, 2:] - rois[:, :2]
        scale = torch.sqrt(sides[:, 0] * sides[:, 1]) / self.finest_scale + 1e-6
        levels = torch.stack([scale >= 2.0**level for level in range(1, len(self.scales))] or [])
        return roi_features(
            list(features[: len(self.scales)]),
            rois,
            levels.sum(0),
            self.scales,
            *self.layer.output_size,
            int(self.layer.sampling_ratio),
            bool(self.layer.aligned),
        )


class RoiHead(nn.Module):
    """Second stage: classes, boxes and masks of proposals.

    Args:
        head (nn.Module): StandardRoIHead or CascadeRoIHead.
        cfg (dict): test_cfg.rcnn.
    """

    def __init__(self, head: nn.Module, cfg: dict):
        super().__init__()
        kind = type(head).__name__
        need(
            kind in ('StandardRoIHead', 'CascadeRoIHead') and not head.with_shared_head,
            f'roi_head {kind} must be a StandardRoIHead or CascadeRoIHead with no shared head',
        )
        check_nms(cfg, '.rcnn')
        self.cfg = cfg
        self.bbox_heads = as_list(head.bbox_head)
        self.extractors = nn.ModuleList(map(RoiFeatures, as_list(head.bbox_roi_extractor)))
        for bbox_head in self.bbox_heads:
            need(
                bbox_head.with_cls
                and bbox_head.with_reg
                and not bbox_head.custom_activation
                and type(bbox_head.bbox_coder).__name__ == 'DeltaXYWHBBoxCoder',
                f'bbox_head {type(bbox_head).__name__} must have classes by softmax and boxes by '
                'DeltaXYWHBBoxCoder',
            )
        self.mask_heads = nn.ModuleList()
        if head.with_mask:
            self.mask_heads = as_list(head.mask_head)
            self.mask_extractors = nn.ModuleList(
                map(RoiFeatures, as_list(head.mask_roi_extractor or head.bbox_roi_extractor))
            )
            for mask_head in self.mask_heads:
                need(
                    type(mask_head).__name__ == 'FCNMaskHead',
                    f'mask_head must be an FCNMaskHead, found {type(mask_head).__name__}',
                )

    def forward(self, features: Sequence[Tensor], rois: Tensor, there: Tensor, limit: Tensor):
        """Return the Boxes of all classes for proposals (n, 4); ``there`` is False for padding."""
        total: Tensor = 0.0
        for stage, (head, extractor) in enumerate(zip(self.bbox_heads, self.extractors)):
            logits, deltas = head(extractor(features, rois))
            total = total + logits
            if stage + 1 < len(self.bbox_heads):
                if not head.reg_class_agnostic:
                    label = logits[:, :-1].argmax(1)
                    deltas = deltas.unflatten(1, (-1, 4))[torch.arange(len(label)), label]
                rois = inside(head.bbox_coder.decode(rois, deltas), limit, head.bbox_coder)
        scores = (total / len(self.bbox_heads)).softmax(1)[:, :-1]
        classes, coder = scores.shape[1], head.bbox_coder
        if head.reg_class_agnostic:
            boxes = inside(coder.decode(rois, deltas), limit, coder)
            boxes = boxes.repeat_interleave(classes, 0)
        else:
            apart = rois.repeat_interleave(classes, 0)
            boxes = inside(coder.decode(apart, deltas.reshape(-1, 4)), limit, coder)
        there = (scores > self.cfg['score_thr']) & there[:, None]
        scores = torch.where(there, scores, -1.0).flatten()
        labels = torch.arange(classes).repeat(rois.shape[0])
        return Boxes(boxes, scores, labels, scores)

    def masks(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Return masks (n, height, width), from 0 to 1, to be stretched over boxes (n, 4)."""
        # One extra region: not all runtimes convolve empty tensors.
        rois = torch.cat([boxes.new_tensor([[0.0, 0.0, 1.0, 1.0]]), boxes])
        labels = torch.cat([labels.new_zeros(1), labels])
        total: Tensor = 0.0
        for head, extractor in zip(self.mask_heads, self.mask_extractors):
            masks = head(extractor(features, rois))
            if head.class_agnostic:
                masks = masks[:, 0]
            else:
                at = labels[:, None, None, None].expand(-1, 1, *masks.shape[2:])
                masks = masks.gather(1, at)[:, 0]
            total = total + masks.sigmoid()
        return (total / len(self.mask_heads))[1:]


def as_list(module: nn.Module) -> nn.ModuleList:
    return module if isinstance(module, nn.ModuleList) else nn.ModuleList([module])


class Resize(nn.Module):
    """The test pipeline's Resize, to the bit; returns float32 after resizing.

    Args:
        rule (dict, optional): of :func:`.metadata.rule_for_inside`; None: nothing is resized.
    """

    def __init__(self, rule: Optional[dict]):
        super().__init__()
        self.rule = rule

    def forward(self, image: Tensor) -> Tensor:
        if self.rule is None:
            return image
        return resize_image(image, *map(self.rule.get, ('height', 'width', 'keep_ratio')))


class WholeDetector(Network):
    """Detector from an RGB image (1, 3, H, W) to boxes (n, 4) in its pixels, scores and labels.

    If the model has masks, it also returns masks (n, height, width) to be stretched over the boxes.
    ``candidate_scores`` are those of the dense head before any threshold: they can be compared
    where there is no box.

    Args:
        model (nn.Module): of MMDetection.
        resize (dict, optional): rule of :class:`.Resize`.
    """

    def __init__(self, model: nn.Module, resize: Optional[dict] = None):
        super().__init__(model)
        self.resize = Resize(resize)
        self.preprocess = Preprocessor(model, model.data_preprocessor.pad_size_divisor or 1)
        self.roi_head = None
        if getattr(model, 'with_rpn', False):
            cfg = model.test_cfg
            self.dense = DenseHead(model.rpn_head, cfg['rpn'], '.rpn')
            self.roi_head = RoiHead(model.roi_head, cfg['rcnn'])
            self.cfg = cfg['rcnn']
        else:
            need(hasattr(model, 'bbox_head'), f'detector {type(model).__name__} has no bbox_head')
            self.dense = DenseHead(model.bbox_head, model.test_cfg)
            self.cfg = model.test_cfg

    def forward(self, image: Tensor) -> Outputs:
        given = corners(*image.shape[2:])
        image = self.resize(image)
        limit = corners(*image.shape[2:])
        features = self.model.extract_feat(self.preprocess(image))
        found = self.dense(features, limit)
        candidates = found.raw
        if self.roi_head is not None:
            cfg = self.dense.cfg
            kept = found.suppressed(cfg['nms'], cfg['max_per_img'])
            there = kept >= 0
            rois = torch.where(there[:, None], found.boxes[kept.clamp(min=0)], 0.0)
            found = self.roi_head(features, rois, there, limit)
        kept = found.suppressed(self.cfg['nms'], self.cfg['max_per_img'])
        kept = kept[(kept >= 0).nonzero()[:, 0]]
        boxes, scores, labels = (values[kept] for values in found[:3])
        outputs = dict(boxes=boxes, scores=scores, labels=labels)
        if self.roi_head is not None and len(self.roi_head.mask_heads):
            outputs['masks'] = self.roi_head.masks(features, boxes, labels)
        if self.resize.rule is not None:
            outputs['boxes'] = boxes / (limit / given)
        outputs['candidate_scores'] = candidates
        return outputs


class WholeSegmentor(Network):
    """Segmentor from RGB images (B, 3, H, W) and a size (2,), height and width, to labels.

    The size is that of the images before resizing. Labels (B, height, width), or logits
    (B, classes, height, width), have that size.

    Args:
        model (nn.Module): of MMSegmentation.
        logits: return logits instead of labels.
        resize (dict, optional): rule of :class:`.Resize`; the size is then the images' own, and
            not an input.
    """

    def __init__(self, model: nn.Module, logits: bool, resize: Optional[dict] = None):
        super().__init__(model)
        self.as_logits = logits
        mode = model.test_cfg.get('mode', 'whole')
        need(mode == 'whole', f"test_cfg.mode must be 'whole', found '{mode}'")
        divisor = (getattr(model.data_preprocessor, 'test_cfg', None) or {}).get('size_divisor')
        self.resize = Resize(resize)
        self.preprocess = Preprocessor(model, divisor or 1)
        self.any_size = any_size_upsampling(model)

    def logits(self, image: Tensor, size: Optional[Tensor] = None) -> Tensor:
        if size is None:
            sides = [torch.scalar_tensor(side, dtype=torch.int64) for side in image.shape[2:]]
            size = torch.stack(sides)
        image = self.resize(image)
        sides = image.shape[2:]
        logits = upsampled_logits(self.model, self.preprocess(image))
        return resize(logits[:, :, : sides[0], : sides[1]], size, self.model.align_corners)

    def forward(self, image: Tensor, size: Optional[Tensor] = None) -> Outputs:
        logits = self.logits(image, size)
        if self.as_logits:
            return dict(logits=logits)
        if self.model.out_channels == 1:
            labels = logits[:, 0].sigmoid() > self.model.decode_head.threshold
            return dict(labels=labels.long())
        return dict(labels=logits.argmax(1))


class WholeClassifier(Network):
    """Classifier from RGB images (B, 3, H, W) to scores (B, classes) that sum up to 1.

    Args:
        model (nn.Module): of MMPretrain.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        head = type(getattr(model, 'head', None)).__name__
        need(
            type(model).__name__ == 'ImageClassifier' and head == 'LinearClsHead',
            f'a classifier must be an ImageClassifier with a LinearClsHead, found '
            f'{type(model).__name__} with {head}',
        )
        self.preprocess = Preprocessor(model, model.data_preprocessor.pad_size_divisor)

    def forward(self, image: Tensor) -> Outputs:
        return dict(scores=self.model(self.preprocess(image), mode='tensor').softmax(1))


def upsampled_logits(model: nn.Module, image: Tensor) -> Tensor:
    """Return the logits of a model of MMSegmentation in the size of its image."""
    logits = model(image, mode='tensor')
    return F.interpolate(
        logits, image.shape[2:], mode='bilinear', align_corners=model.align_corners
    )


def any_size_upsampling(model: nn.Module) -> dict:
    """Return the modules of MMSegmentation that fix sizes, with their replacements."""
    from mmseg.models.utils import Upsample

    class AnySizeUpsample(Upsample):  # in the head of Semantic FPN
        def forward(self, x: Tensor) -> Tensor:
            size = [side * int(self.scale_factor) for side in x.shape[-2:]]
            return F.interpolate(x, size, None, self.mode, self.align_corners)

    whole = all(
        not module.size and module.scale_factor == int(module.scale_factor)
        for module in model.modules()
        if isinstance(module, Upsample)
    )
    return {Upsample: AnySizeUpsample} if whole else {}
