# One scale: a kernel of 4 in the first embedding, of 2 in the mergings.
_base_ = '../imagenet/cf_s_300e.py'

model = dict(backbone=dict(patch_sizes=(4,), merge_sizes=((2,), (2,), (2,))))
