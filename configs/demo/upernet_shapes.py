# The demo's segmentor: cf_s_160k.py, small and from scratch, on generated shapes.
_base_ = ['../upernet/cf_s_160k.py']

num_classes = 5
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(
        # As in mask_rcnn_shapes.py.
        arch=dict(_delete_=True, embed_dims=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)),
        out_norm=True),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=64, num_classes=num_classes),
    auxiliary_head=dict(in_channels=128, channels=32, num_classes=num_classes))

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
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
    dict(type='RandomFlip', prob=[0.25, 0.25], direction=['horizontal', 'vertical']),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader

# Evaluated by tools/test.py once it is trained.
train_cfg = dict(max_iters=400, val_interval=401)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=50, end=400),
]
optim_wrapper = dict(optimizer=dict(lr=3e-3))
default_hooks = dict(
    logger=dict(interval=10), checkpoint=dict(interval=100, max_keep_ckpts=1))
work_dir = 'work_dirs/demo/upernet'
randomness = dict(seed=0)
