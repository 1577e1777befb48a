_base_ = './cf_s_80k.py'

model = dict(backbone=dict(arch='b'))
