# The study's segmentor where only positions tell classes apart (pairs_of_disks.py): one stage, so
# that every group of a block has the size of the training, and attention alone sees positions.
_base_ = ['semantic.py']

model = dict(
    data_preprocessor=dict(size_divisor=4),
    backbone=dict(
        # Maps of 16 positions a side. 64 channels: a dynamic position bias of 4, as in the T model.
        arch=dict(_delete_=True, embed_dims=64, depths=(2,), num_heads=(4,)),
        merge_sizes=(),
        group_size=(8,),
        interval=(2,),
        out_indices=(0,)),
    decode_head=dict(
        _delete_=True,
        type='FCNHead',
        in_channels=64,
        in_index=0,
        channels=64,
        num_convs=0,
        concat_input=False,
        dropout_ratio=0.,
        norm_cfg=dict(type='BN'),
        num_classes=5,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)))

train_pipeline = [  # a flip would change the class of an object
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='Resize', scale=(64, 64), keep_ratio=True),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
train_cfg = dict(max_iters=450)
positions = dict(lr_mult=3, decay_mult=0)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'attn.pos': positions, 'absolute_pos': positions}))
