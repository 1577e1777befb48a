"""Models in timm's registry: equal to the backbone and to the authors' classifier."""

import argparse
import logging
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config

timm = pytest.importorskip('timm', reason='timm is not installed')

from timm.data import resolve_data_config  # noqa: E402
from timm.models import create_feature_extractor, group_parameters  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.utils import CheckpointSaver, ModelEmaV3  # noqa: E402

import crossformer_mm.timm_models  # noqa: E402, F401
from crossformer_mm import CrossFormer  # noqa: E402
from crossformer_mm.checkpoint import CheckpointError, fit_checkpoint, read_checkpoint  # noqa: E402
from crossformer_mm.engine.layer_decay import LayerDecayOptimWrapperConstructor  # noqa: E402

from . import authors  # noqa: E402
from .authors import earlier, imagenet_file, later, no_buffers  # noqa: E402
from .helpers import ROOT, Marker, assert_same, build_model, pretrained  # noqa: E402
from .oracle import plain_features, plain_logits  # noqa: E402
from .test_golden import check  # noqa: E402

TINY = dict(
    arch=dict(embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), drop_path_rate=0.3)
)
INDICES = [(0, 1, 2, 3), (1, 2), (-1,), (3, 1), (0,), 2]


def image(height: int = 65, width: int = 97, channels: int = 3) -> torch.Tensor:
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0))


def create(name='crossformer_small', **options):
    torch.manual_seed(0)
    return timm.create_model(name, **{**TINY, **options}).eval()


def load(file, **options):
    overlay = dict(file=str(file))
    return create(pretrained=True, pretrained_cfg_overlay=overlay, **options)


@pytest.fixture
def released(tmp_path, small, request):
    """A backbone, the authors' ImageNet file of it, and what is in it."""
    donor = small(TINY['arch'])
    content = imagenet_file(donor, getattr(request, 'param', later))
    torch.save(content, tmp_path / 'file.pth')
    return donor, content['model'], tmp_path / 'file.pth'


# The registry


NAMES = {
    **{f'crossformer_{size}': f'cf_{size[0]}' for size in ('tiny', 'small', 'base', 'large')},
    **{f'crossformer_pp_{size}': f'cfpp_{size[0]}' for size in ('small', 'base', 'large', 'huge')},
}


def test_names_are_those_of_the_architectures():
    assert set(timm.list_models('crossformer*')) == set(NAMES)
    assert not timm.list_models('crossformer*', pretrained=True)


@pytest.mark.parametrize('name', NAMES)
def test_each_model_is_the_classifier_of_its_config(name):
    with torch.device('meta'):
        ours = build_model(f'configs/imagenet/{NAMES[name]}_300e.py')
        model = timm.create_model(name)
        features = timm.create_model(name, features_only=True)
    assert shapes(model) == shapes(ours)
    for ours_stage, stage in zip(ours.backbone.layers, model.backbone.layers, strict=True):
        for option in ('group_size', 'interval', 'lda'):
            assert getattr(stage, option) == getattr(ours_stage, option)
    assert rates(model) == rates(ours)
    assert shapes(features.model.backbone) == shapes(model.backbone)
    assert features.feature_info.reduction() == [4, 8, 16, 32]
    assert features.feature_info.channels() == list(model.backbone.out_channels)


def shapes(model) -> dict:
    return {key: value.shape for key, value in model.state_dict().items()}


def rates(model) -> list:
    return [layer.drop_prob for name, layer in model.named_modules() if name.endswith('drop_path')]


def test_images_are_prepared_as_in_the_config():
    data = resolve_data_config({}, model=create())
    cfg = Config.fromfile(ROOT / 'configs/imagenet/cf_s_300e.py')
    _, resize, crop, _ = cfg.test_pipeline
    assert data['input_size'] == (3, crop['crop_size'], crop['crop_size'])
    assert data['input_size'][1] / data['crop_pct'] == resize['scale']
    assert data['interpolation'] == resize['interpolation']
    for key in ('mean', 'std'):
        expected = [value / 255 for value in cfg.model.data_preprocessor[key]]
        assert list(data[key]) == pytest.approx(expected)


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="no option 'drop_path', did you mean 'drop_path_rate'"):
        create(drop_path=0.1)


def test_dilated_features_are_refused():
    assert len(create(features_only=True, output_stride=32)(image())) == 4
    with pytest.raises(ValueError, match='crossformer_small: output_stride must be 32, got 16'):
        create(features_only=True, output_stride=16)


# Values


@pytest.mark.parametrize('size', [(64, 96), (65, 97), (31, 5)])
@pytest.mark.parametrize('indices', INDICES)
def test_features_are_those_of_the_backbone(indices, size):
    model, whole = create(features_only=True, out_indices=indices), CrossFormer(**TINY).eval()
    whole.load_state_dict(create().backbone.state_dict())
    with torch.no_grad():
        expected, found = whole(image(*size)), model(image(*size))
    taken = range(4)[-indices:] if isinstance(indices, int) else indices
    assert_same(found, [expected[index] for index in taken])
    assert model.feature_info.channels() == [feature.shape[1] for feature in found]


@pytest.mark.parametrize('indices', INDICES)
def test_parameters_of_features_all_get_gradients(indices):
    model = create(features_only=True, out_indices=indices, out_norm=True).train()
    sum(feature.sum() for feature in model(image())).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize('name', ['interval', 'block_cooling'])
def test_features_and_gradients_are_those_of_the_authors(name, probe, tmp_path):
    for size in authors.committed()[name]['sizes']:
        golden = authors.read(name, size)
        torch.save(imagenet_file(golden.build(), later), tmp_path / 'file.pth')
        model = load(tmp_path / 'file.pth', features_only=True, **golden.settings)
        backbone = model.model.backbone
        assert_same(model(golden.image), backbone(golden.image))
        check(golden, backbone, probe)


@pytest.mark.parametrize('released', [no_buffers, earlier, later], indirect=True)
def test_logits_are_norm_mean_and_linear_of_the_authors_file(released):
    donor, weights, file = released
    model = load(file)
    with torch.no_grad():
        x = donor(image())[-1].permute(0, 2, 3, 1)
        x = F.layer_norm(x, x.shape[-1:], weights['norm.weight'], weights['norm.bias'])
        expected = F.linear(x.mean((1, 2)), weights['head.weight'], weights['head.bias'])
        assert torch.equal(model(image()), expected)
        assert torch.equal(model.forward_features(image()), x)
        assert torch.equal(model.forward_head(x, pre_logits=True), x.mean((1, 2)))
        # and by the definition, in which no line is shared
        plain = plain_logits(weights, plain_features(weights, image())[-1])
    torch.testing.assert_close(expected, plain, rtol=1e-3, atol=1e-3)


def test_images_of_other_channels():
    for channels in (1, 4):
        assert create(in_chans=channels)(image(channels=channels)).shape == (2, 1000)


@pytest.mark.parametrize('pool, width', [('avg', 1), ('max', 1), ('catavgmax', 2), ('', 1)])
def test_pooling_and_linear_layer_are_chosen_and_replaced(pool, width):
    model, channels = create(num_classes=7, global_pool=pool), 128
    logits, features = model(image()), model.forward_features(image())
    assert logits.shape == ((2, 7) if pool else (2, 3, 4, 7))
    assert model.num_features == channels and model.head_hidden_size == width * channels
    model.reset_classifier(5)
    assert model.get_classifier().out_features == model.num_classes == 5
    assert model(image()).shape[-1] == 5 and model.global_pool == pool
    model.reset_classifier(0)
    assert model(image()).shape[-1] == width * channels
    model.reset_classifier(3, 'avg')
    assert torch.equal(model(image()), model.get_classifier()(features.mean((1, 2))))


def test_intermediates_are_those_of_the_backbone():
    model = create()
    features = model.backbone(image())
    last, all_four = model.forward_intermediates(image())
    assert_same(all_four, features)
    assert_same(last, model.forward_features(image()))
    _, some = model.forward_intermediates(image(), indices=[1, -1], norm=True)
    assert_same(some, [features[1], last.permute(0, 3, 1, 2)])
    only = model.forward_intermediates(image(), indices=2, intermediates_only=True)
    assert_same(only, features[2:])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NHWC'"):
        model.forward_intermediates(image(), output_fmt='NHWC')


def test_gradient_checkpointing_gives_the_same_gradients(monkeypatch):
    counted = mock.Mock(wraps=sys.modules['crossformer_mm.backbone'].checkpoint)
    monkeypatch.setattr('crossformer_mm.backbone.checkpoint', counted)
    model, gradients = create().train(), []
    for enable in (True, False):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        model.zero_grad()
        model(image()).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert_same(*gradients)
    assert counted.call_count == 5


def test_fx_traces_the_classifier():
    model = create()
    graph = create_feature_extractor(model, {'neck.norm': 'features', 'head.fc': 'logits'})
    for size in ((65, 97), (40, 33)):
        out = graph(image(*size))
        assert torch.equal(out['features'], model.forward_features(image(*size)))
        assert torch.equal(out['logits'], model(image(*size)))


# Optimisers


def group_of(model, **options) -> dict:
    """Learning rate and weight decay of each parameter in timm's optimizer."""
    optimizer = create_optimizer_v2(model, 'adamw', lr=1.0, weight_decay=0.05, **options)
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group.get('lr_scale', 1), group['weight_decay'])
        for group in optimizer.param_groups
        for p in group['params']
    }


def test_layer_decay_gives_the_rates_that_it_gives_in_mmengine():
    model = create()
    found = group_of(model, layer_decay=0.5)
    constructor = LayerDecayOptimWrapperConstructor(
        dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05)),
        dict(layer_decay_rate=0.5, norm_decay_mult=0.0, bias_decay_mult=0.0),
    )
    names = {id(p): name for name, p in model.named_parameters()}
    expected = {
        names[id(group['params'][0])]: group['lr']
        for group in constructor(model).optimizer.param_groups
    }
    assert {name: rate for name, (rate, _) in found.items()} == pytest.approx(expected)
    assert found['head.fc.weight'] == found['neck.norm.weight'][:1] + (0.05,) == (1.0, 0.05)
    assert found['backbone.layers.3.blocks.0.mlp.fc1.weight'] == (0.5, 0.05)
    assert found['backbone.layers.2.downsample.norm.weight'] == (0.25, 0.0)
    assert found['backbone.patch_embed.projs.0.weight'] == (0.5**6, 0.05)


def test_coarse_groups_are_the_stages():
    model = create()
    groups = group_parameters(model, model.group_matcher(coarse=True))
    assert len(groups) == 6  # embedding, four stages, head
    assert set(groups[5]) == {
        'neck.norm.weight', 'neck.norm.bias', 'head.fc.weight', 'head.fc.bias'
    }  # fmt: skip


@pytest.mark.parametrize(
    'position_bias, name',
    [
        ('relative', 'backbone.layers.0.blocks.0.attn.pos.relative_position_bias_table'),
        ('absolute', 'backbone.absolute_pos.absolute_pos_embed'),
    ],
)
def test_learnt_positions_have_no_weight_decay(position_bias, name):
    model = create(position_bias=position_bias)
    assert name in model.no_weight_decay()
    assert group_of(model)[name][1] == 0 == group_of(model)['neck.norm.bias'][1]
    assert group_of(model)['backbone.layers.0.blocks.0.mlp.fc1.weight'][1] == 0.05


# Files


def test_a_file_for_other_classes_keeps_all_but_the_linear_layer(released, caplog):
    donor, weights, file = released
    with caplog.at_level(logging.WARNING):
        model = load(file, num_classes=10)
    assert f"linear layer in '{file}' has another shape (1000, 128)" in caplog.text
    assert torch.equal(model.neck.norm.weight, weights['norm.weight'])
    assert torch.equal(model.get_classifier().weight, create(num_classes=10).head.fc.weight)
    caplog.clear()
    for options in (dict(num_classes=0), dict(num_classes=0, global_pool='')):
        model = load(file, **options)
        assert_same(model.backbone(image()), donor(image()))
        assert torch.equal(model.neck.norm.weight, weights['norm.weight'])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_features_load_the_authors_file_and_a_detectors(released, tmp_path):
    donor, _, file = released
    assert_same(load(file, features_only=True)(image()), donor(image()))
    state = {f'backbone.{key}': value for key, value in donor.state_dict().items()}
    state['neck.lateral_convs.0.conv.weight'] = torch.ones(2)
    torch.save(dict(state_dict=state, meta={}), tmp_path / 'detector.pth')
    found = load(tmp_path / 'detector.pth', features_only=True, out_indices=(1, 2))(image())
    assert_same(found, donor(image())[1:3])


def test_weights_for_grey_images_are_sums(released):
    _, weights, file = released
    for options in (dict(), dict(features_only=True)):
        model = load(file, in_chans=1, **options)
        model = getattr(model, 'model', model)
        for i, conv in enumerate(model.backbone.patch_embed.projs):
            expected = weights[f'patch_embed.projs.{i}.weight'].sum(1, keepdim=True)
            assert torch.equal(conv.weight, expected)


def cut(state, *missing):
    return {key: value for key, value in state.items() if key not in missing}


INSIDE = 'layers.0.blocks.0.norm1.bias'


@pytest.mark.parametrize(
    'missing, added, options, said',
    [
        ([], {}, dict(arch='s'), 'of another shape backbone.'),
        ([], {}, dict(arch='s', features_only=True), 'of another shape '),
        (['head.weight', 'head.bias'], {}, {}, 'missing head.fc.bias, head.fc.weight'),
        (['head.bias'], {}, {}, 'missing head.fc.bias'),
        (['norm.weight'], {}, dict(num_classes=3), 'missing neck.norm.weight'),
        ([INSIDE], {}, {}, f'missing backbone.{INSIDE}'),
        ([INSIDE], {}, dict(features_only=True), f'missing {INSIDE}'),
        ([], dict(odd=torch.ones(1)), {}, 'unexpected backbone.odd'),
    ],
)
def test_what_does_not_fit_is_refused_and_named(released, tmp_path, missing, added, options, said):
    state = {**cut(released[1], *missing), **added}
    torch.save(dict(model=state), tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=said) as error:
        load(tmp_path / 'other.pth', **options)
    assert 'other.pth' in str(error.value)


def test_no_file_and_a_missing_file_are_errors(tmp_path):
    with pytest.raises(RuntimeError, match='No pretrained weights exist for crossformer_small'):
        create(pretrained=True)
    with pytest.raises(FileNotFoundError, match='none.pth'):
        load(tmp_path / 'none.pth')


def test_a_file_that_would_run_code_is_refused(tmp_path, released):
    args = argparse.Namespace(odd=Marker(tmp_path / 'marker'))
    torch.save(dict(model=released[1], args=args), tmp_path / 'evil.pth')
    with pytest.raises(CheckpointError, match='no plain data and was not run'):
        load(tmp_path / 'evil.pth')
    assert not (tmp_path / 'marker').exists()


def test_weights_that_timm_reads_itself_fit_as_strictly(released):
    donor, weights, _ = released

    def given(state, **options):
        overlay = dict(state_dict=dict(model=state))
        return create(pretrained=True, pretrained_cfg_overlay=overlay, **options)

    for options in (dict(), dict(num_classes=3), dict(features_only=True)):
        model = given(weights, **options)
        backbone = getattr(model, 'model', model).backbone
        assert_same(backbone(image()), donor(image()))
    with pytest.raises(CheckpointError, match=f'missing backbone.{INSIDE}'):
        given(cut(weights, INSIDE), num_classes=3)


# What timm trains, elsewhere


@pytest.fixture
def trained(tmp_path):
    """A model, its average, and the checkpoint that timm's train.py would save of both."""
    model = create(num_classes=3).train()
    average = ModelEmaV3(model, decay=0.5)
    optimizer = create_optimizer_v2(model, 'adamw', lr=0.1, layer_decay=0.5)
    model(image()).square().mean().backward()
    optimizer.step()
    average.update(model)
    args = argparse.Namespace(model='crossformer_small', lr=0.1, opt_betas=(0.9, 0.99), sync=None)

    def save(model_ema=None) -> str:
        options = dict(model_ema=model_ema, checkpoint_dir=str(tmp_path))
        CheckpointSaver(model, optimizer, args, **options).save_checkpoint(epoch=0, metric=1.0)
        return str(tmp_path / 'last.pth.tar')

    return model.eval(), average, save


def test_a_checkpoint_of_timm_is_read_as_data(trained):
    model, _, save = trained
    file = save()
    args = read_checkpoint(file)['args']
    assert vars(args) == dict(model='crossformer_small', lr=0.1, opt_betas=(0.9, 0.99), sync=None)
    again = load(file, num_classes=3)
    assert torch.equal(again(image()), model(image()))


def test_the_averaged_weights_are_taken_as_timm_takes_them(trained):
    model, average, save = trained
    file = save(average)
    again, theirs = load(file, num_classes=3), create(num_classes=3, checkpoint_path=file)
    assert torch.equal(again(image()), average.module.eval()(image()))
    assert torch.equal(again(image()), theirs(image()))
    assert not torch.equal(again(image()), model(image()))


def test_a_detector_takes_what_timm_trained(trained):
    model, _, save = trained
    assert_same(pretrained(save(), **TINY)(image()), model.backbone(image()))


def test_mmpretrains_classifier_and_timms_take_each_others_checkpoints(trained, tmp_path):
    model, _, save = trained
    cfg = Config.fromfile(ROOT / 'configs/imagenet/cf_s_300e.py')
    cfg.model.backbone.arch, cfg.model.head.num_classes = TINY['arch'], 3
    cfg.model.neck.in_channels = cfg.model.head.in_channels = 128
    ours = build_model(cfg)
    fit_checkpoint(ours, read_checkpoint(save()), 'theirs')
    with torch.no_grad():
        assert torch.equal(ours(image(), mode='tensor'), model(image()))
    torch.save(dict(state_dict=ours.state_dict(), meta=dict(epoch=1)), tmp_path / 'ours.pth')
    assert torch.equal(load(tmp_path / 'ours.pth', num_classes=3)(image()), model(image()))
