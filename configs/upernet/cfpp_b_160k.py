_base_ = './cf_s_160k.py'

model = dict(backbone=dict(arch='pp-b'))
