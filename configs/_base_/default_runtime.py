# What every training and test shares. detection.py, segmentation.py and classification.py add the
# library's own visualizer and way of counting.
custom_imports = dict(imports=['crossformer_mm'])

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))  # tools/train.py takes gloo where there is no GPU

vis_backends = [dict(type='LocalVisBackend')]
log_level = 'INFO'
load_from = None
resume = False
