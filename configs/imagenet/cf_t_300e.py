_base_ = './cf_s_300e.py'

model = dict(backbone=dict(arch='t'), neck=dict(in_channels=512), head=dict(in_channels=512))
