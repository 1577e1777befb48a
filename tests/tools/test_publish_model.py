"""Publishing a checkpoint, safetensors files, and going on from what mmengine's Runner saves."""

import hashlib
import json
import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import CheckpointLoader, Runner

from crossformer_mm import CrossFormer
from crossformer_mm import checkpoint as checkpoint_module
from crossformer_mm.checkpoint import (
    CheckpointError,
    fit_checkpoint,
    read_checkpoint,
    use_safe_loading,
)

from ..authors import imagenet_file, later, openmmlab_file
from ..conftest import SMALL
from ..helpers import CLASSES, DEMO_DETECTOR, ROOT, Marker, model_of, outputs

pytestmark = pytest.mark.usefixtures('own_loaders')


def runner_file(model) -> dict:
    """Return a checkpoint as mmengine's Runner saves it."""
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    cfg = Config.fromfile(ROOT / DEMO_DETECTOR)
    cfg.model.backbone.out_norm = False
    return dict(
        meta=dict(
            epoch=3,
            iter=12,
            cfg=cfg.pretty_text,
            seed=0,
            experiment_name='small',
            mmengine_version='0.10.7',
            hook_msgs={},
            dataset_meta=dict(classes=CLASSES, palette=np.arange(12).reshape(4, 3)),
        ),
        state_dict=model.state_dict(),
        optimizer=optimizer.state_dict(),
        param_schedulers=[{}],
        message_hub=dict(
            log_scalars=dict(loss=HistoryBuffer([1.0, 2.0], [1, 1])),
            runtime_info=dict(cfg=cfg.pretty_text),
            resumed_keys={},
        ),
    )


@pytest.fixture(scope='module')
def trained():
    return model_of(DEMO_DETECTOR)


@pytest.fixture
def file(tmp_path, trained) -> Path:
    torch.save(runner_file(model_of(DEMO_DETECTOR)), tmp_path / 'epoch_3.pth')
    return tmp_path / 'epoch_3.pth'


@pytest.fixture
def publish(output_of):
    """Runs the tool; the file that it says it has written."""
    return lambda *arguments: Path(output_of('publish_model.py', *arguments).splitlines()[-1])


@pytest.fixture(params=['.pth', '.safetensors'])
def suffix(request) -> str:
    if request.param == '.safetensors':
        pytest.importorskip('safetensors')
    return request.param


def test_published_file_has_its_hash_in_its_name(publish, file, suffix):
    size = file.stat().st_size
    path = publish(file, file.with_name(f'small_v1.0{suffix}'))
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    assert path == file.with_name(f'small_v1.0-{digits}{suffix}')
    assert path.stat().st_size < size / 2
    assert set(file.parent.iterdir()) == {file, path}


def test_published_file_keeps_weights_and_their_meaning_alone(publish, file, suffix):
    source = read_checkpoint(str(file))
    path = publish(file, file.with_name(f'out{suffix}'))
    content = read_checkpoint(str(path))
    assert set(content) == {'state_dict', 'meta'}
    assert content['state_dict'].keys() == source['state_dict'].keys()
    for key, value in source['state_dict'].items():
        assert torch.equal(content['state_dict'][key], value)
    meta = content['meta']
    assert set(meta) == {'dataset_meta', 'cfg', 'epoch', 'iter', 'mmengine_version'}
    assert tuple(meta['dataset_meta']['classes']) == CLASSES
    assert np.array_equal(meta['dataset_meta']['palette'], np.arange(12).reshape(4, 3))
    assert meta['cfg'] == source['meta']['cfg']


def test_published_file_gives_equal_outputs_and_features(publish, file, suffix):
    path = publish(file, file.with_name(f'out{suffix}'))
    donor, model = model_of(DEMO_DETECTOR), model_of(DEMO_DETECTOR)
    donor.load_state_dict(torch.load(file, weights_only=False)['state_dict'])
    fit_checkpoint(model, read_checkpoint(str(path)), str(path))
    for value, expected in zip(outputs(model), outputs(donor), strict=True):
        assert torch.equal(value, expected)
    arch = Config.fromfile(ROOT / DEMO_DETECTOR).model.backbone.arch
    backbone = CrossFormer(arch, init_cfg=dict(type='Pretrained', checkpoint=str(path))).eval()
    backbone.init_weights()
    image = torch.rand(1, 3, 65, 97)
    with torch.no_grad():
        for value, expected in zip(backbone(image), donor.backbone(image), strict=True):
            assert torch.equal(value, expected)


@pytest.mark.parametrize('name', ['weights', 'weights.pth', 'weights.safetensors'])
def test_safetensors_option_settles_the_suffix(publish, file, name):
    pytest.importorskip('safetensors')
    path = publish(file, file.with_name(name), '--safetensors')
    assert re.fullmatch(r'weights-[0-9a-f]{8}\.safetensors', path.name)


def test_an_inferencer_needs_nothing_but_the_published_file(publish, file, suffix):
    from mmdet.apis import DetInferencer

    path = publish(file, file.with_name(f'out{suffix}'))
    use_safe_loading()  # by which mmengine reads safetensors
    image = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    found = [
        DetInferencer(weights=str(one), device='cpu', show_progress=False) for one in (file, path)
    ]
    assert tuple(found[1].model.dataset_meta['classes']) == CLASSES
    expected, predictions = (
        one(image, no_save_vis=True, pred_score_thr=0)['predictions'][0] for one in found
    )
    assert predictions == expected


@pytest.mark.parametrize('layout', ['imagenet', 'openmmlab'])
def test_the_authors_files_can_be_published(publish, small, tmp_path, trained, suffix, layout):
    content = (
        imagenet_file(small(), later)
        if layout == 'imagenet'
        else openmmlab_file(trained, later, CLASSES=CLASSES)
    )
    torch.save(content, tmp_path / 'in.pth')
    path = publish(tmp_path / 'in.pth', tmp_path / f'out{suffix}')
    meta = read_checkpoint(str(path))['meta']
    assert meta == {} if layout == 'imagenet' else tuple(meta['CLASSES']) == CLASSES


def test_a_published_file_is_never_overwritten(publish, refusal_of, file):
    arguments = file, file.with_name('out.pth')
    path = publish(*arguments)
    before = path.stat()
    said = refusal_of('publish_model.py', *arguments)
    assert said == f"'{path}' is there already; nothing was written."
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_an_interrupted_writing_leaves_nothing(refusal_of, monkeypatch, file):
    def full(path, data):
        with open(path, 'wb') as half:
            half.write(data[: len(data) // 2])
        raise OSError('No space left on device')

    monkeypatch.setattr(Path, 'write_bytes', full)
    said = refusal_of('publish_model.py', file, file.with_name('out.pth'))
    assert 'No space left on device' in said
    assert list(file.parent.iterdir()) == [file]


def test_bad_input_is_said_in_one_sentence(refusal_of, tmp_path):
    def said(content, out='out.pth'):
        path = tmp_path / 'in.pth'
        torch.save(content, path)
        return refusal_of('publish_model.py', path, tmp_path / out)

    weights = dict(state_dict={'weight': torch.ones(2)})
    assert 'holds no weights' in said({})
    assert 'holds no weights' in said([1])
    assert 'must end in' in said(weights, 'out.onnx')
    assert "nowhere' does not exist" in said(weights, 'nowhere/out.pth')
    assert 'was not run' in said(dict(weights, meta=Marker(tmp_path / 'marker')))
    assert not (tmp_path / 'marker').exists()
    assert "'none.pth' does not exist" in refusal_of(
        'publish_model.py', 'none.pth', tmp_path / 'out.pth'
    )
    assert [path.name for path in tmp_path.iterdir()] == ['in.pth']


# safetensors


def safetensors_file(path: Path, state: dict) -> Path:
    """A file of the format, written by its definition: no package is needed."""
    head, data = {}, b''
    for key, value in state.items():
        part = value.contiguous().numpy().tobytes()
        head[key] = dict(
            dtype='F32', shape=list(value.shape), data_offsets=[len(data), len(data) + len(part)]
        )
        data += part
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, 'little') + text + data)
    return path


def load(path: Path) -> CrossFormer:
    backbone = CrossFormer(SMALL, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    backbone.init_weights()
    return backbone


def test_safetensors_file_gives_its_backbone(small, tmp_path):
    pytest.importorskip('safetensors')
    donor = small()
    backbone = load(safetensors_file(tmp_path / 'weights.safetensors', donor.state_dict()))
    for key, value in donor.state_dict().items():
        assert torch.equal(backbone.state_dict()[key], value)


@pytest.mark.parametrize('share', [0, 0.001, 0.5, 0.999])
def test_truncated_safetensors_file_is_refused(small, tmp_path, share):
    pytest.importorskip('safetensors')
    path = safetensors_file(tmp_path / 'weights.safetensors', small().state_dict())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match='cut short'):
        load(path)


def test_without_the_package_one_sentence_names_it(refusal_of, monkeypatch, small, tmp_path):
    monkeypatch.setattr(checkpoint_module, 'is_installed', lambda name: False)
    path = safetensors_file(tmp_path / 'weights.safetensors', small().state_dict())
    with pytest.raises(CheckpointError, match='pip install safetensors'):
        load(path)
    torch.save(small().state_dict(), tmp_path / 'in.pth')
    said = refusal_of('publish_model.py', tmp_path / 'in.pth', tmp_path / 'out.safetensors')
    assert 'pip install safetensors' in said


# Going on from our own checkpoints


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, inputs, mode='loss'):
        return dict(loss=self.layer(torch.stack(inputs)).square().mean())


def toy_runner(work: Path, name: str, **options) -> Runner:
    data = [dict(inputs=torch.full((3,), i / 8)) for i in range(12)]
    return Runner(
        Toy(),
        str(work),
        train_dataloader=dict(
            dataset=data, batch_size=2, sampler=dict(type='DefaultSampler', shuffle=False)
        ),
        train_cfg=dict(by_epoch=False, max_iters=6),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
        param_scheduler=dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=6),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=3, by_epoch=False)),
        experiment_name=name,
        default_scope='mmengine',
        **options,
    )


def test_resuming_restores_the_whole_state_of_a_training(tmp_path):
    use_safe_loading()
    whole = toy_runner(tmp_path / 'whole', 'whole')
    whole.train()
    saved = read_checkpoint(str(tmp_path / 'whole' / 'iter_3.pth'))
    again = toy_runner(
        tmp_path / 'again', 'again', resume=True, load_from=str(tmp_path / 'whole' / 'iter_3.pth')
    )
    seen = {}  # right after resuming, before the next iteration

    resume = again.resume

    def resume_and_look(*arguments, **options):
        resume(*arguments, **options)
        # Copies: the state that a state_dict names goes on changing.
        seen.update(
            optimizer=deepcopy(again.optim_wrapper.state_dict()),
            iter=again.iter,
            schedulers=[deepcopy(one.state_dict()) for one in again.param_schedulers],
            loss=again.message_hub.get_scalar('train/loss').data[0].copy(),
        )

    again.resume = resume_and_look
    again.train()
    assert seen['iter'] == 3 and len(seen['loss']) == 3
    assert seen['schedulers'] == saved['param_schedulers']
    for index, state in saved['optimizer']['state'].items():
        for key, value in state.items():
            assert torch.equal(seen['optimizer']['state'][index][key], value) and value.any()
    # and what comes after is what would have come without the interruption
    for key, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value)
    curves = [one.message_hub.get_scalar('train/loss').data[0] for one in (whole, again)]
    assert len(curves[0]) == 6 and np.array_equal(*curves)


@pytest.mark.parametrize(
    'address',
    ['torchvision://resnet50', 'open-mmlab://resnet50', 'mmcls://resnet50', 'pavi://resnet50'],
)
def test_names_in_model_zoos_are_refused(address):
    use_safe_loading()
    with pytest.raises(CheckpointError, match='download the file and give its path'):
        CheckpointLoader.load_checkpoint(address, 'cpu')
