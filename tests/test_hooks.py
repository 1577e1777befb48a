"""Hooks log true values and do not change training."""

import json
import logging
import re
from types import SimpleNamespace

import cv2
import pytest
import torch
from mmengine.model import BaseModel
from mmengine.registry import HOOKS, OPTIM_WRAPPERS
from mmengine.runner import Runner
from torch import nn

from crossformer_mm import AttentionPathHook, CrossFormer, MagnitudeHook, ValidationSamplesHook
from crossformer_mm.engine import mixed_precision
from crossformer_mm.engine.runner import ADDED_HOOKS
from crossformer_mm.grouping import stage_rules
from crossformer_mm.hooks import KeepLabelMapsHook, ShowPredictionsHook, sample_logits

from .helpers import Photos, assert_same, write_pictures

TINY = dict(embed_dims=16, depths=(1, 2, 3, 2), num_heads=(1, 2, 2, 4))


def logits_by_definition(attention, x, rows, columns):
    """Return logits by group of a map, pair by pair: (group of positions) -> (heads, N, N)."""
    found = {}
    (size_r, step_r, _), (size_c, step_c, _) = rows, columns
    for r in range(x.shape[1]):
        for c in range(x.shape[2]):
            group = (r // (size_r * step_r), r % step_r, c // (size_c * step_c), c % step_c)
            found.setdefault(group, []).append((r, c))
    bias = attention.pos
    logits = []
    for members in found.values():
        tokens = torch.stack([x[0, r, c] for r, c in members])
        q, k, _ = attention.qkv(tokens).chunk(3, dim=-1)
        heads = range(attention.num_heads)
        q, k = (t.view(len(members), attention.num_heads, -1).transpose(0, 1) for t in (q, k))
        value = torch.stack([attention.scale * q[h] @ k[h].T for h in heads])
        at = torch.tensor([(r // step_r, c // step_c) for r, c in members])
        offsets = (at[:, None] - at[None]).float()
        value = value + bias.pos3(bias.pos2(bias.pos1(bias.pos_proj(offsets)))).permute(2, 0, 1)
        logits.append(value)
    largest = max(value.shape[-1] for value in logits)
    return torch.stack([value for value in logits if value.shape[-1] == largest])


@pytest.mark.parametrize(
    'wrapper, options, line',
    [
        ('OptimWrapper', {}, r'attention: (native|plain) on cpu \(float32\)'),
        ('BFloat16OptimWrapper', {}, r'attention: (native|plain) on cpu \(bfloat16\)'),
        (
            'OptimWrapper',
            dict(attn_drop_rate=0.1),
            r'attention: plain on cpu \(float32\), not native: it has no dropout',
        ),
        ('OptimWrapper', dict(attention_path='plain'), r'attention: plain on cpu \(float32\)$'),
    ],
)
def test_one_line_at_the_start_says_which_path_computes_attention(
    wrapper, options, line, caplog, monkeypatch
):
    monkeypatch.setattr(mixed_precision, 'multiplies_bfloat16', lambda: True)
    model = CrossFormer(TINY, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrapper = OPTIM_WRAPPERS.build(dict(type=wrapper, optimizer=optimizer))
    runner = SimpleNamespace(model=model, optim_wrapper=wrapper, logger=logging.getLogger('paths'))
    with caplog.at_level(logging.INFO, 'paths'):
        AttentionPathHook().before_train(runner)
    said = [message for message in caplog.messages if message.startswith('attention')]
    assert len(said) == 1 and re.match(line, said[0])
    assert AttentionPathHook in ADDED_HOOKS  # of every training of ours


@pytest.mark.parametrize(
    'group_size, lda, long', [(5, 'interval', False), (4, 'interval', True), (4, 'block', True)]
)
def test_logits_are_those_of_the_definition(small, group_size, lda, long):
    attention = small().layers[1].blocks[1].attn
    x = torch.randn(1, 17, 13, 64)
    rules = stage_rules(17, 13, group_size, 2, lda)[long]
    with torch.no_grad():
        expected = logits_by_definition(attention, x, *rules)
    every = sample_logits(attention, x, *rules, 1000, 1000)
    assert every.shape == expected.shape
    torch.testing.assert_close(every.std(), expected.std())
    torch.testing.assert_close(every.abs().max(), expected.abs().max())
    for group in every:  # the order of groups is the grouping's own
        assert any(torch.allclose(group, other, atol=1e-5) for other in expected)
    some = sample_logits(attention, x, *rules, 2, 3)
    assert some.shape[0] == min(2, len(expected)) and some.shape[2] == 3
    assert every.abs().max() >= some.abs().max()


def test_logits_are_of_all_images_of_a_batch(small):
    attention, x = small().layers[1].blocks[1].attn, torch.randn(2, 17, 13, 64)
    rules = stage_rules(17, 13, 4, 2, 'interval')[1]
    each = [sample_logits(attention, image[None], *rules, 1000, 4) for image in x]
    torch.testing.assert_close(sample_logits(attention, x, *rules, 1000, 4), torch.cat(each))


class Trained(BaseModel):
    def __init__(self, **options):
        super().__init__()
        self.backbone = CrossFormer(TINY, **options)

    def forward(self, inputs, mode='loss'):
        return dict(loss=sum(feature.square().mean() for feature in self.backbone(inputs)))


def train(model, work_dir, hooks) -> None:
    torch.manual_seed(0)  # of the images
    images = [torch.randn(3, 70, 90) for _ in range(4)]
    name, sampler = work_dir.name, dict(type='DefaultSampler', shuffle=False)
    visualizer = dict(type='Visualizer', name=name, vis_backends=[dict(type='LocalVisBackend')])
    Runner(
        model,
        str(work_dir),
        train_dataloader=dict(
            dataset=images,
            sampler=sampler,
            collate_fn=lambda batch: dict(inputs=torch.stack(batch)),
        ),
        train_cfg=dict(by_epoch=False, max_iters=4),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-3)),
        custom_hooks=hooks,
        default_scope='mmengine',
        randomness=dict(seed=0),
        experiment_name=name,
        visualizer=visualizer,
    ).train()


@pytest.mark.parametrize('with_cp', [False, True])
def test_training_is_the_same_and_the_log_says_what_the_features_were(tmp_path, with_cp):
    weights, features = [], []
    for name, hooks in ('bare', []), ('hooked', [dict(type='MagnitudeHook', interval=2)]):
        torch.manual_seed(1)
        model = Trained(with_cp=with_cp)
        if hooks:
            model.backbone.layers[3].register_forward_hook(
                lambda module, inputs, output: features.append(output.detach().clone())
            )
        train(model, tmp_path / f'{name}-{with_cp}', hooks)
        weights.append(model.state_dict())
        assert len(model.backbone.layers[0]._forward_hooks) == 0
        assert len(model.backbone.layers[0].blocks[-1].attn._forward_hooks) == 0
    assert_same(*weights)

    (scalars,) = (tmp_path / f'hooked-{with_cp}').glob('*/vis_data/scalars.json')
    lines = map(json.loads, scalars.read_text().splitlines())
    lines = [line for line in lines if 'magnitude/stage3/feature_std' in line]
    assert [line['step'] for line in lines] == [2, 4]
    assert {
        f'magnitude/stage{i}/{what}_{how}'
        for i in range(4)
        for what in ('feature', 'logit')
        for how in ('std', 'max')
    } < set(lines[0])
    for line, feature in zip(lines, features[1::2]):
        assert line['magnitude/stage3/feature_std'] == pytest.approx(feature.std().item(), rel=1e-3)
        assert line['magnitude/stage3/feature_max'] == pytest.approx(feature.abs().max().item())
        assert 0 < line['magnitude/stage3/logit_std'] < line['magnitude/stage3/logit_max']
    (log,) = (tmp_path / f'hooked-{with_cp}').glob('*/*.log')
    assert log.read_text().count('Magnitudes by stage: standard deviation of features') == 2


def test_a_model_without_the_backbone_is_refused(tmp_path):
    model = Trained()
    model.backbone = nn.Conv2d(3, 4, 1)
    with pytest.raises(ValueError, match='the model has no CrossFormer'):
        train(model, tmp_path / 'other', [dict(type='MagnitudeHook')])


@pytest.mark.parametrize('options', [dict(interval=0), dict(groups=-1), dict(queries=1.5)])
def test_numbers_must_be_positive(options):
    with pytest.raises(ValueError, match=f'MagnitudeHook: {next(iter(options))} must be'):
        MagnitudeHook(**options)


def test_its_name_in_a_config_builds_it():
    assert HOOKS.build(dict(type='MagnitudeHook', interval=7)).interval == 7


class Drawn(SimpleNamespace):
    """A sample of a test, and what a visualizer or writer asks of it."""

    def cpu(self):
        return self

    def get(self, name):
        return getattr(self, name, None)


def test_images_of_one_name_in_several_folders_are_all_kept(tmp_path):
    """By the pictures of a test, its label maps, and the samples of a validation."""
    infos = write_pictures(tmp_path / 'in', 'a_b/x.png', 'a/b_x.png', 'a/b/x.png', 'a/b/x.jpg')
    data = Photos(infos, pipeline=[dict(type='LoadImageFromFile')])
    samples = [
        Drawn(
            img_path=info['img_path'],
            reduce_zero_label=True,
            pred_sem_seg=SimpleNamespace(data=torch.full((1, 4, 6), 300 * index)),
        )
        for index, info in enumerate(infos)
    ]
    shown, tags = {}, {}

    def add_datasample(name, image, data_sample, step=0, out_file=None):
        shown[out_file] = image[0, 0, 0]
        tags.setdefault(name, []).append(image[0, 0, 0])

    loader = SimpleNamespace(dataset=data, sampler=data, batch_size=4)
    runner = SimpleNamespace(
        rank=0,
        iter=5,
        visualizer=SimpleNamespace(add_datasample=add_datasample, visualize_cls=add_datasample),
        test_dataloader=loader,
        val_dataloader=loader,
    )
    for hook in (ShowPredictionsHook(str(tmp_path / 'show')), KeepLabelMapsHook(str(tmp_path))):
        hook.before_test(runner)
        hook.after_test_iter(runner, 0, outputs=samples)
    assert set(shown) == {str(tmp_path / 'show' / path) for path in (
        'a_b/x.png', 'a/b_x.png', 'a/b/x.png', 'a/b/x.jpg'
    )}  # fmt: skip
    maps = ('a_b/x.png', 'a/b_x.png', 'a/b/x.png.png', 'a/b/x.jpg.png')
    for index, path in enumerate(maps):
        labels = cv2.imread(str(tmp_path / path), cv2.IMREAD_UNCHANGED)
        assert labels.shape == (4, 6) and (labels == 300 * index + 1).all()

    tags.clear()
    samples_hook = ValidationSamplesHook(4)
    for _ in range(2):  # each validation has the same tags
        samples_hook.before_val(runner)
        samples_hook.after_val_iter(runner, 0, outputs=samples)
    assert list(tags) == ['val_a_b_x.png', 'val_a_b_x.png-1', 'val_a_b_x.png-2', 'val_a_b_x.jpg']
    assert all(len(images) == 2 and images[0] == images[1] for images in tags.values())
