_base_ = [
    '../_base_/models/cascade_mask_rcnn.py', '../_base_/datasets/coco_instance_multiscale.py',
    '../_base_/schedules/coco_3x.py', '../_base_/detection.py'
]

model = dict(backbone=dict(group_size=(14, 14, 7, 7), interval=(16, 8, 2, 1)))
