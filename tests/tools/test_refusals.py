"""What cannot work ends a tool with one sentence, before long work.

Here is what needs no files but those of the repository; more is in the tests of each tool.
"""

import pytest
import torch

from crossformer_mm.compat import EXPORT

from ..helpers import CLASSIFIER, DEMO_DETECTOR, needs_torch, refusals

REFUSED = '''
# missing
train.py -> required: config
test.py DETECTOR -> required: checkpoint
get_flops.py -> required: config
publish_model.py README.md -> give the file to write, or --hub DIR.
make_shapes.py -> required: out

# unknown
train.py DETECTOR --ampp -> unrecognized arguments: --ampp
test.py DETECTOR x.pth --resume -> unrecognized arguments: --resume
get_flops.py DETECTOR --device cuda -> unrecognized arguments: --device cuda
get_flops.py DETECTOR --cfg-options a=1 -> unrecognized arguments: --cfg-options
publish_model.py x.pth y.pth -z -> unrecognized arguments: -z
make_shapes.py x --test 3 -> unrecognized arguments: --test 3
demo.py --fast -> unrecognized arguments: --fast

# configs
train.py configs/none.py -> config 'configs/none.py' does not exist.
train.py configs/_base_/schedules/coco_1x.py -> has default_scope None
train.py configs/_base_/default_runtime.py -> has default_scope None
train.py configs/_base_/segmentation.py -> has no model.
get_flops.py none.py -> config 'none.py' does not exist.
get_flops.py README.md -> config 'README.md' could not be read
sweep_groups.py configs/none.py README.md -> config 'configs/none.py' does not exist.
sweep_groups.py configs/mask_rcnn/swin_t_1x.py README.md -> has the backbone SwinTransformer, no CrossFormer.

# files and folders
train.py DETECTOR --resume none.pth -> --resume: file 'none.pth' does not exist.
train.py DETECTOR --cfg-options model.backbone.init_cfg.checkpoint=none.pth -> model.backbone.init_cfg.checkpoint: file 'none.pth' does not exist.
train.py configs/mask_rcnn/swin_t_1x.py --cfg-options model.backbone.init_cfg.checkpoint=none.pth -> model.backbone.init_cfg.checkpoint: file 'none.pth' does not exist.
train.py configs/mask_rcnn/cf_s_1x.py --data-root nowhere -> the train dataset is not there: 'ROOT/nowhere' does not exist
train.py configs/upernet/cf_s_160k.py --data-root nowhere -> the train dataset is not there: 'ROOT/nowhere' does not exist
train.py IMAGENET -> the train dataset is not there: 'ROOT/data/imagenet' does not exist
test.py IMAGENET README.md -> the test dataset is not there: 'ROOT/data/imagenet' does not exist
test.py DETECTOR none.pth -> checkpoint: file 'none.pth' does not exist.
sweep_groups.py SEGMENTOR none.pth -> checkpoint: file 'none.pth' does not exist.
sweep_groups.py SEGMENTOR README.md --data-root nowhere -> the test dataset is not there
publish_model.py none.pth x.pth -> file 'none.pth' does not exist.
publish_model.py README.md x.pth -> Checkpoint 'README.md' could not be read
publish_model.py README.md x.doc -> 'x.doc' must end in
publish_model.py README.md none/x.pth -> folder 'none' does not exist.
make_shapes.py README.md -> out: 'README.md' is a file
make_shapes.py /proc/none -> out: '/proc/none' could not be written
test.py DETECTOR README.md --out x.json -> must end in .pkl
test.py IMAGENET README.md --out x.json -> 'x.json' must end in .pkl for a classifier.

# values
train.py DETECTOR --tensorboard-samples 0 -> --tensorboard-samples must be at least 1, got 0.
train.py DETECTOR --launcher torch -> invalid choice: 'torch'
train.py DETECTOR --launcher pytorch -> --launcher pytorch: RANK is not set
test.py DETECTOR README.md --launcher slurm -> SLURM_PROCID is not set
test.py DETECTOR README.md --tta -> defines no test-time augmentation
test.py IMAGENET README.md --tta -> defines no test-time augmentation
predict.py IMAGENET README.md x.jpg --out x -> has default_scope 'mmpretrain', allowed are 'mmdet', 'mmseg'.
get_flops.py DETECTOR --shape 0 9 -> --shape must be two numbers of at least 1, got 0 9.
get_flops.py DETECTOR --shape 9 -> argument --shape: expected 2 arguments
get_flops.py DETECTOR --shape a 5 -> argument --shape: invalid int value: 'a'
make_shapes.py x --train 0 -> --train and --val must be at least 1
make_shapes.py x --seed -1 -> --seed at least 0
sweep_groups.py SEGMENTOR README.md --group-size 7,7 -> CrossFormer: group_size must have one number for each of the 4 stages of depths, got (7, 7)
sweep_groups.py SEGMENTOR README.md --interval 8,4,2,0 -> interval must be whole numbers of at least 1
sweep_groups.py SEGMENTOR README.md --interval 8;4 -> '8;4' is not one whole number for each stage
sweep_groups.py SEGMENTOR README.md --lda tiles -> invalid choice: 'tiles'
sweep_groups.py SEGMENTOR README.md --max-images 0 -> --max-images must be at least 1, got 0.

# keys of --cfg-options, as far from the config's as slips go
train.py DETECTOR --cfg-options foo -> 'foo' is not of the form KEY=VALUE.
train.py DETECTOR --cfg-options model..backbone=3 -> 'model..backbone=3' is not of the form KEY=VALUE.
train.py DETECTOR --cfg-options model.neck.in_channels=[1,(2] -> Imbalanced brackets
train.py DETECTOR --cfg-options model.neck.in_channels.9=3 -> --cfg-options:
train.py DETECTOR --cfg-options modle.backbone.with_cp=True -> no 'modle' in the config, and nothing would read it, did you mean 'model'?
train.py DETECTOR --cfg-options model.backbone.with_pc=True -> did you mean 'model.backbone.with_cp'?
train.py DETECTOR --cfg-options model.rpn_head.loss_cls.los_weight=1 -> did you mean 'model.rpn_head.loss_cls.loss_weig
train.py DETECTOR --cfg-options optim_wrapper.clip_gard.max_norm=1 -> did you mean 'optim_wrapper.clip_grad'?
train.py DETECTOR --cfg-options default_hooks.checkpoint.save_bets=auto -> mean 'default_hooks.checkpoint.save_best'
train.py DETECTOR --cfg-options train_cfg.max_epoch=3 -> did you mean 'train_cfg.max_epochs'?
train.py DETECTOR --cfg-options train_dataloader.num_worker=1 -> did you mean 'train_dataloader.num_workers'?
train.py DETECTOR --cfg-options train_dataloader.dataset.pipeline.9.scale=1 -> has 5 elements, named by 0 to 4
train.py DETECTOR --cfg-options train_dataloader.batch_size.x=1 -> train_dataloader.batch_size is 8, which has no part
train.py DETECTOR --cfg-options colour=red -> there is no 'colour' in the config, and nothing would read it.
train.py IMAGENET --cfg-options model.head.num_clases=3 -> did you mean 'model.head.num_classes'
sweep_groups.py SEGMENTOR README.md --cfg-options model.backbone.with_pc=1 -> mean 'model.backbone.with_cp'

# variables of a config, of which its settings have been made by the time when options are read
train.py DETECTOR --cfg-options data_root=elsewhere -> is a variable of the config file, which has been used by then … train_dataloader.dataset.data_root
train.py SEGMENTOR --cfg-options num_classes=9 -> is a variable of the config file, which has been used by then … model.decode_head.num_classes
train.py configs/upernet/cf_s_160k.py --cfg-options crop_size=(64,64) -> is a variable of the config file, which has been used by then … model.data_preprocessor.size
train.py DETECTOR --cfg-options train_pipeline.0.imdecode_backend=pillow -> is a variable of the config file, which has been used by then … train_dataloader.dataset.pipeline
'''


@pytest.mark.parametrize('command, said', refusals(REFUSED))
def test_what_cannot_work_is_said_in_one_sentence(refusal_of, command, said):
    found = refusal_of(*command.split(maxsplit=1))
    assert all(part in found for part in said.split(' … '))


@needs_torch(EXPORT, 'export of sides that may be 1')
def test_a_classifier_is_not_resized_inside_its_file(refusal_of):
    said = refusal_of('export.py', CLASSIFIER, '--out x.onnx --resize-inside')
    assert '--resize-inside is for whole detectors and segmentors of any size.' in said


@pytest.mark.skipif(torch.cuda.is_available(), reason='here --amp works')
def test_amp_without_gpu_is_refused(refusal_of):
    assert '--amp needs a GPU' in refusal_of('train.py', DEMO_DETECTOR, '--amp')


def test_a_demo_that_cannot_write_says_so_in_one_sentence(refusal_of, tmp_path):
    (tmp_path / 'work_dirs').touch()
    said = refusal_of('demo.py', folder=tmp_path)
    assert said == "work folder: 'work_dirs/demo' cannot be written: Not a directory."
