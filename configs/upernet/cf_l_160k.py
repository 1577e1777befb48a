_base_ = './cf_s_160k.py'

model = dict(
    backbone=dict(arch='l'),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512))
