# All four scales: the published model.
_base_ = '../imagenet/cf_s_300e.py'

model = dict(backbone=dict(patch_sizes=(4, 8, 16, 32)))
