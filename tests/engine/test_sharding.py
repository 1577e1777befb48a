"""MMEngine's other ways to train: strategies of its FlexibleRunner, in run_two processes by gloo."""

import inspect
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from crossformer_mm import CrossFormer
from crossformer_mm.checkpoint import read_checkpoint
from crossformer_mm.sharding import is_crossformer_block, wrap_crossformer_blocks

from ..helpers import ROOT, run_two
from ..trainings import SEGMENTOR, make_data, write_config

FSDP = Config.fromfile(ROOT / 'configs' / '_base_' / 'fsdp.py').strategy.to_dict()
SHARDED = ['configs/mask_rcnn/cfpp_b_1x_fsdp.py', 'configs/upernet/cf_l_160k_fsdp.py']


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp('data') / 'shapes', train=8, val=2)


def training(path: Path, data: Path, strategy: dict, kind=SEGMENTOR) -> Path:
    """A configuration of four iterations with run_two checkpoints, by a strategy."""
    schedule = dict(
        train_cfg=dict(max_iters=4, val_interval=4),
        default_hooks=dict(checkpoint=dict(interval=2, max_keep_ckpts=-1)),
    )
    return write_config(
        kind,
        path,
        data,
        **schedule if kind is SEGMENTOR else {},
        custom_hooks=[],
        custom_imports=dict(imports=['crossformer_mm', 'crossformer_mm.engine.sharding']),
        runner_type='FlexibleRunner',
        strategy=strategy,
        randomness=dict(seed=0),
    )


def state(folder: Path, name: str) -> dict:
    """A checkpoint; MMEngine's DDPStrategy keeps the wrapper's name in the keys."""
    checkpoint = read_checkpoint(str(folder / name))
    checkpoint['state_dict'] = {
        key.replace('module.', ''): weight for key, weight in checkpoint['state_dict'].items()
    }
    return checkpoint


def assert_same(one: dict, other: dict) -> None:
    """Weights and averages of the optimizer, bit by bit."""
    assert one['state_dict'].keys() == other['state_dict'].keys()
    for name, weight in one['state_dict'].items():
        assert torch.equal(weight, other['state_dict'][name]), name
    assert one['meta']['iter'] == other['meta']['iter']


@pytest.mark.parametrize('config', SHARDED)
def test_configs_shard_and_recompute_by_block(config):
    cfg = Config.fromfile(ROOT / config)
    assert cfg.runner_type == 'FlexibleRunner' and cfg.strategy.to_dict() == FSDP
    model = CrossFormer(dict(embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)))
    blocks = [module for module in model.modules() if is_crossformer_block(module)]
    assert len(blocks) == 5
    assert [
        module for module in model.modules() if wrap_crossformer_blocks(module, False)
    ] == blocks
    assert all(wrap_crossformer_blocks(module, True) for module in model.modules())


@pytest.mark.skipif(torch.cuda.is_available(), reason='compares processes without a GPU')
@pytest.mark.skipif(
    not inspect.signature(torch.cpu.Stream).parameters,
    reason='torch.cpu.Stream(priority) is not in this PyTorch',
)
def test_sharded_training_is_that_of_ddp_and_goes_on_where_it_was(data, tmp_path):
    sharded = training(tmp_path / 'sharded.py', data, FSDP)
    plain = training(tmp_path / 'plain.py', data, dict(type='DDPStrategy'))
    run_two(tmp_path / 'log_sharded', f'tools/train.py {sharded} --work-dir {tmp_path}/sharded')
    run_two(tmp_path / 'log_plain', 'tools/train.py', plain, '--work-dir', tmp_path / 'plain')
    command = f'tools/train.py {sharded} --work-dir {tmp_path}/resumed'
    run_two(tmp_path / 'log_resumed', command, f'--resume {tmp_path}/sharded/iter_2.pth')
    last = state(tmp_path / 'sharded', 'iter_4.pth')
    before = state(tmp_path / 'sharded', 'iter_2.pth')
    assert not torch.equal(
        before['state_dict']['backbone.patch_embed.projs.0.weight'],
        last['state_dict']['backbone.patch_embed.projs.0.weight'],
    )
    assert_same(last, state(tmp_path / 'plain', 'iter_4.pth'))
    assert_same(last, state(tmp_path / 'resumed', 'iter_4.pth'))
    # Each process had its part of the blocks alone, and they were recomputed.
    assert 'FullyShardedDataParallel' in (tmp_path / 'log_sharded0').read_text()
