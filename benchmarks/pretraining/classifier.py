# A small classifier of generated shapes, for benchmarks/pretraining.py: cf_s_300e.py, but for the
# size of all, and without the augmentations, of which a training of minutes has no use.
_base_ = ['../../configs/imagenet/cf_s_300e.py']

num_classes = 16
model = dict(
    data_preprocessor=dict(num_classes=num_classes),
    # As in configs/demo/.
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
    ),
    neck=dict(in_channels=256),
    head=dict(in_channels=256, num_classes=num_classes),
    train_cfg=None,
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomFlip', prob=[0.25, 0.25], direction=['horizontal', 'vertical']),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
dataset = dict(type='CustomDataset', _delete_=True, data_root='work_dirs/pretraining/data/classes')
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(**dataset, data_prefix='train', pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(**dataset, data_prefix='val', pipeline=test_pipeline),
)
test_dataloader = val_dataloader

train_cfg = dict(max_epochs=6)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=6, convert_to_iter_based=True),
]
custom_hooks = [dict(type='mmengine.EMAHook', momentum=0.02, priority='ABOVE_NORMAL')]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(max_keep_ckpts=1))
