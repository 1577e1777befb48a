# Long distance attention inside tiles; at 224x224 the same function as attention_interval.py.
_base_ = '../imagenet/cf_s_300e.py'

model = dict(backbone=dict(lda='block'))
