# The study's detector: Mask R-CNN, small and from scratch, on generated shapes. The backbone has
# CrossFormer's overlapping embeddings, which see up to 32 pixels and where the image ends.
_base_ = ['../../configs/demo/mask_rcnn_shapes.py']

side = 64  # as in semantic.py
model = dict(
    data_preprocessor=dict(pad_size_divisor=16),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=48, depths=(2, 2, 2), num_heads=(2, 4, 8)),
        merge_sizes=((2, 4), (2, 4)),
        group_size=(4, 4, 4),
        interval=(4, 2, 1),
        out_indices=(0, 1, 2),
    ),
    neck=dict(in_channels=[48, 96, 192], out_channels=32, num_outs=3),
    rpn_head=dict(
        in_channels=32, feat_channels=32, anchor_generator=dict(scales=[4], strides=[4, 8, 16])
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=32, featmap_strides=[4, 8, 16], roi_layer=dict(output_size=5)
        ),
        bbox_head=dict(
            type='Shared2FCBBoxHead', in_channels=32, fc_out_channels=128, roi_feat_size=5
        ),
        mask_roi_extractor=dict(
            out_channels=32, featmap_strides=[4, 8, 16], roi_layer=dict(output_size=8)
        ),
        mask_head=dict(num_convs=2, in_channels=32, conv_out_channels=32),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=60),
        rcnn=dict(sampler=dict(num=32), mask_size=16),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=150)),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(side, side), keep_ratio=True),
    dict(type='RandomFlip', prob=[0.25, 0.25], direction=['horizontal', 'vertical']),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(side, side), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(sampler=dict(type='InfiniteSampler'), dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=130, val_interval=100000)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=30, end=130),
]
positions = dict(lr_mult=10, decay_mult=0)  # as in semantic.py
optim_wrapper = dict(
    optimizer=dict(lr=1.5e-3),
    clip_grad=dict(max_norm=5),
    paramwise_cfg=dict(custom_keys={'attn.pos': positions, 'absolute_pos': positions}),
)
