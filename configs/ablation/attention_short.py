# Short distance attention in every block.
_base_ = '../imagenet/cf_s_300e.py'

model = dict(backbone=dict(lda='none'))
