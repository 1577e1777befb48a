"""tools/get_flops.py counts what runs, and says so in a table, in JSON, or in one sentence."""

import json
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from ..helpers import CLASSIFIER, DEMO_DETECTOR, DEMO_SEGMENTOR, ROOT


@pytest.fixture
def count(output_of):
    """Runs the tool; what it counts of a config's model, for images of (height, width)."""

    def run(config, *shape: int) -> dict:
        said = output_of('get_flops.py', config, '--json', ['--shape', *shape] if shape else [])
        (line,) = [line for line in said.splitlines() if line.startswith('{')]
        return json.loads(line)

    return run


@pytest.fixture
def config(tmp_path):
    """Writes a changed config; its file."""

    def write(base: str, changes: dict) -> Path:
        cfg = Config.fromfile(ROOT / base)
        cfg.merge_from_dict(changes)
        cfg.dump(tmp_path / 'config.py')
        return tmp_path / 'config.py'

    return write


def test_a_norm_with_arguments_of_its_own_is_called(count, config):
    pytest.importorskip('mmpretrain')
    channels = [16, 32, 64, 128]
    changes = {
        'custom_imports.imports': ['crossformer_mm', 'mmpretrain.models'],
        'model.backbone': dict(
            _delete_=True,
            type='mmpretrain.ConvNeXt',
            arch=dict(depths=[1, 1, 1, 1], channels=channels),
            out_indices=(0, 1, 2, 3),
            gap_before_final_norm=False,
        ),
        'model.decode_head.in_channels': channels,
        'model.auxiliary_head.in_channels': 64,
    }
    parts = count(config(DEMO_SEGMENTOR, changes), 64, 64)['parts']
    stem = 16 * 16 * 3 * 16 * 4 * 4
    assert parts['backbone.downsample_layers']['flops'] == stem + sum(
        (8 >> stage) ** 2 * 4 * low * 2 * low for stage, low in enumerate(channels[:-1])
    )


def test_one_block_costs_what_its_definition_says(count, config):
    """56 x 56 pixels are 14 x 14 positions, in four groups of 7 x 7."""
    changes = {
        'model.backbone.arch': dict(_delete_=True, embed_dims=16, depths=(1,), num_heads=(1,)),
        'model.backbone.merge_sizes': (),
        'model.backbone.group_size': (7,),
        'model.backbone.interval': (8,),
        'model.backbone.out_indices': (0,),
        'model.backbone.out_norm': False,
        'model.auxiliary_head': None,
        # without convolutions it classifies the map itself
        'model.decode_head': dict(
            _delete_=True, type='FCNHead', in_channels=16, in_index=0, channels=16, num_convs=0,
            concat_input=False, num_classes=5,
        ),
    }  # fmt: skip
    counted = count(config(DEMO_SEGMENTOR, changes), 56, 56)
    positions, kernels = 14 * 14, {4: 8, 8: 4, 16: 2, 32: 2}
    embedding = positions * 3 * sum(side**2 * channels for side, channels in kernels.items())
    linear = positions * 16 * (3 * 16 + 16 + 2 * 4 * 16)
    products = 2 * 4 * (7 * 7) ** 2 * 16
    bias = 13 * 13 * (2 * 1 + 1 + 1 + 1)  # of each offset, one channel wide
    parts = {name: part['flops'] for name, part in counted['parts'].items()}
    assert parts == {
        'backbone.patch_embed': embedding,
        'backbone.layers.0': linear + products + bias,
        'decode_head': positions * 16 * 5,
    }
    assert counted['flops'] == sum(parts.values())


@pytest.mark.parametrize('base', [DEMO_DETECTOR, DEMO_SEGMENTOR])
def test_parts_add_up_and_the_attention_path_makes_no_difference(count, config, base):
    counted, *others = (
        count(config(base, {'model.backbone.attention_path': path}), 100, 130)
        for path in (None, 'plain', 'native')
    )
    assert others == [counted, counted]
    assert set(counted) == {'params', 'flops', 'shape', 'parts'} and counted['shape'] == [100, 130]
    for what in ('params', 'flops'):
        assert counted[what] == sum(part[what] for part in counted['parts'].values())
    assert [name for name in counted['parts'] if name.startswith('backbone.')] == [
        'backbone.patch_embed',
        *(f'backbone.layers.{i}' for i in range(4)),
        *(f'backbone.norm{i}' for i in range(4)),
    ]


def test_mergings_count_for_the_stage_that_they_end(count):
    parts = count(DEMO_SEGMENTOR, 64, 64)['parts']
    positions, width = 16 * 16, 32
    merging = 8 * 8 * (2**2 + 4**2) * width * width
    assert parts['backbone.layers.0']['flops'] > positions * 12 * width**2 + merging
    assert parts['auxiliary_head']['flops'] == 0 < parts['auxiliary_head']['params']


def test_second_stage_has_a_thousand_proposals_and_a_hundred_masks(count):
    parts = count(DEMO_DETECTOR, 64, 64)['parts']
    width = 32
    convs = 9 * (64 + 3 * width) * width
    boxes = 49 * convs + 49 * width * 256 + 256 * (5 + 4 * 4)
    masks = 196 * (convs + 4 * width**2 + 4 * width * 4)
    assert parts['roi_head.bbox_head']['flops'] == 1000 * boxes
    assert parts['roi_head.mask_head']['flops'] == 100 * masks


@pytest.mark.parametrize('channels', [1, 4])
def test_images_of_other_channels_are_counted(count, config, channels):
    """Only the first convolutions cost as much as there are channels."""
    one, other = (
        count(config(DEMO_SEGMENTOR, {'model.backbone.in_channels': number}), 64, 64)
        for number in (channels, 3)
    )
    first, usual = (counted['parts']['backbone.patch_embed']['flops'] for counted in (one, other))
    assert first * 3 == usual * channels > 0
    assert one['flops'] - first == other['flops'] - usual


def test_table_is_for_people(output_of):
    said = output_of('get_flops.py', DEMO_DETECTOR, '--shape 64 64')
    assert said.splitlines()[-1].startswith('whole model')


@pytest.mark.parametrize(
    'config, shape',
    [(DEMO_DETECTOR, [800, 1280]), (DEMO_SEGMENTOR, [1024, 1024]), (CLASSIFIER, [224, 224])],
)
def test_default_shapes_are_those_of_the_published_tables(count, config, shape):
    assert count(config)['shape'] == shape


def test_a_classifier_has_its_norm_and_linear_layer_outside_the_backbone(count):
    parts = count(CLASSIFIER)['parts']
    layers = {f'backbone.layers.{i}' for i in range(4)}
    assert parts.keys() == {'backbone.patch_embed', *layers, 'neck', 'head'}
    assert parts['neck'] == dict(params=2 * 512, flops=0)
    assert parts['head'] == dict(params=513 * 1000, flops=512 * 1000)


def test_a_model_that_cannot_be_built_is_named(refusal_of, config):
    said = refusal_of('get_flops.py', config(DEMO_DETECTOR, {'model.backbone.lda': 'tiles'}))
    assert 'could not be counted at 800 x 1280' in said and "got 'tiles'" in said


def test_a_missing_package_is_named(count, refusal_of, monkeypatch):
    count(DEMO_SEGMENTOR, 64, 64)  # imports what the helper for this imports
    monkeypatch.setitem(sys.modules, 'mmseg', None)
    monkeypatch.setattr('crossformer_mm.engine.config.registered_scopes', set)  # as at a start
    assert 'needs the package mmsegmentation' in refusal_of('get_flops.py', DEMO_SEGMENTOR)
