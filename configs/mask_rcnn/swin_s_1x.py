# Pretrained weights: swin_small_patch4_window7_224.pth, in the same way.
_base_ = './swin_t_1x.py'

model = dict(backbone=dict(depths=(2, 2, 18, 2)))
