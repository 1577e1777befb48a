# CrossFormer-S as an image classifier. The final norm, the pooling and the linear layer are no part
# of the backbone, so that its weights go into a detector or segmentor as they are.
_base_ = './backbone_s.py'

num_classes = 1000
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        num_classes=num_classes,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
        to_onehot=True),  # what Mixup and CutMix mix
    backbone=dict(out_indices=(3, ), init_cfg=None),
    neck=dict(type='NormedGlobalAveragePooling', in_channels=768),
    head=dict(
        type='LinearClsHead',
        num_classes=num_classes,
        in_channels=768,
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')),
    # One of the two for each batch, each as likely as the other.
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]))
