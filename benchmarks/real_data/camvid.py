# UPerNet on 367 + 101 street scenes (CamVid). Their folder: --data-root DIR.
_base_ = '../../configs/upernet/cf_s_160k.py'

num_classes, void = 11, 11
scale = (192, 144)
model = dict(
    data_preprocessor=dict(size=None, size_divisor=32, seg_pad_val=void),
    decode_head=dict(channels=64, num_classes=num_classes, ignore_index=void),
    auxiliary_head=dict(channels=32, num_classes=num_classes, ignore_index=void),
)

dataset = dict(
    type='BaseSegDataset',
    data_root='data/camvid',
    img_suffix='.jpg',
    seg_map_suffix='.png',
    ignore_index=void,
    reduce_zero_label=False,
    metainfo=dict(
        classes=(
            'sky',
            'building',
            'pole',
            'road',
            'pavement',
            'tree',
            'sign',
            'fence',
            'car',
            'pedestrian',
            'bicyclist',
        ),
        palette=[
            (128, 128, 128),
            (128, 0, 0),
            (192, 192, 128),
            (128, 64, 128),
            (60, 40, 222),
            (128, 128, 0),
            (192, 128, 128),
            (64, 64, 128),
            (64, 0, 128),
            (64, 64, 0),
            (0, 128, 192),
        ],
    ),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        **dataset,
        data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        **dataset,
        data_prefix=dict(img_path='images/val', seg_map_path='annotations/val'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ignore_index=void)
test_evaluator = val_evaluator

iterations = 900  # 4.9 epochs
train_cfg = dict(max_iters=iterations, val_interval=180)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=0, end=iterations),
]
optim_wrapper = dict(optimizer=dict(weight_decay=0.05, fused=True), clip_grad=dict(max_norm=1.0))
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=180, max_keep_ckpts=1))
