# Position bias by an MLP of the offset: the published model.
_base_ = '../imagenet/cf_s_300e.py'

model = dict(backbone=dict(position_bias='dynamic'))
