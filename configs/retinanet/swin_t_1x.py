# A baseline: cf_s_1x.py with MMDetection's Swin-T. Pretrained weights, as Swin's authors released
# them:
#   --cfg-options model.backbone.init_cfg.checkpoint=swin_tiny_patch4_window7_224.pth
_base_ = './cf_s_1x.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=7,
        drop_path_rate=0.2,
        out_indices=(1, 2, 3),
        convert_weights=True,  # from the names of Swin's authors
        init_cfg=None))
