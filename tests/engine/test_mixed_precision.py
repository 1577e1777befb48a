"""``--amp bfloat16``: a training under autocast, here on the CPU."""

import json
from pathlib import Path

import pytest
import torch
from mmcv.ops import RoIAlign
from mmengine.config import Config
from torch import nn

from crossformer_mm.checkpoint import read_checkpoint
from crossformer_mm.engine import mixed_precision
from crossformer_mm.engine.mixed_precision import BFloat16OptimWrapper, use_mixed_precision
from crossformer_mm.errors import UserError

from ..helpers import NO_VALIDATION, needs_bfloat16, run_tool
from ..trainings import DETECTOR, SEGMENTOR, write_config


def losses_of(folder: Path, config: Path, *options) -> list:
    """Train; the losses of each iteration."""
    assert run_tool('train.py', config, '--work-dir', folder, *options, folder=folder.parent) == 0
    (log,) = folder.glob('*/vis_data/scalars.json')
    rows = map(json.loads, log.read_text().splitlines())
    return [{key: row[key] for key in row if 'loss' in key} for row in rows if 'loss' in row]


@needs_bfloat16
@pytest.mark.skipif(torch.cuda.is_available(), reason='looks at the CPU')
@pytest.mark.parametrize('kind', [DETECTOR, SEGMENTOR], ids=lambda kind: kind.name)
def test_training_in_bfloat16_has_the_losses_of_float32_nearly(data, tmp_path, kind):
    changes = dict(randomness=dict(seed=0), custom_hooks=[], **NO_VALIDATION)
    if kind is DETECTOR:
        last, changes['train_cfg'] = 'epoch_2.pth', dict(max_epochs=2)
        changes['default_hooks'] = dict(checkpoint=dict(max_keep_ckpts=-1))
    else:
        last, changes['train_cfg'] = 'iter_2.pth', dict(max_iters=2, val_interval=2)
    in_this_process = 'train_dataloader.update(num_workers=0, persistent_workers=False)'
    config = write_config(kind, tmp_path / 'config.py', data, in_this_process, **changes)
    exact = losses_of(tmp_path / 'float32', config)
    rounded = losses_of(tmp_path / 'bfloat16', config, '--amp bfloat16')
    assert len(exact) == len(rounded) == 2
    assert rounded != exact  # 8 bits in place of 24
    for key, value in exact[0].items():
        # The few regions that have a box are chosen by scores, whose order rounding changes.
        limit = 0.5 if key == 'loss_bbox' else 0.05
        assert rounded[0][key] == pytest.approx(value, rel=limit, abs=0.01), key
    weights = read_checkpoint(str(tmp_path / 'bfloat16' / last))['state_dict']
    assert {weight.dtype for weight in weights.values() if weight.is_floating_point()} == {
        torch.float32
    }
    if kind is DETECTOR:
        options = f'--amp bfloat16 --resume {tmp_path}/bfloat16/epoch_1.pth'
        losses_of(tmp_path / 'resumed', config, options)
        resumed = read_checkpoint(str(tmp_path / 'resumed' / last))['state_dict']
        torch.testing.assert_close(resumed, weights, rtol=0, atol=0)


@needs_bfloat16
def test_matrix_products_are_rounded_and_operators_of_mmcv_are_not():
    linear, align = nn.Linear(8, 8), RoIAlign(2)
    model = nn.ModuleList([linear, align])
    features, boxes = torch.rand(1, 8, 4, 4), torch.tensor([[0.0, 0.0, 0.0, 3.0, 3.0]])
    wrapper = BFloat16OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):  # not widened twice
        with wrapper.optim_context(model):
            product, aligned = linear(torch.rand(2, 8)), align(features.bfloat16(), boxes)
    assert product.dtype == torch.bfloat16 and aligned.dtype == torch.bfloat16
    expected = RoIAlign(2)(features.bfloat16().float(), boxes)
    assert torch.equal(aligned, expected.bfloat16())
    assert linear(torch.rand(2, 8)).dtype == torch.float32
    wrapper.update_params(product.float().sum())
    assert linear.weight.dtype == torch.float32


def test_bfloat16_is_refused_where_it_is_slower_than_float32(monkeypatch):
    monkeypatch.setattr(mixed_precision, 'multiplies_bfloat16', lambda: False)
    monkeypatch.setattr(mixed_precision, 'get_device', lambda: 'cpu')
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper')))
    with pytest.raises(UserError, match='--amp bfloat16: .* leave it out to compute in float32'):
        use_mixed_precision(cfg, 'bfloat16')
    assert cfg.optim_wrapper.type == 'OptimWrapper'
    with pytest.raises(UserError, match='BFloat16OptimWrapper'):  # of a config
        BFloat16OptimWrapper(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    monkeypatch.setattr(mixed_precision, 'get_device', lambda: 'cuda')
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: True)
    use_mixed_precision(cfg, 'bfloat16')
    assert cfg.optim_wrapper.type == 'BFloat16OptimWrapper'
