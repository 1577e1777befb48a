_base_ = './cfpp_s_300e.py'

model = dict(
    backbone=dict(arch='pp-b'), neck=dict(in_channels=768), head=dict(in_channels=768))
