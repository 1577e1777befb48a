_base_ = './cf_s_1x.py'

model = dict(backbone=dict(arch='pp-s'), neck=dict(in_channels=[64, 128, 256, 512]))
