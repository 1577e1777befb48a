_base_ = './cf_s_300e.py'

model = dict(backbone=dict(arch='b'))
