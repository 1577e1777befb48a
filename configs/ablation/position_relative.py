# A learnt table of position biases, as in Swin.
_base_ = '../imagenet/cf_s_300e.py'

model = dict(backbone=dict(position_bias='relative'))
