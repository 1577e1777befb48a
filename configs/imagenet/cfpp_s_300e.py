_base_ = './cf_s_300e.py'

# Group sizes that grow with the stage, and the later definition of long distance attention: the
# published FLOPs of the larger models show both.
model = dict(
    backbone=dict(arch='pp-s', lda='block', group_size=(4, 4, 14, 7), interval=(4, 2, 1, 1)),
    neck=dict(in_channels=512),
    head=dict(in_channels=512))
