"""Networks as modules, from normalised images to features, logits or raw outputs of heads."""

from torch import Tensor, nn

from .models import Network, Outputs, any_size_upsampling, upsampled_logits


class Backbone(Network):
    """Backbone from images (B, C, H, W) to features."""

    def forward(self, image: Tensor) -> Outputs:
        return {
            f'feature_{stage}': feature
            for stage, feature in zip(self.model.out_indices, self.model(image))
        }


class Segmentor(Network):
    """Segmentor from images (B, C, H, W) to logits (B, classes, H, W) or a label map (B, H, W)."""

    def __init__(self, model: nn.Module, label_map: bool):
        super().__init__(model)
        self.label_map = label_map
        self.any_size = any_size_upsampling(model)

    def logits(self, image: Tensor) -> Tensor:
        return upsampled_logits(self.model, image)

    def forward(self, image: Tensor) -> Outputs:
        logits = self.logits(image)
        return dict(label_map=logits.argmax(1)) if self.label_map else dict(logits=logits)


class Detector(Network):
    """Detector from images (B, C, H, W) to the outputs of its head, or of its RPN and neck."""

    def forward(self, image: Tensor) -> Outputs:
        features = self.model.extract_feat(image)
        if getattr(self.model, 'with_rpn', False):
            levels = [*self.model.rpn_head(features), features]
            kinds = ['rpn_cls_score', 'rpn_bbox_pred', 'neck']
        else:
            levels = self.model.bbox_head(features)
            kinds = ['cls_score', 'bbox_pred', *(f'head_{i}' for i in range(2, len(levels)))]
        return {
            f'{kind}_{level}': tensor
            for kind, tensors in zip(kinds, levels)
            for level, tensor in enumerate(tensors)
        }


class Classifier(Network):
    """Classifier from images (B, C, H, W) to logits (B, classes)."""

    def forward(self, image: Tensor) -> Outputs:
        return dict(logits=self.model(image, mode='tensor'))
