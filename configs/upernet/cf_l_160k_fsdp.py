# cf_l_160k.py, sharded: tools/dist_train.sh configs/upernet/cf_l_160k_fsdp.py GPUS
_base_ = ['./cf_l_160k.py', '../_base_/fsdp.py']

custom_imports = dict(imports=['crossformer_mm', 'crossformer_mm.engine.sharding'])
