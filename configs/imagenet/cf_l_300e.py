_base_ = './cf_s_300e.py'

model = dict(backbone=dict(arch='l'), neck=dict(in_channels=1024), head=dict(in_channels=1024))
