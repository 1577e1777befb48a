"""A folder for model hubs: its files load here with equal outputs, and its card is true."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS

from crossformer_mm import ARCHITECTURES
from crossformer_mm import checkpoint as checkpoint_module
from crossformer_mm.architectures import TIMM_NAMES
from crossformer_mm.checkpoint import fit_checkpoint, read_checkpoint
from crossformer_mm.hub import json_config

from .helpers import (
    CLASSES,
    DEMO_DETECTOR,
    ROOT,
    Marker,
    assert_same,
    model_of,
    outputs,
    pretrained,
)
from .tools.test_publish_model import runner_file

RUN = '20261129_185938'


@pytest.fixture
def save(tmp_path):
    """Save what a training of the small detector leaves; entries of ``meta`` replace its own."""

    def save(log: str = '', **meta) -> Path:
        content = runner_file(model_of(DEMO_DETECTOR))
        content['meta'].update(experiment_name=f'small_{RUN}', **meta)
        torch.save(content, tmp_path / 'epoch_3.pth')
        logs = tmp_path / RUN / 'vis_data'
        logs.mkdir(parents=True)
        scalars = [
            {'loss': 1.5, 'epoch': 1, 'iter': 3, 'step': 3},
            {'coco/bbox_mAP': 0.2, 'time': 0.1, 'step': 2},
            {'coco/bbox_mAP': 0.411, 'coco/bbox_mAP_l': -1.0, 'time': 0.1, 'step': 3},
        ]
        (logs / 'scalars.json').write_text('\n'.join(map(json.dumps, scalars)))
        (tmp_path / RUN / f'{RUN}.log').write_text(log)
        return tmp_path / 'epoch_3.pth'

    return save


@pytest.fixture
def publish(output_of, save):
    """Publishes what ``save`` has saved; the folder."""
    pytest.importorskip('safetensors')

    def publish(log: str = '', options: str = '', **meta) -> Path:
        file = save(log, **meta)
        output_of('publish_model.py', file, '--hub', file.with_name('small'), options)
        return file.with_name('small')

    return publish


def card(folder: Path) -> tuple:
    """Return the header and the text of the model card."""
    _, header, text = (folder / 'README.md').read_text(encoding='utf-8').split('---\n', 2)
    return yaml.safe_load(header), text


def test_a_folder_loads_here_with_equal_outputs(publish):
    folder = publish()
    donor = model_of(DEMO_DETECTOR)
    donor.load_state_dict(read_checkpoint(str(folder.with_name('epoch_3.pth')))['state_dict'])
    weights = str(folder / 'model.safetensors')

    model = MODELS.build(Config.fromfile(folder / 'config.py').model).eval()
    fit_checkpoint(model, read_checkpoint(weights), weights)
    assert_same(outputs(model), outputs(donor))

    arguments = json.loads((folder / 'config.json').read_text())['backbone']
    image = torch.rand(1, 3, 65, 97)
    assert_same(pretrained(weights, **arguments)(image), donor.backbone(image))


def test_the_code_of_the_card_loads_the_backbone(monkeypatch, publish):
    folder = publish()
    monkeypatch.chdir(folder)
    names = {}
    exec(card(folder)[1].split('```python\n')[1].split('```')[0], names)
    stored = read_checkpoint('model.safetensors')['state_dict']
    for key, value in names['backbone'].state_dict().items():
        assert torch.equal(value, stored[f'backbone.{key}'])


def test_the_card_has_what_the_training_measured_of_these_weights(publish):
    log = '    CUDA available: True\n    GPU 0,1: NVIDIA H200\n    PyTorch: 2.14.1\n'
    header, text = card(publish(log, '--license apache-2.0'))
    assert header['license'] == 'apache-2.0'
    (result,) = header['model-index'][0]['results']
    assert result['metrics'] == [dict(type='coco/bbox_mAP', value=0.411)]
    assert result['dataset']['type'].endswith('annotations/instances_val2017.json')
    for said in ('| coco/bbox_mAP | 0.411 |', '2 x NVIDIA H200', '3 epochs', ', '.join(CLASSES)):
        assert said in text


@pytest.mark.parametrize(
    'log, processor',
    [
        ('    CUDA available: False\n  - CPU capability usage: AVX512\n', 'a CPU (AVX512)'),
        ('', 'unknown'),
    ],
)
def test_the_card_says_what_is_not_known(publish, log, processor):
    header, text = card(publish(log, epoch=4))
    assert 'model-index' not in header and header['license'] == 'unknown'
    assert "log has no validation of these weights" in text and f': {processor}.' in text


def test_checksums_are_those_of_the_files(publish):
    folder = publish()
    lines = [line.split('  ') for line in (folder / 'SHA256SUMS').read_text().splitlines()]
    assert {name for _, name in lines} | {'SHA256SUMS'} == {one.name for one in folder.iterdir()}
    for digest, name in lines:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_timm_finds_its_keys_of_a_published_architecture():
    """``timm.create_model('local-dir:...')`` needs architecture and pretrained_cfg."""
    assert TIMM_NAMES.keys() == ARCHITECTURES.keys()
    config = json_config(Config.fromfile(ROOT / 'configs/imagenet/cfpp_s_300e.py'))
    assert config['architecture'] == 'crossformer_pp_small' and config['num_classes'] == 1000
    groups = dict(group_size=(4, 4, 14, 7), interval=(4, 2, 1, 1), lda='block')
    assert config['model_args'] == groups
    prepared = config['pretrained_cfg']
    assert prepared['input_size'] == [3, 224, 224] and prepared['crop_pct'] == 0.875
    assert prepared['mean'] == pytest.approx([0.485, 0.456, 0.406], abs=1e-3)
    assert prepared['std'] == pytest.approx([0.229, 0.224, 0.225], abs=1e-3)
    detector = json_config(Config.fromfile(ROOT / 'configs/mask_rcnn/cf_s_1x.py'))
    assert detector['architecture'] == 'crossformer_small' and detector['num_classes'] == 0


def test_timm_reads_the_json(monkeypatch, tmp_path):
    hub = pytest.importorskip('timm.models._hub')
    config = json_config(Config.fromfile(ROOT / 'configs/imagenet/cf_s_300e.py'))
    (tmp_path / 'config.json').write_text(json.dumps(config))
    prepared, name, arguments = hub.load_model_config_from_path(str(tmp_path))
    assert name == 'crossformer_small' and prepared['num_classes'] == 1000
    assert arguments == json.loads(json.dumps(config['model_args']))


def test_what_cannot_be_a_folder_for_a_hub_is_said(refusal_of, monkeypatch, save, tmp_path):
    pytest.importorskip('safetensors')
    file = save()
    content = torch.load(file, weights_only=False)

    def said(cfg, *options) -> str:
        content['meta']['cfg'] = cfg
        torch.save(content, file)
        options = options or ('--hub', tmp_path / 'small')
        return refusal_of('publish_model.py', file, *options)

    text = content['meta']['cfg']
    marker = f"__import__('pathlib').Path({str(tmp_path / 'marker')!r}).touch()"
    assert 'has no config inside' in said(None)
    assert 'holds more than values and was not run' in said(f'model = {marker}')
    assert 'holds more than values and was not run' in said(marker)
    assert 'with the backbone CrossFormer' in said("model = dict(backbone=dict(type='ResNet'))")
    assert 'give the file to write, or --hub' in said(text, '--safetensors')
    assert 'give the file to write, or --hub' in said(text, 'out.pth', '--hub', 'small')
    content['meta']['hook_msgs'] = Marker(tmp_path / 'marker')
    assert 'was not run' in said(text)
    assert not (tmp_path / 'marker').exists()
    monkeypatch.setattr(checkpoint_module, 'is_installed', lambda name: name != 'safetensors')
    assert 'pip install safetensors' in said(text)
    monkeypatch.undo()
    (tmp_path / 'small').mkdir()
    assert said(text) == f"'{tmp_path / 'small'}' is there already; nothing was written."
    assert {one.name for one in tmp_path.iterdir()} == {RUN, 'epoch_3.pth', 'small'}
