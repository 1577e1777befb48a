_base_ = [
    '../_base_/models/mask_rcnn.py', '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_1x.py', '../_base_/detection.py'
]
