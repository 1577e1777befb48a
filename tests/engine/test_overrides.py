"""Settings of --cfg-options that something reads are taken, and typos are not."""

import pytest
from mmengine.config import Config

from crossformer_mm.engine.config import load_config
from crossformer_mm.engine.overrides import check_keys
from crossformer_mm.errors import UserError

from ..helpers import DEMO_DETECTOR, DEMO_SEGMENTOR, ROOT

KEYS = {
    DEMO_DETECTOR: '''
        model.backbone.with_cp model.backbone.arch.drop_path_rate
        model.backbone.init_cfg.checkpoint model.train_cfg.rcnn.sampler.pos_fraction
        optim_wrapper.clip_grad.max_norm optim_wrapper.optimizer.eps
        optim_wrapper.paramwise_cfg.norm_decay_mult
        train_dataloader.dataset.indices train_dataloader.prefetch_factor val_evaluator.classwise
        custom_hooks default_hooks.checkpoint.save_best env_cfg.dist_cfg.timeout
        find_unused_parameters load_from model_wrapper_cfg.static_graph randomness.seed''',
    DEMO_SEGMENTOR: '''
        model.decode_head.sampler.type model.test_cfg.stride
        train_dataloader.dataset.pipeline.2.scale''',
    'configs/retinanet/cf_s_1x.py': 'model.bbox_head.loss_cls.alpha',
}


@pytest.mark.parametrize(
    'config, key', [(config, key) for config, keys in KEYS.items() for key in keys.split()]
)
def test_settings_that_are_read_may_be_new_to_the_config(config, key):
    check_keys(Config.fromfile(ROOT / config), {key: 1})


def test_settings_of_another_type_are_those_of_that_type():
    cfg = Config.fromfile(ROOT / DEMO_DETECTOR)
    momentum = {'optim_wrapper.optimizer.momentum': 0.9}
    check_keys(cfg, {'optim_wrapper.optimizer.type': 'SGD', **momentum})
    with pytest.raises(UserError, match='momentum'):
        check_keys(cfg, momentum)


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
        f'_base_ = {str(ROOT / DEMO_DETECTOR)!r}\n{name} = dict(max_epochs=3)\n'
        f'train_cfg = dict(max_epochs={name}["max_epochs"])\n'
    )
    assert load_config(str(config)).train_cfg.max_epochs == 3
    said = capsys.readouterr().err
    assert f"'{name}' has an effect only where the config itself uses it" in said
    assert f"if it is a typo, write '{near}'." in said
