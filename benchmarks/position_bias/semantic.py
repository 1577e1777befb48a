# The study's segmentor, small and from scratch, on generated shapes. Attention alone can tell it
# where things are: patches and mergings do not overlap, so nothing is padded with zeros either,
# and the head has 1 x 1 convolutions only.
_base_ = ['../../configs/semantic_fpn/cf_s_80k.py']

side = 64  # of the images in training; at which every group is of its stage's group size
model = dict(
    data_preprocessor=dict(size=None, size_divisor=16),
    backbone=dict(
        # Three stages on maps of 16, 8 and 4 positions a side; both kinds of attention in each.
        arch=dict(_delete_=True, embed_dims=48, depths=(2, 2, 2), num_heads=(2, 4, 8)),
        patch_sizes=(4,),
        merge_sizes=((2,), (2,)),
        group_size=(4, 4, 4),
        interval=(4, 2, 1),
        out_indices=(0, 1, 2),
        out_norm=True,
    ),
    neck=None,
    decode_head=dict(
        _delete_=True,
        type='SegformerHead',
        in_channels=[48, 96, 192],
        in_index=[0, 1, 2],
        channels=64,
        dropout_ratio=0.1,
        norm_cfg=dict(type='BN'),
        num_classes=5,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
)

dataset = dict(
    type='BaseSegDataset',
    data_root='data/shapes/ade',
    img_suffix='.jpg',
    seg_map_suffix='.png',
    reduce_zero_label=True,
    metainfo=dict(
        classes=('background', 'disk', 'square', 'triangle', 'star'),
        palette=[(0, 0, 0), (220, 60, 60), (60, 180, 75), (0, 130, 200), (245, 130, 48)],
    ),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='Resize', scale=(side, side), keep_ratio=True),
    dict(type='RandomFlip', prob=[0.25, 0.25], direction=['horizontal', 'vertical']),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(side, side), keep_ratio=True),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        **dataset,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        **dataset,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=200, val_interval=100000)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=30, end=200),
]
# Positions learn ten times as fast: in so few iterations they would hardly leave 0 otherwise.
positions = dict(lr_mult=10, decay_mult=0)
optim_wrapper = dict(
    optimizer=dict(lr=2e-3),
    clip_grad=dict(max_norm=5),
    paramwise_cfg=dict(custom_keys={'attn.pos': positions, 'absolute_pos': positions}),
)
