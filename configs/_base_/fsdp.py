# Sharded training by PyTorch's FSDP: each process keeps its part of parameters, gradients and the
# optimizer's state, and gathers one CrossFormer block at a time. Blocks are recomputed in the
# backward pass, as by model.backbone.with_cp=True. See docs/distributed.md.
runner_type = 'FlexibleRunner'
strategy = dict(
    type='ShardedStrategy',
    model_wrapper=dict(
        type='MMFullyShardedDataParallel', auto_wrap_policy='wrap_crossformer_blocks'),
    activation_checkpointing=dict(check_fn='is_crossformer_block'),
    state_dict_cfg='full')  # one file, which any tool reads; 'local': a folder of parts
