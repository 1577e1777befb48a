# cfpp_b_1x.py, sharded: tools/dist_train.sh configs/mask_rcnn/cfpp_b_1x_fsdp.py GPUS
_base_ = ['./cfpp_b_1x.py', '../_base_/fsdp.py']

custom_imports = dict(imports=['crossformer_mm', 'crossformer_mm.engine.sharding'])
