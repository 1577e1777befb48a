"""MMEngine's other ways to train: strategies of its FlexibleRunner, in two processes by gloo."""

import inspect
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from crossformer_mm import CrossFormer
from crossformer_mm.checkpoint import read_checkpoint
from crossformer_mm.sharding import is_crossformer_block, wrap_crossformer_blocks

from ..helpers import ROOT, run_two
from ..trainings import SEGMENTOR, write_config

FSDP = Config.fromfile(ROOT / 'configs' / '_base_' / 'fsdp.py').strategy.to_dict()
SHARDED = ['configs/mask_rcnn/cfpp_b_1x_fsdp.py', 'configs/upernet/cf_l_160k_fsdp.py']


def training(path: Path, data: Path, strategy: dict) -> Path:
    """A configuration of four iterations with two checkpoints, by a strategy."""
    return write_config(
        SEGMENTOR,
        path,
        data,
        train_cfg=dict(max_iters=4, val_interval=4),
        default_hooks=dict(checkpoint=dict(interval=2, max_keep_ckpts=-1)),
        custom_hooks=[],
        custom_imports=dict(imports=['crossformer_mm', 'crossformer_mm.engine.sharding']),
        runner_type='FlexibleRunner',
        strategy=strategy,
        # Else the position bias takes its modules where it is sharded, and a kernel where it is not.
        model=dict(backbone=dict(attention_path='plain')),
        randomness=dict(seed=0),
    )


def weights_of(folder: Path, iteration: int) -> dict:
    """Weights in a checkpoint; MMEngine's DDPStrategy keeps the wrapper's name in the keys."""
    checkpoint = read_checkpoint(str(folder / f'iter_{iteration}.pth'))
    assert checkpoint['meta']['iter'] == iteration
    return {key.replace('module.', ''): weight for key, weight in checkpoint['state_dict'].items()}


@pytest.mark.parametrize('config', SHARDED)
def test_configs_shard_and_recompute_by_block(config):
    cfg = Config.fromfile(ROOT / config)
    assert cfg.runner_type == 'FlexibleRunner' and cfg.strategy.to_dict() == FSDP
    model = CrossFormer(dict(embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)))
    blocks = [module for module in model.modules() if is_crossformer_block(module)]
    assert len(blocks) == 5
    wrapped = [module for module in model.modules() if wrap_crossformer_blocks(module, False)]
    assert wrapped == blocks
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
    run_two(tmp_path / 'log_plain', f'tools/train.py {plain} --work-dir {tmp_path}/plain')
    command = f'tools/train.py {sharded} --work-dir {tmp_path}/resumed'
    run_two(tmp_path / 'log_resumed', command, f'--resume {tmp_path}/sharded/iter_2.pth')
    last = weights_of(tmp_path / 'sharded', 4)
    # With AVX2, convolutions whose weights are not sharded have ways of their own.
    rounding = 1e-5 if torch.backends.cpu.get_cpu_capability() == 'AVX2' else 0
    for folder, limit in (('plain', rounding), ('resumed', 0)):
        torch.testing.assert_close(weights_of(tmp_path / folder, 4), last, rtol=0, atol=limit)
    moved = 'backbone.patch_embed.projs.0.weight'
    assert not torch.equal(weights_of(tmp_path / 'sharded', 2)[moved], last[moved])
    # Each process had its part of the blocks alone, and they were recomputed.
    assert 'FullyShardedDataParallel' in (tmp_path / 'log_sharded0').read_text()
