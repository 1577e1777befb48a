"""Hooks and runners of crossformer_mm.engine under MMDetection's own tools/train.py."""

import shutil
from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config

from crossformer_mm.checkpoint import CheckpointError
from crossformer_mm.engine import DataError

from ..helpers import NO_VALIDATION, ROOT, Marker, needs_bfloat16, run_as_main
from ..trainings import ONE_STAGE, assert_same_training, write_config
from .spoilt_data import truncate

MMDETECTIONS = Path(mmdet.__file__).parent / '.mim' / 'tools' / 'train.py'
WHOLE = dict(runner_type='CarefulRunner')
# The same for MMEngine's own runner, in pieces.
HOOKS = ('SafeLoadingHook', 'SeedHook', 'CheckDataHook', 'WholeFilesHook', 'CheckWeightsHook')
HOOKS += ('NonFiniteHook', 'PreemptionHook', 'ResumeHook')
PIECES = dict(custom_hooks=[dict(type=name) for name in HOOKS])
SAMPLER = "train_dataloader['sampler'] = dict(type='CountedSampler')\n"


def train(*arguments) -> None:
    """MMDetection's tool, in this process for speed; what it ends in is raised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        run_as_main(MMDETECTIONS, *arguments)


def write(folder: Path, data: Path, lines: str = '', **changes) -> Path:
    path = folder / 'any_tool.py'
    return write_config(ONE_STAGE, path, data, lines, **NO_VALIDATION, **changes)


def leave_killed(checkpoint: Path, work: Path) -> None:
    """Make a work folder as a kill leaves it: MMEngine goes on from what last_checkpoint names."""
    work.mkdir()
    shutil.copy(checkpoint, work)
    (work / 'last_checkpoint').write_text(str(work / checkpoint.name))


# A user's config in pure Python, with classes for types and no scope.
LAZY = '''
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, RandomFlip, Resize
from mmdet.evaluation import CocoMetric
from mmdet.models import DetDataPreprocessor, FCOS, FCOSHead, FPN
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, TestLoop
from torch.optim import AdamW

from crossformer_mm import CrossFormer

default_scope = None
model = dict(
    type=FCOS,
    data_preprocessor=dict(type=DetDataPreprocessor, pad_size_divisor=32),
    backbone=dict(type=CrossFormer, out_norm=True, arch=dict(
        embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), drop_path_rate=0.3)),
    neck=dict(type=FPN, in_channels=[16, 32, 64, 128], out_channels=16, num_outs=5),
    bbox_head=dict(type=FCOSHead, num_classes=4, in_channels=16, feat_channels=16,
                   stacked_convs=1, norm_cfg=None),
    test_cfg=dict(nms_pre=100, min_bbox_size=0, score_thr=0.0, max_per_img=10,
                  nms=dict(type='nms', iou_threshold=0.5)))
dataset = dict(type=CocoDataset, data_root=DATA + '/coco/', metainfo=dict(
    classes=('disk', 'square', 'triangle', 'star')))
load = [
    dict(type=LoadImageFromFile), dict(type=LoadAnnotations, with_bbox=True),
    dict(type=Resize, scale=(48, 48), keep_ratio=True)]
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type=DefaultSampler, shuffle=True), dataset=dict(
        **dataset, ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        pipeline=[*load, dict(type=RandomFlip, prob=0.5), dict(type=PackDetInputs)]))
meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
test_dataloader = dict(
    num_workers=0, sampler=dict(type=DefaultSampler, shuffle=False), dataset=dict(
        **dataset, ann_file='annotations/instances_val2017.json', test_mode=True,
        data_prefix=dict(img='val2017/'),
        pipeline=[*load, dict(type=PackDetInputs, meta_keys=meta_keys)]))
test_evaluator = dict(type=CocoMetric, metric='bbox',
                      ann_file=DATA + '/coco/annotations/instances_val2017.json')
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=2)
test_cfg = dict(type=TestLoop)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=AdamW, lr=1e-3))
default_hooks = dict(checkpoint=dict(type=CheckpointHook, interval=1))
randomness = dict(seed=0)
'''


@pytest.mark.parametrize(
    'changes, lines', [(WHOLE, ''), (PIECES, SAMPLER)], ids=['runner', 'hooks']
)
def test_resumed_under_mmdetections_tool_it_is_the_same_training(data, tmp_path, changes, lines):
    keep_all = dict(checkpoint=dict(max_keep_ckpts=-1))
    config = write(tmp_path, data, lines, default_hooks=keep_all, **changes)
    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    train(config, '--work-dir', whole)
    leave_killed(whole / 'epoch_1.pth', resumed)
    train(config, '--work-dir', resumed, '--resume')
    assert_same_training(whole / 'epoch_2.pth', resumed / 'epoch_2.pth')
    assert not list(resumed.glob('*.part'))


def test_mid_epoch_mmengines_loop_is_refused_and_ours_resumes(data, tmp_path):
    each = dict(checkpoint=dict(by_epoch=False, interval=1, max_keep_ckpts=-1))
    config = write(tmp_path, data, SAMPLER, default_hooks=each, **PIECES)
    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    train(config, '--work-dir', whole)
    leave_killed(whole / 'iter_3.pth', resumed)
    with pytest.raises(CheckpointError, match="train_cfg the type 'ResumableTrainLoop'"):
        train(config, '--work-dir', resumed, '--resume')
    with open(config, 'a') as file:
        file.write("train_cfg = dict(_delete_=True, type='ResumableTrainLoop', max_epochs=2)\n")
    train(config, '--work-dir', resumed, '--resume')
    assert_same_training(whole / 'iter_4.pth', resumed / 'iter_4.pth')


@pytest.mark.parametrize(
    'changes',
    [WHOLE, dict(custom_hooks=[dict(type='SafeLoadingHook')])],
    ids=['runner', 'hook alone'],
)
def test_under_mmdetections_tool_nothing_in_a_checkpoint_is_run(data, tmp_path, changes):
    marker, file = tmp_path / 'marker', tmp_path / 'bad.pth'
    torch.save(dict(state_dict={}, extra=Marker(marker)), file)
    config = write(tmp_path, data, load_from=str(file), **changes)
    with pytest.raises(CheckpointError, match='was not run'):
        train(config, '--work-dir', tmp_path / 'work')
    assert not marker.exists()


@pytest.mark.parametrize(
    'hook, content, expected',
    [
        (
            'CheckWeightsHook',
            dict(state_dict={'other.weight': torch.ones(1)}),
            'holds nothing of this model',
        ),
        ('SafeLoadingHook', dict(meta={}), 'holds no weights'),
    ],
)
def test_a_checkpoint_that_another_tool_has_found_is_named(data, tmp_path, hook, content, expected):
    file, work = tmp_path / 'epoch_1.pth', tmp_path / 'work'
    torch.save(content, file)
    leave_killed(file, work)
    config = write(tmp_path, data, custom_hooks=[dict(type=hook)])
    with pytest.raises(CheckpointError, match=f"'{work / file.name}' {expected}"):
        train(config, '--work-dir', work, '--resume')


def test_the_check_of_data_alone_names_the_file(own_data, tmp_path):
    bad = own_data / 'coco/train2017/000000000002.png'
    truncate(bad)
    config = write(tmp_path, own_data, custom_hooks=[dict(type='CheckDataHook')])
    with pytest.raises(DataError, match=f"Image '{bad}' is cut short or no image."):
        train(config, '--work-dir', tmp_path / 'work')


@pytest.mark.parametrize(
    'options',
    # In bfloat16 PyTorch's gradient of a 3 x 3 convolution of a 1 x 1 map, as these images have in the
    # neck, is not finite on some CPUs.
    [
        [],
        pytest.param(['--allow-non-finite', '--amp', 'bfloat16'], marks=needs_bfloat16),
        ['--tensorboard-samples', 1],
    ],
    ids=['plain', 'bfloat16', 'samples'],
)
def test_the_config_that_a_run_keeps_is_for_any_tool(output_of, data, tmp_path, options):
    epoch = dict(max_epochs=1, val_interval=1)
    path, work = tmp_path / 'kept.py', tmp_path / 'work'
    config = write_config(ONE_STAGE, path, data, train_cfg=epoch, custom_imports=None)
    output_of('train.py', config, '--work-dir', work, *options)
    kept = work / config.name
    # No more than the options ask for, and how that is found.
    for name in ('Careful', 'Counted', "'SeedHook", 'CheckDataHook', 'WholeFiles', 'SafeLoading'):
        assert name not in kept.read_text()
    assert bool(Config.fromfile(kept).custom_imports) == bool(options)
    train(kept, '--work-dir', tmp_path / 'theirs')
    assert (tmp_path / 'theirs' / 'epoch_1.pth').exists()


def test_a_config_in_pure_python_is_like_any_other(output_of, data, tmp_path):
    config = tmp_path / 'lazy.py'
    config.write_text(LAZY.replace('DATA', repr(str(data))))
    work, resumed = tmp_path / 'work', tmp_path / 'resumed'
    output_of('train.py', config, '--work-dir', work)
    output_of('train.py', config, '--work-dir', resumed, '--resume', work / 'epoch_1.pth')
    assert_same_training(work / 'epoch_2.pth', resumed / 'epoch_2.pth')
    output_of('test.py', config, work / 'epoch_2.pth', '--work-dir', work)
    output_of(
        'predict.py', f'{config} {work}/epoch_2.pth {data}/coco/val2017 --out {tmp_path}/predicted'
    )
    assert (tmp_path / 'predicted' / 'results.bbox.json').exists()
