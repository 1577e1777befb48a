# A baseline: cf_s_1x.py with MMDetection's ResNet-50, frozen as there. Pretrained weights, as
# torchvision has them:
#   --cfg-options model.backbone.init_cfg.checkpoint=resnet50-0676ba61.pth
# From random weights, nothing should be frozen: frozen_stages=-1, norm_eval=False.
_base_ = './cf_s_1x.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=50,
        out_indices=(1, 2, 3),
        frozen_stages=1,
        norm_eval=True,
        init_cfg=None),
    neck=dict(in_channels=[512, 1024, 2048]))
