# Two scales in the first embedding, kernels 4 and 8.
_base_ = '../imagenet/cf_s_300e.py'

model = dict(backbone=dict(patch_sizes=(4, 8)))
