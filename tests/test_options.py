"""Foolish arguments: every tool ends with one sentence that says what was wrong."""

import argparse
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from mmengine._strategy import SingleDeviceStrategy
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from crossformer_mm import CrossFormer, cli
from crossformer_mm.checkpoint import read_checkpoint, use_safe_loading
from crossformer_mm.engine.config import load_config
from crossformer_mm.engine.overrides import check_keys
from crossformer_mm.errors import UserError

from .test_predict import predict as run_tool
from .test_predict import run_here
from .test_tools import DETECTOR, ROOT, SEGMENTOR, sentence
from .tool_process import load_script
from .trainings import ONE_STAGE, make_data, write_config

RETINANET = 'configs/retinanet/cf_s_1x.py'


@pytest.mark.parametrize(
    'tool, arguments, expected',
    [
        # missing
        ('train.py', [], 'required: config'),
        ('test.py', [DETECTOR], 'required: checkpoint'),
        ('get_flops.py', [], 'required: config'),
        ('publish_model.py', ['README.md'], 'required: out'),
        ('make_shapes.py', [], 'required: out'),
        # unknown
        ('train.py', [DETECTOR, '--ampp'], 'unrecognized arguments: --ampp'),
        ('test.py', [DETECTOR, 'x.pth', '--resume'], 'unrecognized arguments: --resume'),
        ('get_flops.py', [DETECTOR, '--device', 'cuda'], 'unrecognized arguments: --device cuda'),
        ('publish_model.py', ['x.pth', 'y.pth', '-z'], 'unrecognized arguments: -z'),
        ('make_shapes.py', ['x', '--test', '3'], 'unrecognized arguments: --test 3'),
        ('demo.py', ['--fast'], 'unrecognized arguments: --fast'),
        # wrong
        ('train.py', [DETECTOR, '--launcher', 'torch'], "invalid choice: 'torch'"),
        ('train.py', [DETECTOR, '--launcher', 'pytorch'], '--launcher pytorch: RANK is not set'),
        ('test.py', [DETECTOR, 'README.md', '--launcher', 'slurm'], 'SLURM_PROCID is not set'),
        ('get_flops.py', ['none.py'], "config 'none.py' does not exist."),
        ('get_flops.py', ['README.md'], "config 'README.md' could not be read"),
        (
            'get_flops.py',
            [DETECTOR, '--shape', '0', '9'],
            '--shape must be two numbers of at least 1',
        ),
        ('get_flops.py', [DETECTOR, '--shape', '9'], 'argument --shape: expected 2 arguments'),
        ('publish_model.py', ['none.pth', 'x.pth'], "file 'none.pth' does not exist."),
        ('publish_model.py', ['README.md', 'x.pth'], "Checkpoint 'README.md' could not be read"),
        ('publish_model.py', ['README.md', 'x.doc'], "'x.doc' must end in"),
        ('publish_model.py', ['README.md', 'none/x.pth'], "folder 'none' does not exist."),
        ('make_shapes.py', ['x', '--train', '0'], '--train and --val must be at least 1'),
        ('make_shapes.py', ['x', '--seed', '-1'], '--seed at least 0'),
        ('make_shapes.py', ['README.md'], "out: 'README.md' is a file"),
        ('make_shapes.py', ['/proc/none'], "out: '/proc/none' could not be written"),
        ('test.py', [DETECTOR, 'none.pth'], "checkpoint: file 'none.pth' does not exist."),
        ('train.py', ['configs/_base_/default_runtime.py'], 'has default_scope None'),
        ('train.py', ['configs/_base_/segmentation.py'], 'has no model.'),
        # keys of --cfg-options, as far from the config's as slips go
        *(
            ('train.py', [DETECTOR, '--cfg-options', option], said)
            for option, said in [
                ('foo', "'foo' is not of the form KEY=VALUE."),
                ('model..backbone=3', "'model..backbone=3' is not of the form KEY=VALUE."),
                ('model.neck.in_channels=[1,(2]', 'Imbalanced brackets'),
                (
                    'modle.backbone.with_cp=True',
                    "no 'modle' in the config, and nothing would read it, did you mean 'model'?",
                ),
                ('model.backbone.with_pc=True', "did you mean 'model.backbone.with_cp'?"),
                (
                    'model.rpn_head.loss_cls.los_weight=1',
                    "did you mean 'model.rpn_head.loss_cls.loss_weig",
                ),
                ('optim_wrapper.clip_gard.max_norm=1', "did you mean 'optim_wrapper.clip_grad'?"),
                (
                    'default_hooks.checkpoint.save_bets=auto',
                    "mean 'default_hooks.checkpoint.save_best'",
                ),
                ('train_cfg.max_epoch=3', "did you mean 'train_cfg.max_epochs'?"),
                ('train_dataloader.num_worker=1', "did you mean 'train_dataloader.num_workers'?"),
                ('train_dataloader.dataset.pipeline.9.scale=1', 'has 5 elements, named by 0 to 4'),
                (
                    'train_dataloader.batch_size.x=1',
                    'train_dataloader.batch_size is 8, which has no part',
                ),
                ('colour=red', "there is no 'colour' in the config, and nothing would read it."),
            ]
        ),
        (
            'get_flops.py',
            [DETECTOR, '--cfg-options', 'a=1'],
            'unrecognized arguments: --cfg-options',
        ),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(capsys, monkeypatch, tool, arguments, expected):
    assert expected in sentence(capsys, monkeypatch, tool, *arguments)


def test_a_demo_that_cannot_write_says_so_in_one_sentence(tmp_path, capsys):
    (tmp_path / 'work_dirs').touch()
    assert run_here(tmp_path, 'demo.py') == 2
    assert capsys.readouterr().err == (
        "error: work folder: 'work_dirs/demo' cannot be written: Not a directory.\n"
    )


@pytest.mark.parametrize(
    'config, key',
    [
        (DETECTOR, 'model.backbone.with_cp'),
        (DETECTOR, 'model.backbone.arch.drop_path_rate'),
        (DETECTOR, 'model.backbone.init_cfg.checkpoint'),
        (DETECTOR, 'randomness.seed'),
        (DETECTOR, 'optim_wrapper.clip_grad.max_norm'),
        (DETECTOR, 'optim_wrapper.optimizer.eps'),
        (DETECTOR, 'optim_wrapper.paramwise_cfg.norm_decay_mult'),
        (DETECTOR, 'custom_hooks'),
        (DETECTOR, 'default_hooks.checkpoint.save_best'),
        (DETECTOR, 'val_evaluator.classwise'),
        (DETECTOR, 'train_dataloader.dataset.indices'),
        (DETECTOR, 'load_from'),
        (DETECTOR, 'train_dataloader.prefetch_factor'),
        (DETECTOR, 'find_unused_parameters'),
        (DETECTOR, 'model.train_cfg.rcnn.sampler.pos_fraction'),
        (DETECTOR, 'env_cfg.dist_cfg.timeout'),
        (DETECTOR, 'model_wrapper_cfg.static_graph'),
        (SEGMENTOR, 'model.decode_head.sampler.type'),
        (SEGMENTOR, 'model.test_cfg.stride'),
        (SEGMENTOR, 'train_dataloader.dataset.pipeline.2.scale'),
        (RETINANET, 'model.bbox_head.loss_cls.alpha'),
    ],
)
def test_settings_that_are_read_may_be_new_to_the_config(config, key):
    check_keys(Config.fromfile(ROOT / config), {key: 1})


def test_settings_of_another_type_are_those_of_that_type():
    cfg = Config.fromfile(ROOT / DETECTOR)
    momentum = {'optim_wrapper.optimizer.momentum': 0.9}
    check_keys(cfg, {'optim_wrapper.optimizer.type': 'SGD', **momentum})
    with pytest.raises(UserError, match='momentum'):
        check_keys(cfg, momentum)


def test_weights_may_be_named_where_a_config_has_none(tmp_path):
    file, key = tmp_path / 'resnet.pth', 'model.backbone.init_cfg.checkpoint'
    backbones = []
    for options in ({}, {key: str(file)}):
        cfg = load_config('configs/mask_rcnn/r50_1x.py', options)
        init_default_scope('mmdet')
        backbones.append(MODELS.build(cfg.model.backbone))
        if not options:  # as torchvision has it: with a classifier
            torch.save({**backbones[0].state_dict(), 'fc.weight': torch.ones(1)}, file)
    use_safe_loading()
    first, second = backbones
    assert not torch.equal(first.conv1.weight, second.conv1.weight)
    second.init_weights()
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


@pytest.mark.parametrize(
    'options, said',
    [([], True), (['--cfg-options', 'model.backbone.init_cfg.checkpoint=README.md'], False)],
)
def test_training_another_backbone_from_random_weights_is_said(capsys, options, said):
    assert (
        run_here(
            ROOT, 'train.py', 'configs/mask_rcnn/r50_1x.py', '--data-root', 'nowhere', *options
        )
        == 2
    )
    assert ('No pretrained checkpoint is given' in capsys.readouterr().out) == said


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data') / 'shapes', train=2, val=1, size=32)


@pytest.mark.parametrize(
    'option, expected',
    [
        (
            'train_dataloader.batch_size=many',
            "config's train_cfg or train_dataloader cannot be built",
        ),
        ('optim_wrapper.optimizer.lr=fast', "config's optim_wrapper cannot be built"),
        (
            'model.roi_head.bbox_head.num_classes=3',
            'model.roi_head.bbox_head.num_classes = 3 is too '
            'small for the 4 classes of the data set',
        ),
        (
            'val_evaluator.metric=boxes',
            "config's val_cfg, val_dataloader or val_evaluator cannot be",
        ),
        ('model.type=MaskCNN', "config's model cannot be built"),
    ],
)
def test_values_that_cannot_work_name_the_part_of_the_config(
    capsys, monkeypatch, data, tmp_path, option, expected
):
    assert expected in sentence(
        capsys,
        monkeypatch,
        'train.py',
        DETECTOR,
        '--work-dir',
        tmp_path,
        '--data-root',
        data / 'coco',
        '--cfg-options',
        option,
    )


@pytest.mark.parametrize(
    'script, arguments, expected',
    [
        ('dist_train.sh', [DETECTOR], 'usage: '),
        ('dist_test.sh', [DETECTOR, 'x.pth'], 'usage: '),
        (
            'dist_train.sh',
            [DETECTOR, 'two'],
            "error: GPUS must be a whole number of at least 1, got",
        ),
        (
            'dist_test.sh',
            [DETECTOR, 'x.pth', '0'],
            "error: GPUS must be a whole number of at least 1",
        ),
    ],
)
def test_scripts_check_their_arguments(script, arguments, expected):
    done = subprocess.run([ROOT / 'tools' / script, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(expected)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    'script, last, more',
    [('slurm_train.sh', 'work', ['--work-dir', 'work']), ('slurm_test.sh', 'x.pth', ['x.pth'])],
)
def test_a_slurm_job_is_asked_for_as_it_is_with_mmdetection(tmp_path, script, last, more):
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    done = subprocess.run(
        [ROOT / 'tools' / script, 'gpu', 'mine', DETECTOR, last, '--tensorboard'],
        capture_output=True,
        text=True,
        check=True,
        env=dict(PATH=f'{tmp_path}:/bin:/usr/bin', GPUS='16', SRUN_ARGS='--quiet --time=9'),
    )
    assert done.stdout.split() == [
        '-p',
        'gpu',
        '--job-name=mine',
        '--gres=gpu:8',
        '--ntasks=16',
        '--ntasks-per-node=8',
        '--cpus-per-task=5',
        '--kill-on-bad-exit=1',
        '--quiet',
        '--time=9',
        'python',
        '-u',
        str(ROOT / 'tools' / script.replace('slurm_', '').replace('.sh', '.py')),
        DETECTOR,
        *more,
        '--launcher',
        'slurm',
        '--tensorboard',
    ]


@pytest.mark.parametrize(
    'wrong, right',
    [
        ('with_pc', 'with_cp'),
        ('out_index', 'out_indices'),
        ('group_sizes', 'group_size'),
        ('frozen_stage', 'frozen_stages'),
        ('drop_path', 'drop_path_rate'),
        ('LDA', 'lda'),
    ],
)
def test_a_misspelt_option_of_the_backbone_names_the_nearest(wrong, right):
    with pytest.raises(
        TypeError,
        match=f"CrossFormer: there is no option '{wrong}', did you mean "
        rf"'{right}'\?",
    ):
        CrossFormer('s', **{wrong: 1})


def test_an_option_like_no_other_lists_them_all():
    with pytest.raises(TypeError, match='choose from arch, in_channels, .*attention_path'):
        CrossFormer('s', zzz=1)


def test_a_misspelt_option_in_a_config_names_the_nearest():
    init_default_scope('mmdet')
    with pytest.raises(TypeError, match="did you mean 'interval'"):
        MODELS.build(dict(type='CrossFormer', intervals=(1, 1, 1, 1)))


# Variables of a config, which its settings have been made of by the time when options are read


@pytest.mark.parametrize(
    'config, option, used',
    [
        (DETECTOR, 'data_root=elsewhere', 'train_dataloader.dataset.data_root'),
        (SEGMENTOR, 'num_classes=9', 'model.decode_head.num_classes'),
        ('configs/upernet/cf_s_160k.py', 'crop_size=(64,64)', 'model.data_preprocessor.size'),
        (DETECTOR, 'train_pipeline.0.imdecode_backend=pillow', 'train_dataloader.dataset.pipeline'),
    ],
)
def test_a_variable_of_the_config_is_refused_with_where_it_is_used(
    capsys, monkeypatch, config, option, used
):
    said = sentence(capsys, monkeypatch, 'train.py', config, '--cfg-options', option)
    assert 'is a variable of the config file, which has been used by then' in said and used in said


@pytest.mark.parametrize(
    'name, near',
    [
        ('train_dataloder', 'train_dataloader'),
        ('train_loader', 'train_dataloader'),
        ('eval_cfg', 'val_cfg'),
        ('text_cfg', 'test_cfg'),
        ('optimizer_wrapper', 'optim_wrapper'),
    ],
)
def test_a_variable_named_like_a_setting_is_warned_of_and_works(capsys, tmp_path, name, near):
    config = tmp_path / 'variable.py'
    config.write_text(
        f'_base_ = {str(ROOT / DETECTOR)!r}\n{name} = dict(max_epochs=3)\n'
        f'train_cfg = dict(max_epochs={name}["max_epochs"])\n'
    )
    assert load_config(str(config)).train_cfg.max_epochs == 3
    said = capsys.readouterr().err
    assert f"'{name}' has an effect only where the config itself uses it" in said
    assert f"if it is a typo, write '{near}'." in said


# What MMDetection's and MMSegmentation's own tools take


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data') / 'few', train=4, val=2, size=48)


def test_settings_may_be_lists_or_none(capfd, few, tmp_path):
    """No visualizer and no hook for pictures, evaluators and weights as lists, data in parts."""
    base = write_config(ONE_STAGE, tmp_path / 'base_of_lists.py', few)
    config = tmp_path / 'lists.py'
    config.write_text(f'''
_base_ = {str(base)!r}
visualizer = auto_scale_lr = custom_hooks = None
default_hooks = dict(_delete_=True, checkpoint=dict(type='CheckpointHook', interval=1))
val_evaluator = test_evaluator = [dict(_base_.val_evaluator)]
model = dict(backbone=dict(init_cfg=[]))
parts = [dict(_base_.train_dataloader.dataset), dict(_base_.train_dataloader.dataset)]
train_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=parts))
train_cfg = dict(max_epochs=1, val_interval=1)
''')
    data = Path(shutil.copytree(few / 'coco', tmp_path / 'moved'))
    options = ['--data-root', data, '--work-dir', tmp_path / 'work']
    said = run_tool(capfd, config, *options, tool='train.py')
    assert re.search(r'Epoch\(train\) +\[1\]\[4/4\]', said) and 'coco/bbox_mAP' in said
    run_tool(
        capfd,
        config,
        tmp_path / 'work' / 'epoch_1.pth',
        *options,
        '--out',
        tmp_path / 'kept.pkl',
        '--show-dir',
        tmp_path / 'pictures',
        tool='test.py',
    )
    kept = pickle.loads((tmp_path / 'kept.pkl').read_bytes())
    assert [image['img_path'].startswith(str(data)) for image in kept] == [True, True]
    assert len(list((tmp_path / 'pictures').iterdir())) == 2


@pytest.mark.parametrize(
    'lines, expected',
    [
        (
            "runner_type = 'FlexibleRunner'\nstrategy = dict(type='DeepSpeedStrategy')",
            "config's strategy cannot be built: AssertionError: DeepSpeed is not installed",
        ),
        ("runner_type = 'MyRunner'", "runner_type: there is no runner 'MyRunner'."),
        ("strategy = dict(type='MyStrategy')", "config's strategy cannot be built: "),
    ],
)
def test_runners_and_strategies_are_not_ignored(
    capsys, monkeypatch, few, tmp_path, lines, expected
):
    config = write_config(ONE_STAGE, tmp_path / 'strategy.py', few)
    config.write_text(f'{config.read_text()}{lines}\n')
    assert expected in sentence(capsys, monkeypatch, 'train.py', config, '--work-dir', tmp_path)


def test_a_strategy_trains_by_mmengines_other_runner(capfd, monkeypatch, few, tmp_path):
    prepared = []
    prepare = SingleDeviceStrategy.prepare
    monkeypatch.setattr(
        SingleDeviceStrategy,
        'prepare',
        lambda strategy, *args, **kwargs: (
            prepared.append(strategy) or prepare(strategy, *args, **kwargs)
        ),
    )
    config = write_config(
        ONE_STAGE,
        tmp_path / 'single_device.py',
        few,
        val_cfg=None,
        val_dataloader=None,
        val_evaluator=None,
        train_cfg=dict(max_epochs=1),
        strategy=dict(type='SingleDeviceStrategy'),
    )
    run_tool(capfd, config, '--work-dir', tmp_path, tool='train.py')
    assert len(prepared) == 1
    kept = read_checkpoint(str(tmp_path / 'epoch_1.pth'))
    assert {'state_dict', 'optimizer'} <= kept.keys()


# Devices


@pytest.mark.parametrize('device, said', [('cpu', True), ('npu', False), ('mlu', False)])
def test_other_accelerators_are_not_taken_for_a_cpu(monkeypatch, device, said):
    train = load_script(ROOT / 'tools' / 'train.py')
    monkeypatch.setattr(train, 'get_device', lambda: device)
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper')))
    if said:
        with pytest.raises(UserError, match='--amp needs a GPU'):
            train.use_mixed_precision(cfg, 'float16')
    else:
        train.use_mixed_precision(cfg, 'float16')
        assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    monkeypatch.setattr(cli, 'get_device', lambda: device)
    arguments = argparse.Namespace(
        config=DETECTOR,
        cfg_options={},
        launcher='none',
        local_rank=0,
        work_dir='x',
        tensorboard=False,
        data_root=None,
    )
    monkeypatch.chdir(ROOT)
    cfg = cli.read_config(arguments)
    assert (cfg.train_dataloader.get('pin_memory') is False) == (device == 'cpu')
