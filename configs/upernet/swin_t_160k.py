# A baseline: cf_s_160k.py with MMSegmentation's Swin-T. Pretrained weights, as MMSegmentation has
# them (or tools/model_converters/swin2mmseg.py of it makes them of those that Swin's authors
# released):
#   --cfg-options model.backbone.init_cfg.checkpoint=swin_tiny_patch4_window7_224.pth
_base_ = './cf_s_160k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=7,
        drop_path_rate=0.3,
        init_cfg=None))
