# Long distance attention over the whole map: the published model.
_base_ = '../imagenet/cf_s_300e.py'

model = dict(backbone=dict(lda='interval'))
