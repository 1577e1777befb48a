# The demo's detector on fewer images, for fewer iterations: benchmarks/pretraining.py.
_base_ = ['../../configs/demo/mask_rcnn_shapes.py']

train_dataloader = dict(batch_size=4)
train_cfg = dict(max_epochs=6, val_interval=1)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=6, convert_to_iter_based=True),
]
