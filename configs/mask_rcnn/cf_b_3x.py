_base_ = './cf_s_3x.py'

model = dict(backbone=dict(arch='b'))
