# The MLP of the position bias with residual connections.
_base_ = '../imagenet/cf_s_300e.py'

model = dict(backbone=dict(position_bias='dynamic_residual'))
