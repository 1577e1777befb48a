_base_ = [
    '../_base_/models/retinanet.py', '../_base_/datasets/coco_detection.py',
    '../_base_/datasets/coco_detection_tta.py',
    '../_base_/schedules/coco_1x.py', '../_base_/detection.py'
]
