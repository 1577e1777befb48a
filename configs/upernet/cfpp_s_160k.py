_base_ = './cf_s_160k.py'

model = dict(
    backbone=dict(arch='pp-s'),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256))
