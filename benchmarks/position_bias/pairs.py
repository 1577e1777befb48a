# The study's segmentor where only positions tell classes apart (pairs_of_disks.py): one stage, so
# that every group of a block has the size of the training, and attention alone sees positions.
_base_ = ['semantic.py']

model = dict(
    data_preprocessor=dict(size_divisor=4),
    backbone=dict(
        # Maps of 16 positions a side. 128 channels, for a dynamic position bias of width 8: one of
        # 2, 3 or 4 (of 32, 48 or 64 channels) learns nothing in this time, or much less.
        arch=dict(_delete_=True, embed_dims=128, depths=(2,), num_heads=(8,)),
        merge_sizes=(),
        group_size=(8,),
        interval=(2,),
        out_indices=(0,),
    ),
    decode_head=dict(
        _delete_=True,
        type='FCNHead',
        in_channels=128,
        in_index=0,
        channels=128,
        num_convs=0,
        concat_input=False,
        dropout_ratio=0.0,
        norm_cfg=dict(type='BN'),
        num_classes=5,
        align_corners=False,
        init_cfg=dict(type='Normal', std=0.05, override=dict(name='conv_seg')),
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
)

train_pipeline = [  # a flip would change the class of an object
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='Resize', scale=(64, 64), keep_ratio=True),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
train_cfg = dict(max_iters=250)
positions = dict(lr_mult=5, decay_mult=0)
optim_wrapper = dict(
    optimizer=dict(lr=1.5e-3),
    paramwise_cfg=dict(custom_keys={'attn.pos': positions, 'absolute_pos': positions}),
)
