# Nothing tells attention where tokens are.
_base_ = '../imagenet/cf_s_300e.py'

model = dict(backbone=dict(position_bias='none'))
