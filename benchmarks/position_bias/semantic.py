# The study's segmentor: Semantic FPN, small and from scratch, on generated shapes.
_base_ = ['../../configs/semantic_fpn/cf_s_80k.py']

side = 64  # of the images in training; at which every group is of its stage's group size
model = dict(
    data_preprocessor=dict(size=None, size_divisor=16),
    backbone=dict(
        # Three stages on maps of 16, 8 and 4 positions a side; both kinds of attention in each.
        # 64 channels: a dynamic position bias is channels / 16 wide, with the T model's width.
        arch=dict(_delete_=True, embed_dims=48, depths=(2, 2, 2), num_heads=(2, 4, 8)),
        merge_sizes=((2, 4), (2, 4)),
        group_size=(4, 4, 4),
        interval=(4, 2, 1),
        out_indices=(0, 1, 2),
        out_norm=True),
    neck=dict(in_channels=[48, 96, 192], out_channels=32, num_outs=3, norm_cfg=dict(type='BN')),
    decode_head=dict(
        in_channels=[32, 32, 32],
        in_index=[0, 1, 2],
        feature_strides=[4, 8, 16],
        channels=32,
        norm_cfg=dict(type='BN'),
        num_classes=5))

dataset = dict(
    type='BaseSegDataset',
    data_root='data/shapes/ade',
    img_suffix='.jpg',
    seg_map_suffix='.png',
    reduce_zero_label=True,
    metainfo=dict(
        classes=('background', 'disk', 'square', 'triangle', 'star'),
        palette=[(0, 0, 0), (220, 60, 60), (60, 180, 75), (0, 130, 200), (245, 130, 48)]))
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
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        **dataset,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=300, val_interval=100000)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=30, end=300),
]
optim_wrapper = dict(
    optimizer=dict(lr=4e-3), clip_grad=dict(max_norm=5))
