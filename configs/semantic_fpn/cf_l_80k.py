_base_ = './cf_s_80k.py'

model = dict(backbone=dict(arch='l'), neck=dict(in_channels=[128, 256, 512, 1024]))
