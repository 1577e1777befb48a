# 300 epochs, AdamW, batch 1024 (8 GPUs x 128): DeiT's recipe with the authors' 20 epochs of warm-up
# and their clipping of gradients. Mixup, CutMix and label smoothing are in models/classifier.py,
# RandAugment and random erasing in datasets/imagenet.py. Repeated augmentation, which DeiT has, is
# left out, as in the authors' code and in MMPretrain's DeiT configs.
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=300, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-3,
        by_epoch=True,
        begin=0,
        end=20,
        convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=20, end=300),
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.),
    clip_grad=dict(max_norm=5.0))

# DeiT keeps an average of the weights with decay 0.99996 beside them. As in MMPretrain's DeiT-B
# config, the average is what is validated, tested, published and used as pretrained weights; the
# weights behind it stay in the checkpoint (`ema_state_dict`), for --resume. It is an average over
# the last 25,000 iterations or so, and says little for the first 20 epochs. MMPretrain's own hook
# could not start from a checkpoint with a head for other classes.
custom_hooks = [dict(type='mmengine.EMAHook', momentum=4e-5, priority='ABOVE_NORMAL')]

auto_scale_lr = dict(enable=False, base_batch_size=1024)
