"""A model of an exported file: what it takes and returns, in threads, in copies, behind HTTP."""

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest

from crossformer_mm.without_torch.files import find_files
from crossformer_mm.without_torch.model import Model, ModelError, start_openvino
from crossformer_mm.without_torch.predict import predict_files

from ..helpers import ROOT, free_port, read_json, run_python


@pytest.fixture
def model(exported) -> Model:
    return Model(exported('mask_rcnn').file)


def copy_to_server(folder: Path, *files: str) -> None:
    """Copy what the page on deployment says."""
    shutil.copytree(ROOT / 'crossformer_mm/without_torch', folder / 'without_torch')
    for file in files:
        shutil.copy(ROOT / file, folder)


def answers_differ(one: dict, other: dict) -> bool:
    scores = one['scores'], other['scores']
    return len(scores[0]) != len(scores[1]) or not np.allclose(*scores, atol=1e-3)


@pytest.mark.parametrize('provider', ['cpu', 'openvino'])
def test_each_thread_gets_the_answer_of_its_image(exported, photos, provider):
    if provider == 'openvino':
        pytest.importorskip('openvino')
    model = Model(exported('mask_rcnn').file, provider, 1)
    images = [cv2.imread(str(photos / f'{name}.png')) for name in 'abef']
    alone = [model(image) for image in images]
    assert all(answers_differ(alone[0], other) for other in alone[1:])
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(model, images * 4))
    for wanted, found in zip(alone * 4, together):
        assert not answers_differ(wanted, found)


def test_no_two_calls_share_a_request_of_openvino(monkeypatch, tmp_path):
    """A stand-in for a request returns what it holds when the last of four threads has come."""
    all_there = threading.Barrier(4)

    class Request:
        def infer(self, given):
            self.held = given['image']
            all_there.wait(20)
            return [self.held]

    compiled = mock.Mock(create_infer_request=Request, side_effect=Request().infer)
    compiled.inputs = compiled.outputs = [mock.Mock(any_name='image')]
    core = mock.Mock()
    core.compile_model.return_value = compiled
    core.read_model.return_value.get_rt_info.return_value.value = {}
    monkeypatch.setitem(sys.modules, 'openvino', mock.Mock(Core=lambda: core))
    _, _, compute, _ = start_openvino('model.onnx', 1)
    with ThreadPoolExecutor(4) as threads:
        answers = threads.map(lambda number: compute(dict(image=np.array(number))), range(4))
    assert [int(answer[0]) for answer in answers] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    'image, found',
    [
        (None, 'None, which cv2.imread returns for a file that it cannot read'),
        (np.zeros((9, 8), np.uint8), 'uint8 (9, 8)'),
        (np.zeros((9, 8, 1), np.uint8), 'uint8 (9, 8, 1)'),
        (np.zeros((9, 8, 4), np.uint8), 'uint8 (9, 8, 4)'),
        (np.zeros((3, 9, 8), np.uint8), 'uint8 (3, 9, 8)'),
        (np.zeros((1, 9, 8, 3), np.uint8), 'uint8 (1, 9, 8, 3)'),
        (np.zeros((0, 8, 3), np.uint8), 'uint8 (0, 8, 3)'),
        (np.zeros((9, 8, 3), np.uint16), 'uint16 (9, 8, 3)'),
        (np.zeros((9, 8, 3), np.float32), 'float32 (9, 8, 3)'),
        (np.zeros((9, 8, 3), np.int64), 'int64 (9, 8, 3)'),
        (np.zeros((9, 8, 3), np.uint8).tolist(), 'a list'),
        ('photo.jpg', 'a str'),
    ],
    ids=str,
)
def test_a_model_takes_colour_images_of_8_bits_only(model, image, found):
    with pytest.raises(ModelError) as raised:
        model(image)
    said = str(raised.value)
    assert said.startswith('image: it must be an array of uint8 (height, width, 3)')
    assert said.endswith(f'{found}.') and '\n' not in said


def test_a_model_takes_views_and_arrays_that_are_read_only(model, photos):
    image = cv2.imread(str(photos / 'a.png'))
    wanted = model(image)
    view = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    image.setflags(write=False)
    for given in (image, view):
        assert not answers_differ(wanted, model(given))


def test_an_error_keeps_what_was_predicted_before(model, photos, tmp_path, monkeypatch):
    predict, calls = Model.__call__, []

    def fail_at_third(model, image):
        calls.append(image)
        if len(calls) == 3:
            raise RuntimeError('a fault of the runtime')
        return predict(model, image)

    monkeypatch.setattr(Model, '__call__', fail_at_third)
    with pytest.raises(RuntimeError, match='a fault of the runtime'):
        predict_files(model, find_files([str(photos)], tmp_path), tmp_path, None, 0.3)
    listed = read_json(tmp_path / 'images.json')['images']
    assert [one['file_name'] for one in listed] == ['a.png', 'b.png']
    assert read_json(tmp_path / 'results.bbox.json')


def test_an_image_without_objects_has_no_boxes(model):
    run = model.run
    model.run = lambda given: [values[:0] for values in run(given)]
    found = model(np.zeros((50, 70, 3), np.uint8))
    assert found['boxes'].shape == (0, 4) and found['masks'].shape == (0, 50, 70)


def test_a_copy_runs_without_the_repository_and_imports_nothing_of_pytorch(
    exported, photos, tmp_path
):
    copy_to_server(tmp_path, 'tools/run_onnx.py')
    (tmp_path / 'a.png').write_bytes((photos / 'a.png').read_bytes())
    file, alone = str(exported('mask_rcnn').file), dict(folder=tmp_path, PYTHONPATH='')
    done = run_python('run_onnx.py', file, 'a.png', **alone)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'predictions/pictures/a.jpg').is_file()
    code = f"""
import sys, cv2
sys.path.insert(0, {str(tmp_path)!r})
from run_onnx import Model
found = Model({file!r})(cv2.imread({str(photos / 'a.png')!r}))
print(sorted(found), [one for one in ('torch', 'mmcv', 'mmengine', 'crossformer_mm') if one in sys.modules])"""
    done = run_python('-c', code, **alone)
    assert done.stdout.strip() == "['boxes', 'labels', 'masks', 'scores'] []", done.stderr


@pytest.mark.parametrize(
    'tool, folder',
    [
        ('tools/run_onnx.py', 'crossformer_mm'),
        ('site-packages/crossformer_mm/.mim/tools/run_onnx.py', 'site-packages/crossformer_mm'),
    ],
    ids=['in the repository', 'installed'],
)
def test_the_command_finds_its_modules_wherever_it_is(tmp_path, tool, folder):
    (tmp_path / tool).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / 'tools/run_onnx.py', tmp_path / tool)
    shutil.copytree(ROOT / 'crossformer_mm/without_torch', tmp_path / folder / 'without_torch')
    done = run_python(tmp_path / tool, 'none.onnx', __file__, folder=tmp_path, PYTHONPATH='')
    assert done.returncode == 2
    assert done.stderr.strip() == "error: model: file 'none.onnx' does not exist."


def test_the_service_answers_over_http(exported, photos, tmp_path):
    """In a process of its own, from copied files, with a real port."""
    for package in ('fastapi', 'uvicorn', 'httpx', 'python_multipart'):
        pytest.importorskip(package)
    import httpx

    port, file = free_port(), exported('mask_rcnn').file
    copy_to_server(tmp_path, 'examples/service.py')
    server = subprocess.Popen(
        [sys.executable, '-m', 'uvicorn', 'service:app', '--port', port],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': '', 'MODEL': str(file)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        next(line for line in server.stderr if 'running on' in line)
        with httpx.Client(base_url=f'http://127.0.0.1:{port}', timeout=60) as client:
            image = (photos / 'a.png').read_bytes()
            found = client.post('/predict', files=dict(image=image)).json()['objects']
            assert client.get('/about').json()['classes'] == ['a', 'b', 'c', 'd']
            refused = client.post('/predict', files=dict(image=b'no image'))
            assert refused.status_code == 415 and 'is no image' in refused.json()['detail']
    finally:
        server.kill()
        server.communicate()
    wanted = Model(file)(cv2.imread(str(photos / 'a.png')))['scores']
    assert [one['score'] for one in found] == pytest.approx(wanted, abs=1e-5) and found
    assert set(found[0]) == {'label', 'score', 'box', 'area'}
