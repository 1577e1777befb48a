"""tools/get_flops.py counts what runs, and says so in a table, in JSON, or in one sentence."""

import json
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from ..helpers import DEMO_DETECTOR, DEMO_SEGMENTOR, ROOT, run_as_main

CLASSIFIER = 'configs/imagenet/cf_t_300e.py'


@pytest.fixture
def get_flops(capsys, monkeypatch):
    """Runs the tool; its last line on stdout, or on stderr where it refuses."""

    def call(*arguments, code=0) -> str:
        monkeypatch.chdir(ROOT)
        try:
            run_as_main('tools/get_flops.py', *arguments)
            assert not code
        except SystemExit as stopped:
            assert stopped.code == code
        captured = capsys.readouterr()
        return (captured.err if code else captured.out).strip().splitlines()[-1]

    return call


@pytest.fixture
def config(tmp_path):
    """Writes a config; its file."""

    def write(base: str, **changes) -> Path:
        cfg = Config.fromfile(ROOT / base)
        cfg.merge_from_dict(changes)
        cfg.dump(tmp_path / 'config.py')
        return tmp_path / 'config.py'

    return write


def test_a_norm_with_arguments_of_its_own_is_called(get_flops, config):
    pytest.importorskip('mmpretrain')
    channels = [16, 32, 64, 128]
    file = config(
        DEMO_SEGMENTOR,
        **{
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
        },
    )
    counted = json.loads(get_flops(file, '--shape', 64, 64, '--json'))
    stem = 16 * 16 * 3 * 16 * 4 * 4
    assert counted['parts']['backbone.downsample_layers']['flops'] == stem + sum(
        (8 >> stage) ** 2 * 4 * low * 2 * low for stage, low in enumerate(channels[:-1])
    )


def test_one_block_costs_what_its_definition_says(get_flops, config):
    """56 x 56 pixels are 14 x 14 positions, in four groups of 7 x 7."""
    file = config(
        DEMO_SEGMENTOR,
        **{
            'model.backbone.arch': dict(_delete_=True, embed_dims=16, depths=(1,), num_heads=(1,)),
            'model.backbone.merge_sizes': (),
            'model.backbone.group_size': (7,),
            'model.backbone.interval': (8,),
            'model.backbone.out_indices': (0,),
            'model.backbone.out_norm': False,
            'model.auxiliary_head': None,
            'model.decode_head': dict(
                # without convolutions it classifies the map itself
                _delete_=True,
                type='FCNHead',
                in_channels=16,
                in_index=0,
                channels=16,
                num_convs=0,
                concat_input=False,
                num_classes=5,
            ),
        },
    )
    counted = json.loads(get_flops(file, '--shape', 56, 56, '--json'))
    positions = 14 * 14
    embedding = (
        positions
        * 3
        * sum(kernel**2 * channels for kernel, channels in ((4, 8), (8, 4), (16, 2), (32, 2)))
    )
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
def test_parts_add_up_and_the_attention_path_makes_no_difference(get_flops, config, base):
    said = {
        path: get_flops(
            config(base, **{'model.backbone.attention_path': path}), '--shape', 100, 130, '--json'
        )
        for path in (None, 'plain', 'native')
    }
    assert len(set(said.values())) == 1
    counted = json.loads(said[None])
    assert set(counted) == {'params', 'flops', 'shape', 'parts'} and counted['shape'] == [100, 130]
    for what in ('params', 'flops'):
        assert counted[what] == sum(part[what] for part in counted['parts'].values())
    assert [name for name in counted['parts'] if name.startswith('backbone.')] == [
        'backbone.patch_embed',
        *(f'backbone.layers.{i}' for i in range(4)),
        *(f'backbone.norm{i}' for i in range(4)),
    ]


def test_mergings_count_for_the_stage_that_they_end(get_flops):
    parts = json.loads(get_flops(DEMO_SEGMENTOR, '--shape', 64, 64, '--json'))['parts']
    kernels = 2**2 + 4**2
    merging = 8 * 8 * kernels * 32 * 32
    positions, width = 16 * 16, 32
    block = positions * 12 * width**2
    assert parts['backbone.layers.0']['flops'] > block + merging
    assert parts['auxiliary_head']['flops'] == 0 < parts['auxiliary_head']['params']


def test_second_stage_has_a_thousand_proposals_and_a_hundred_masks(get_flops):
    parts = json.loads(get_flops(DEMO_DETECTOR, '--shape', 64, 64, '--json'))['parts']
    width = 32
    convs = 9 * (64 + 3 * width) * width
    assert parts['roi_head.bbox_head']['flops'] == 1000 * (
        49 * convs + 49 * width * 256 + 256 * (5 + 4 * 4)
    )
    assert parts['roi_head.mask_head']['flops'] == 100 * 196 * (
        convs + 4 * width**2 + 4 * width * 4
    )


@pytest.mark.parametrize('channels', [1, 4])
def test_images_of_other_channels_are_counted(get_flops, config, channels):
    """Only the first convolutions cost as much as there are channels."""
    flops = []
    for count in (channels, 3):
        file = config(DEMO_SEGMENTOR, **{'model.backbone.in_channels': count})
        flops.append(json.loads(get_flops(file, '--shape', 64, 64, '--json')))
    first = 'backbone.patch_embed'
    one, other = (counted['parts'][first]['flops'] for counted in flops)
    assert one * 3 == other * channels > 0
    assert flops[0]['flops'] - one == flops[1]['flops'] - other


def test_table_is_for_people(get_flops):
    assert get_flops(DEMO_DETECTOR, '--shape', 64, 64).startswith('whole model')


def test_default_shapes_are_those_of_the_published_tables(get_flops):
    assert json.loads(get_flops(DEMO_DETECTOR, '--json'))['shape'] == [800, 1280]
    assert json.loads(get_flops(DEMO_SEGMENTOR, '--json'))['shape'] == [1024, 1024]
    assert json.loads(get_flops(CLASSIFIER, '--json'))['shape'] == [224, 224]


def test_a_classifier_has_its_norm_and_linear_layer_outside_the_backbone(get_flops):
    counted = json.loads(get_flops(CLASSIFIER, '--json'))
    assert set(counted['parts']) == {
        'backbone.patch_embed',
        *(f'backbone.layers.{i}' for i in range(4)),
        'neck',
        'head',
    }
    assert counted['parts']['neck'] == dict(params=2 * 512, flops=0)
    assert counted['parts']['head'] == dict(params=513 * 1000, flops=512 * 1000)


def test_a_model_that_cannot_be_built_is_named(get_flops, config):
    said = get_flops(config(DEMO_DETECTOR, **{'model.backbone.lda': 'tiles'}), code=2)
    assert 'could not be counted at 800 x 1280' in said and "got 'tiles'" in said


def test_a_missing_package_is_named(get_flops, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmseg', None)
    monkeypatch.setattr('crossformer_mm.engine.config.registered_scopes', set)  # as at a start
    assert 'needs the package mmsegmentation' in get_flops(DEMO_SEGMENTOR, code=2)
