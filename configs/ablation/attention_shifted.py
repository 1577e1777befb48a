# Shifted windows in place of long distance attention, as in Swin.
_base_ = '../imagenet/cf_s_300e.py'

model = dict(backbone=dict(lda='shifted'))
