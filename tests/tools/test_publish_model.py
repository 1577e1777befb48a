"""Publishing a checkpoint, and safetensors files."""

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from crossformer_mm import checkpoint as checkpoint_module
from crossformer_mm.checkpoint import CheckpointError, read_checkpoint, use_safe_loading

from ..authors import imagenet_file, later, openmmlab_file
from ..conftest import SMALL
from ..helpers import CLASSES, DEMO_DETECTOR, ROOT, Marker, assert_same, model_of, pretrained

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


@pytest.fixture
def file(tmp_path) -> Path:
    torch.save(runner_file(model_of(DEMO_DETECTOR)), tmp_path / 'epoch_3.pth')
    return tmp_path / 'epoch_3.pth'


@pytest.fixture
def publish(output_of):
    """Runs the tool; the file that it says it has written."""

    def publish(*arguments) -> Path:
        said = output_of('publish_model.py', *arguments).splitlines()
        (path,) = [line for line in said if Path(line).is_file()]
        return Path(path)

    return publish


@pytest.fixture(params=['.pth', '.safetensors'])
def suffix(request) -> str:
    if request.param == '.safetensors':
        pytest.importorskip('safetensors')
    return request.param


@pytest.fixture
def published(publish, file, suffix) -> Path:
    return publish(file, file.with_name(f'small_v1.0{suffix}'))


def test_published_file_has_its_hash_in_its_name(published, file, suffix):
    digits = hashlib.sha256(published.read_bytes()).hexdigest()[:8]
    assert published == file.with_name(f'small_v1.0-{digits}{suffix}')
    assert published.stat().st_size < file.stat().st_size / 2
    assert set(file.parent.iterdir()) == {file, published}


def test_published_file_keeps_weights_and_their_meaning_alone(published, file):
    source, content = (read_checkpoint(str(path)) for path in (file, published))
    assert set(content) == {'state_dict', 'meta'}
    assert_same(content['state_dict'], source['state_dict'])
    meta = content['meta']
    assert set(meta) == {'dataset_meta', 'cfg', 'epoch', 'iter', 'mmengine_version'}
    assert tuple(meta['dataset_meta']['classes']) == CLASSES
    assert np.array_equal(meta['dataset_meta']['palette'], np.arange(12).reshape(4, 3))
    assert meta['cfg'] == source['meta']['cfg']


@pytest.mark.parametrize('name', ['weights', 'weights.pth', 'weights.safetensors'])
def test_safetensors_option_settles_the_suffix(publish, file, name):
    pytest.importorskip('safetensors')
    path = publish(file, file.with_name(name), '--safetensors')
    assert re.fullmatch(r'weights-[0-9a-f]{8}\.safetensors', path.name)


def test_an_inferencer_needs_nothing_but_the_published_file(published, file):
    from mmdet.apis import DetInferencer

    use_safe_loading()  # by which mmengine reads safetensors
    image = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    options = dict(device='cpu', show_progress=False)
    found = [DetInferencer(weights=str(path), **options) for path in (file, published)]
    assert tuple(found[1].model.dataset_meta['classes']) == CLASSES
    expected, predictions = (
        one(image, no_save_vis=True, pred_score_thr=0)['predictions'][0] for one in found
    )
    assert predictions == expected


@pytest.mark.parametrize('layout', ['imagenet', 'openmmlab'])
def test_the_authors_files_can_be_published(publish, small, tmp_path, suffix, layout):
    if layout == 'imagenet':
        content = imagenet_file(small(), later)
    else:
        content = openmmlab_file(model_of(DEMO_DETECTOR), later, CLASSES=CLASSES)
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
    assert [path.name for path in tmp_path.iterdir()] == ['in.pth']


# safetensors


@pytest.fixture
def safe(tmp_path, small) -> Path:
    """A backbone's weights as the format's own package writes them."""
    package = pytest.importorskip('safetensors.torch')
    package.save_file(small().state_dict(), tmp_path / 'weights.safetensors')
    return tmp_path / 'weights.safetensors'


@pytest.mark.parametrize('share', [0, 0.001, 0.5, 0.999])
def test_truncated_safetensors_file_is_refused(safe, share):
    os.truncate(safe, int(share * safe.stat().st_size))
    with pytest.raises(CheckpointError, match='cut short'):
        pretrained(safe, SMALL)


def test_without_the_package_one_sentence_names_it(refusal_of, monkeypatch, small, tmp_path):
    monkeypatch.setattr(checkpoint_module, 'is_installed', lambda name: False)
    (tmp_path / 'empty.safetensors').write_bytes((2).to_bytes(8, 'little') + b'{}')
    with pytest.raises(CheckpointError, match='pip install safetensors'):
        pretrained(tmp_path / 'empty.safetensors', SMALL)
    torch.save(small().state_dict(), tmp_path / 'in.pth')
    said = refusal_of('publish_model.py', tmp_path / 'in.pth', tmp_path / 'out.safetensors')
    assert 'pip install safetensors' in said


@pytest.mark.parametrize('zoo', ['torchvision', 'open-mmlab', 'mmcls', 'pavi'])
def test_names_in_model_zoos_are_refused(zoo):
    use_safe_loading()
    with pytest.raises(CheckpointError, match='download the file and give its path'):
        CheckpointLoader.load_checkpoint(f'{zoo}://resnet50', 'cpu')
