# A baseline: cf_s_1x.py with MMDetection's PVT-Medium. Pretrained weights, as PVT's authors
# released them:
#   --cfg-options model.backbone.init_cfg.checkpoint=pvt_medium.pth
_base_ = './cf_s_1x.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='PyramidVisionTransformer',
        num_layers=(3, 4, 18, 3),
        convert_weights=True,  # from the names of PVT's authors
        init_cfg=None),
    neck=dict(in_channels=[64, 128, 320, 512]))
