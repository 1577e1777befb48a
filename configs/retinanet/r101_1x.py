# Pretrained weights: torchvision's resnet101-*.pth, in the same way.
_base_ = './r50_1x.py'

model = dict(backbone=dict(depth=101))
