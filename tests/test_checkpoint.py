"""Weights from files: ours, the authors' and whole models'; and files that must be refused."""

import argparse
import logging
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MMLogger

from crossformer_mm import CrossFormer

from .authors import imagenet_file, later
from .conftest import SMALL
from .helpers import pretrained


def plain(donor):
    return donor.state_dict()


def imagenet(donor):
    return imagenet_file(donor, later)


def detector(donor):
    """Return a checkpoint as MMDetection and MMSegmentation before mmengine save it."""
    state = {f'backbone.{key}': value for key, value in donor.state_dict().items()}
    head = {
        'neck.lateral_convs.0.conv.weight': torch.zeros(8, 32, 1, 1),
        'bbox_head.norm.weight': torch.ones(3),
        'decode_head.conv_seg.bias': torch.zeros(150),
    }
    meta = dict(mmdet_version='2.8.0', CLASSES=('person', 'bicycle'))
    return dict(state_dict={**state, **head}, meta=meta, optimizer={})


def runner(donor):
    """Return a checkpoint as mmengine's Runner saves it: its training log is objects."""
    message_hub = dict(
        log_scalars=dict(loss=HistoryBuffer([1.0, 2.0], [1, 1])),
        accuracy=np.float64(0.5),
        runtime_info=dict(curve=np.ones(3)),
    )
    return dict(detector(donor), message_hub=message_hub)


def parallel(donor):
    return dict(state_dict={f'module.{key}': value for key, value in donor.state_dict().items()})


def timm(donor):
    """Return a checkpoint as timm's train.py saves it: its arguments are an object."""
    content = detector(donor)
    averaged = content.pop('state_dict')  # which timm prefers
    state = {key: torch.zeros_like(value) for key, value in averaged.items()}
    args = argparse.Namespace(model='crossformer_small', opt_betas=(0.9, 0.99), lr=None)
    return dict(content, state_dict=state, state_dict_ema=averaged, args=args)


@pytest.fixture
def donor(small):
    return small()


@pytest.fixture
def save(tmp_path):
    def to_file(content, **options) -> str:
        torch.save(content, tmp_path / 'weights.pth', **options)
        return str(tmp_path / 'weights.pth')

    return to_file


def loaded(path, **options) -> CrossFormer:
    return pretrained(path, SMALL, **options)


def assert_holds(backbone, reference, but=()):
    state, expected = backbone.state_dict(), reference.state_dict()
    for key, value in state.items():
        if not key.startswith(but):
            assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize('old_format', [False, True])
@pytest.mark.parametrize('layout', [plain, imagenet, detector, runner, parallel, timm])
def test_every_layout_of_file_gives_its_backbone(donor, save, layout, old_format):
    path = save(layout(donor), _use_new_zipfile_serialization=not old_format)
    assert_holds(loaded(path), donor)


@pytest.mark.parametrize('layout', [plain, imagenet, detector])
def test_output_norms_start_fresh(donor, save, layout):
    backbone = loaded(save(layout(donor)), out_norm=True)
    norms = ('norm0.', 'norm1.', 'norm2.', 'norm3.')
    assert_holds(backbone, donor, but=norms)
    fresh = [value for key, value in backbone.state_dict().items() if key.startswith(norms)]
    assert len(fresh) == 8 and {value.unique().item() for value in fresh} == {0.0, 1.0}


def test_output_norms_of_a_file_are_loaded(small, save):
    donor = small(out_norm=True)
    path = save(donor.state_dict())
    assert_holds(loaded(path, out_norm=True), donor)
    assert_holds(loaded(path, out_norm=True, out_indices=(1, 2)), donor)


@pytest.mark.parametrize('layout', [plain, imagenet, detector])
def test_stages_that_are_not_built_are_left_out(donor, save, layout):
    backbone = loaded(save(layout(donor)), out_indices=(0, 1))
    assert len(backbone.layers) == 2
    assert_holds(backbone, donor)


@pytest.mark.parametrize('prefix', ['encoder.trunk.', 'encoder.trunk'])
def test_prefix_says_where_the_backbone_is(donor, save, prefix):
    state = {f'encoder.trunk.{key}': value for key, value in donor.state_dict().items()}
    path = save(dict(state_dict=dict(state, **{'head.fc.bias': torch.ones(2)})))
    assert_holds(loaded(path, prefix=prefix), donor)


def test_frozen_stages_are_loaded_too(donor, save):
    assert_holds(loaded(save(donor.state_dict()), frozen_stages=2), donor)


def test_no_checkpoint_warns_and_starts_from_random_weights(caplog):
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)  # it does not propagate to where caplog listens
    backbone = CrossFormer(SMALL, init_cfg=dict(type='Pretrained', checkpoint=None))
    try:
        backbone.init_weights()
    finally:
        logger.removeHandler(caplog.handler)
    assert not backbone.layers[0].blocks[0].mlp.fc1.bias.any()
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert any('no pretrained checkpoint is given' in message for message in warnings)


# Files that must be refused


def refused(path, sentence, kind=ValueError, **options):
    """The one clear sentence with which a file is refused, no weight having changed."""
    torch.manual_seed(5)
    backbone = CrossFormer(
        options.pop('arch', SMALL), init_cfg=dict(type='Pretrained', checkpoint=path), **options
    )
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(kind) as error:
        backbone.init_weights()
    message = str(error.value)
    assert path in message and '\n' not in message and message.endswith('.')
    assert re.search(sentence, message), message
    assert 'weights_only' not in message  # torch's advice is to run the file
    assert all(torch.equal(backbone.state_dict()[key], value) for key, value in before.items())


def test_weights_of_another_architecture_are_refused(small, donor, save):
    path = save(imagenet(donor))
    refused(path, 'of another shape', arch=dict(SMALL, embed_dims=16))
    refused(path, r'missing layers\.0\.blocks\.1', arch=dict(SMALL, depths=(2, 2, 4, 2)))
    refused(path, r'unexpected layers\.2\.blocks\.3', arch=dict(SMALL, depths=(1, 2, 3, 2)))
    refused(path, r'missing layers\.2\.blocks\.2\.ex_conv', cooling=True)
    refused(path, r'missing patch_embed.*embed', patch_sizes=(4, 8, 16, 32, 64))
    refused(path, r'missing .*attn\.qkv|unexpected .*attn\.qkv\.bias', qkv_bias=False)
    refused(save(small(out_norm=True).state_dict()), r'unexpected norm0')


def test_incomplete_weights_are_refused(donor, save):
    state = donor.state_dict()
    del state['layers.3.blocks.1.mlp.fc2.bias']
    refused(save(state), r'missing layers\.3\.blocks\.1\.mlp\.fc2\.bias')


@pytest.mark.parametrize('content', [{}, [], {'model': {}}, dict(epoch=3), torch.zeros(3)])
def test_file_without_weights_is_refused(save, content):
    refused(save(content), 'holds no weights')


def test_missing_file_is_named(tmp_path):
    refused(str(tmp_path / 'none.pth'), 'does not exist', kind=FileNotFoundError)


def test_folder_is_refused(tmp_path):
    refused(str(tmp_path), 'could not be read')


@pytest.mark.parametrize('old_format', [False, True])
@pytest.mark.parametrize('share', [0, 0.001, 0.3, 0.9, 0.999])
def test_truncated_file_is_refused(donor, save, share, old_format):
    path = save(donor.state_dict(), _use_new_zipfile_serialization=not old_format)
    os.truncate(path, int(share * os.path.getsize(path)))
    refused(path, 'cut short')


def test_web_page_saved_as_weights_is_refused(tmp_path):
    path = tmp_path / 'weights.pth'
    path.write_text('<!DOCTYPE html><html>Google Drive: too many downloads</html>')
    refused(str(path), 'no file of plain weights')


class Payload:
    """Unpickling it calls a function that leaves a file behind."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


PAYLOADS = {
    'open': lambda marker: Payload(open, marker, 'w'),
    'system': lambda marker: Payload(os.system, f'touch {marker}'),
    'eval': lambda marker: Payload(eval, f'open({marker!r}, "w").close()'),
    'mkdir': lambda marker: Payload(os.mkdir, marker),
    # stand-ins are for getattr too: through it, nothing may be reached
    'getattr': lambda marker: Payload(getattr, Payload(open, marker, 'w'), 'close'),
}


@pytest.mark.parametrize('kind', PAYLOADS)
@pytest.mark.parametrize('way', ['zip', 'old', 'pickle'])
def test_code_in_a_file_is_refused_and_not_run(donor, tmp_path, save, kind, way):
    marker = str(tmp_path / 'marker')
    content = dict(imagenet(donor), config=PAYLOADS[kind](marker))
    if way == 'pickle':
        path = str(tmp_path / 'weights.pth')
        Path(path).write_bytes(pickle.dumps(content, protocol=2))
    else:
        path = save(content, _use_new_zipfile_serialization=way == 'zip')
    refused(path, r'could not be read: it holds [\w.]+, which is no plain data and was not run')
    assert not os.path.exists(marker)
    if way == 'zip':  # and the payload is real: reading it carelessly sets it off
        torch.load(path, weights_only=False)
        assert os.path.exists(marker)
