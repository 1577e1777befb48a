"""Backports of newer PyTorch do what its releases do, or refuse."""

import io
import pickle
import tarfile
import zipfile
from types import SimpleNamespace
from typing import List

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from crossformer_mm import compat
from crossformer_mm.checkpoint import SAFE_GLOBALS, CheckpointError, read_checkpoint
from crossformer_mm.compat import define_operator, missing_torch, schema_of
from crossformer_mm.without_torch.files import is_cut_short

from .helpers import Marker, assert_same


def test_schema_is_that_of_the_annotations():
    def function(x: Tensor, size: int, sides: List[int], scale: float, flag: bool) -> tuple:
        """Not called."""

    function.__annotations__['return'] = Tensor
    assert schema_of(function) == (
        '(Tensor x, SymInt size, SymInt[] sides, float scale, bool flag) -> Tensor'
    )


def twice(x: Tensor, factor: int) -> Tensor:
    return x * factor


def shape(x: Tensor, factor: int) -> Tensor:
    return torch.empty_like(x)


@pytest.fixture(scope='module')
def operators():
    def keep(ctx, inputs, output) -> None:
        ctx.factor = inputs[1]

    def backward(ctx, gradient) -> tuple:
        return plain(gradient, ctx.factor), None

    plain = define_operator('test_without_gradient', twice, shape)
    differentiable = dict(setup_context=keep, backward=backward)
    return plain, define_operator('test_with_gradient', twice, shape, **differentiable)


def test_operator_is_the_function_with_its_gradient(operators):
    _, operator = operators
    x = torch.randn(3, requires_grad=True)
    out = operator(x, 5)
    torch.testing.assert_close(out, 5 * x)
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    assert gradient.tolist() == [5.0] * 3
    assert operator(x.detach(), 5).grad_fn is None


def test_operator_without_gradient_says_so(operators):
    plain, _ = operators
    x = torch.randn(3, requires_grad=True)
    assert not plain(x.detach(), 2).requires_grad
    with pytest.raises(RuntimeError, match='no autograd formula'):
        plain(x, 2).sum().backward()


def test_operator_without_gradient_serves_an_autograd_function(operators):
    plain, _ = operators

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return plain(x, 3)

        @staticmethod
        def backward(ctx, gradient):
            return plain(gradient, 3)

    x = torch.randn(2, requires_grad=True)
    Function.apply(x).sum().backward()
    assert x.grad.tolist() == [3.0] * 2


def test_operator_has_shapes_without_data(operators):
    for operator in operators:
        out = operator(torch.empty(4, 7, device='meta'), 2)
        assert out.device.type == 'meta' and out.shape == (4, 7)


def test_missing_torch_is_said_in_a_clause(monkeypatch):
    monkeypatch.setattr(compat, 'TORCH', (2, 4))
    assert not missing_torch('2.4') and not missing_torch('2.1')
    assert '2.10' in missing_torch('2.10') and torch.__version__ in missing_torch('2.10')


@pytest.fixture(params=['as on this PyTorch', 'as before 2.6'])
def release(request, monkeypatch):
    """Both ways of reading, where this PyTorch still has the parts of the older."""
    if request.param == 'as before 2.6':
        if not hasattr(torch._weights_only_unpickler, '_get_allowed_globals'):
            pytest.skip('this PyTorch has no torch._weights_only_unpickler._get_allowed_globals')
        monkeypatch.setattr(compat, 'TORCH', (2, 1))
    return request.param


@pytest.mark.parametrize('zipped', [True, False])
def test_plain_data_is_read(release, tmp_path, zipped):
    state = {'a.weight': torch.randn(3, 2).half(), 'flag': torch.tensor(True)}
    meta = dict(classes=('one', 'two'), used={1, 2}, dtype=torch.bfloat16, raw=b'\0\xff')
    meta.update(number=np.float64(0.5), array=np.arange(3), device=torch.device('cpu'))
    kept = dict(state_dict=state, meta=meta)
    torch.save(kept, tmp_path / 'file.pth', _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(str(tmp_path / 'file.pth'))
    assert_same(found['state_dict'], state)
    assert found['meta'].pop('array').tolist() == meta.pop('array').tolist()
    assert found['meta'] == meta


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('protocol', [2, 4])
def test_code_is_not_run(release, tmp_path, zipped, protocol):
    options = dict(_use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    content = dict(state_dict={}, extra=Marker(tmp_path / 'marker'))
    torch.save(content, tmp_path / 'file.pth', **options)
    with pytest.raises(CheckpointError, match=r'was not run|no file of plain weights'):
        read_checkpoint(str(tmp_path / 'file.pth'))
    assert not (tmp_path / 'marker').exists()


def test_script_is_not_run(release, tmp_path):
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / 'file.pth')
    with pytest.raises(CheckpointError, match='it is a TorchScript archive, a program'):
        read_checkpoint(str(tmp_path / 'file.pth'))


def test_script_hidden_from_other_readers_of_archives_is_not_run(release, tmp_path):
    path = tmp_path / 'file.pth'
    torch.jit.script(torch.nn.Linear(1, 1)).save(path)
    plain = io.BytesIO()
    with zipfile.ZipFile(plain, 'w') as file:
        file.writestr('archive/data.pkl', pickle.dumps({}, 2))
    for data in (path.read_bytes() + plain.getvalue(), plain.getvalue() + path.read_bytes()):
        path.write_bytes(data)
        try:
            found = read_checkpoint(str(path))
        except CheckpointError:
            continue
        assert isinstance(found, dict)


def stream(*codes) -> bytes:
    """A pickle by its codes."""
    return b'\x80\x02' + b''.join(codes) + b'.'


@pytest.mark.parametrize(
    'codes',
    [
        # An instance of, a call of, and a state for what may be named but is not to be used so.
        (b'cbuiltins\neval\n', b'(U\x011tR'),
        (b'(U\x011ibuiltins\neval\n',),
        (b'(cbuiltins\neval\nU\x011o',),
        (b'cos\nsystem\n', b'(U\x04truetR'),
        (b'ctorch._utils\n_rebuild_tensor_v2.__globals__\n',),
        (b'\x82\x01',),
        (b'}', b'}', b'b'),
        (b'U\x01a', b')R'),
        (b'U\x06module', b'U\x01a', b'\x86', b'Q'),
    ],
)
def test_what_pickles_can_do_is_not_done(codes):
    reader = compat.plain_pickle(SAFE_GLOBALS).Unpickler(io.BytesIO(stream(*codes)))
    reader.persistent_load = lambda name: pytest.fail(f'asked for {name}')
    with pytest.raises((compat.ForeignObject, pickle.UnpicklingError, KeyError, TypeError)):
        reader.load()


def test_archive_of_tar_is_not_unpacked(release, tmp_path):
    with tarfile.open(tmp_path / 'file.pth', 'w') as file:
        for name in ('storages', 'tensors', 'pickle'):
            file.addfile(tarfile.TarInfo(name))
    with pytest.raises(CheckpointError, match='no file of plain weights'):
        read_checkpoint(str(tmp_path / 'file.pth'))


def test_environment_may_ask_for_safe_reading(release, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')
    torch.save(dict(number=np.float64(0.5)), tmp_path / 'file.pth')
    assert read_checkpoint(str(tmp_path / 'file.pth')) == dict(number=0.5)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
@pytest.mark.parametrize(
    'options', [{}, dict(progressive=True), dict(optimize=True, restart_marker_rows=1)]
)
def test_jpeg_that_is_cut_short_is_known_by_its_end(mode, options):
    noise = np.random.default_rng(0).integers(256, size=(61, 83, 3), dtype=np.uint8)
    for quality in (5, 75, 100):
        buffer = io.BytesIO()
        Image.fromarray(noise).convert(mode).save(buffer, 'jpeg', quality=quality, **options)
        data = buffer.getvalue()
        assert not is_cut_short(data)
        assert not is_cut_short(data + b'\0' * 10)  # as some cameras leave
        for part in (3, 50, len(data) // 2, len(data) - 2):
            assert is_cut_short(data[:part]), part


def test_end_of_a_preview_is_not_that_of_the_jpeg():
    image = np.random.default_rng(0).integers(256, size=(60, 80, 3), dtype=np.uint8)
    for kind in ([], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]):
        data = cv2.imencode('.jpg', image, kind)[1].tobytes()
        preview = cv2.imencode('.jpg', image[:8, :8])[1].tobytes()
        size = (len(preview) + 2).to_bytes(2, 'big')
        whole = data[:2] + b'\xff\xe1' + size + preview + data[2:]
        assert not is_cut_short(whole)
        assert is_cut_short(whole[:-100])


@pytest.mark.parametrize('data', [b'', b'\x89PNG', b'GIF8'])
def test_other_files_are_none_of_its_business(data):
    assert not is_cut_short(data)


@pytest.mark.parametrize(
    'onednn, capability, sets, fast',
    [
        (False, 'AVX2', (True, True), False),
        (True, 'AVX512', (False, False), False),
        (True, 'AVX512', (True, False), True),
        (True, 'AVX512', (False, True), True),
        (True, 'AVX512', None, True),  # an older PyTorch
        (True, 'DEFAULT', (False, False), True),  # not x86
    ],
)
def test_bfloat16_needs_instructions_for_it(onednn, capability, sets, fast, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: True)
    operators = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: onednn)
    monkeypatch.setattr(torch.ops, 'mkldnn', operators, raising=False)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    for index, name in enumerate(('_is_avx512_bf16_supported', '_is_amx_tile_supported')):
        if sets:
            monkeypatch.setattr(torch.cpu, name, lambda index=index: sets[index], raising=False)
        else:
            monkeypatch.delattr(torch.cpu, name, raising=False)
    assert compat.multiplies_bfloat16.__wrapped__() == fast
