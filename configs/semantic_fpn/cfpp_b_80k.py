_base_ = './cf_s_80k.py'

# The one Semantic FPN whose published FLOPs show the groups of the other tasks.
model = dict(backbone=dict(arch='pp-b', group_size=(7, 7, 7, 7), interval=(8, 4, 2, 1)))
