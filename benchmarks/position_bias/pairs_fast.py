# pairs.py for a table or a map: each of their values is learnt by itself, and in 250 iterations at
# the rate that suits an MLP they get nowhere.
_base_ = ['pairs.py']

positions = dict(lr_mult=20, decay_mult=0)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'attn.pos': positions, 'absolute_pos': positions})
)
