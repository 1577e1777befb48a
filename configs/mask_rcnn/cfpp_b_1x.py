_base_ = './cf_s_1x.py'

model = dict(backbone=dict(arch='pp-b'))
