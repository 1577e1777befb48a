# CrossFormer-S as every published COCO and ADE20K 1x / 160k result has it.
# Pretrained weights: name a file in init_cfg.checkpoint, here or with
#   --cfg-options model.backbone.init_cfg.checkpoint=FILE
model = dict(
    backbone=dict(
        type='CrossFormer',
        arch='s',
        group_size=(7, 7, 7, 7),
        interval=(8, 4, 2, 1),
        lda='interval',
        init_cfg=dict(type='Pretrained', checkpoint=None)))
