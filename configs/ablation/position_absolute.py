# A learnt map added to the first embedding, and no position bias.
_base_ = '../imagenet/cf_s_300e.py'

model = dict(backbone=dict(position_bias='absolute'))
