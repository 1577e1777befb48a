_base_ = './cfpp_s_300e.py'

model = dict(
    backbone=dict(arch='pp-l'), neck=dict(in_channels=1024), head=dict(in_channels=1024))
