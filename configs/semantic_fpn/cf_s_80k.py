_base_ = [
    '../_base_/models/semantic_fpn.py', '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_80k.py', '../_base_/segmentation.py'
]

model = dict(backbone=dict(group_size=(14, 14, 7, 7), interval=(16, 8, 2, 1)))
