"""The backbone needs PyTorch and einops only, and computes the same without MMEngine."""

import inspect
import pickletools
import zipfile

import numpy
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import initialize
from mmengine.model.weight_init import trunc_normal_
from mmengine.registry import MODELS

from crossformer_mm import CrossFormer
from crossformer_mm.checkpoint import read_checkpoint
from crossformer_mm.installed import NEED_MMENGINE
from crossformer_mm.position_bias import POSITION_BIASES, RelativePositionBias

from .helpers import run_python

ARCH = dict(embed_dims=32, depths=(1, 3, 4, 1), num_heads=(1, 2, 4, 8), cooling=True)
OPENMMLAB = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')
OTHERS = ('numpy', 'cv2', 'PIL')


def run_alone(program: str, *arguments, blocked=(*OPENMMLAB, *OTHERS), succeeds=True):
    """Run a program where packages are not installed; by default all but PyTorch and einops."""
    alone = f"""
import sys
from importlib.machinery import PathFinder

class Blocker(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition('.')[0] not in {blocked}:
            return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Blocker
import torch
torch.set_num_threads({torch.get_num_threads()})
"""
    done = run_python('-W', 'ignore', '-c', alone + program, *arguments)
    assert (done.returncode == 0) == succeeds, done.stderr
    return done


def train_once(**options) -> dict:
    """Initial weights, features and gradients of a backbone, by one seed."""
    torch.manual_seed(3)
    model = CrossFormer(ARCH, drop_path_rate=0.5, drop_rate=0.1, out_norm=True, **options)
    model.init_weights()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    image = torch.rand(2, 3, 66, 90, requires_grad=True)
    features = model(image)
    sum(feature.square().mean() for feature in features).backward()
    gradients = [image.grad, *(parameter.grad for parameter in model.parameters())]
    return dict(weights=weights, features=features, gradients=gradients)


def test_weights_features_and_gradients_have_the_same_bits(tmp_path):
    program = f"""
from crossformer_mm import CrossFormer
ARCH = {ARCH}
{inspect.getsource(train_once)}
torch.save([train_once(position_bias=name) for name in {POSITION_BIASES}], sys.argv[1])
assert not {{name.partition('.')[0] for name in sys.modules}} & {{*{OPENMMLAB}}}
"""
    run_alone(program, tmp_path / 'alone.pt')
    alone = torch.load(tmp_path / 'alone.pt', weights_only=True)
    for name, one in zip(POSITION_BIASES, alone):
        torch.testing.assert_close(one, train_once(position_bias=name), rtol=0, atol=0)


def test_initial_weights_are_those_of_mmengines_initialisers():
    torch.manual_seed(3)
    model = CrossFormer(ARCH)
    model.init_weights()
    torch.manual_seed(3)
    expected = CrossFormer(ARCH)
    linear = dict(type='TruncNormal', layer='Linear', std=0.02)
    initialize(expected, [linear, dict(type='Constant', layer='LayerNorm', val=1)])
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_position_biases_start_from_mmengines_random_numbers():
    torch.manual_seed(0)
    table = RelativePositionBias(4, 7).relative_position_bias_table
    torch.manual_seed(0)
    assert torch.equal(table, trunc_normal_(torch.empty_like(table), std=0.02))


def test_a_config_sets_initial_weights_of_inner_modules():
    """MMEngine's ``init_cfg`` reaches the layers, and its log names what set them."""
    cfg = [dict(type='Constant', layer='Linear', val=0.5), dict(type='Normal', layer='Mlp')]
    model = MODELS.build(dict(type='CrossFormer', arch=ARCH, init_cfg=cfg))
    model.init_weights()
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    assert layers and all((layer.weight == 0.5).all() for layer in layers)
    assert model.is_init


def test_checkpoints_are_read_without_mmengine(tmp_path):
    weights = CrossFormer(ARCH).state_dict()
    log = dict(log_scalars=dict(loss=HistoryBuffer([1.0], [1])))  # which holds arrays
    files = dict(
        whole=dict(state_dict={f'backbone.{key}': value for key, value in weights.items()}),
        log=dict(state_dict=weights, message_hub=log),
    )
    for name, content in files.items():
        torch.save(content, tmp_path / f'{name}.pth')
    program = f"""
from crossformer_mm import CrossFormer
for name in {[*files]}:
    file = f'{{sys.argv[1]}}/{{name}}.pth'
    model = CrossFormer({ARCH}, init_cfg=dict(type='Pretrained', checkpoint=file))
    model.init_weights()
    torch.save(model.state_dict(), f'{{sys.argv[1]}}/{{name}}_read.pth')
"""
    run_alone(program, tmp_path, blocked=OPENMMLAB)
    for name in files:
        read = torch.load(tmp_path / f'{name}_read.pth', weights_only=True)
        torch.testing.assert_close(read, weights, rtol=0, atol=0)
    done = run_alone(program, tmp_path, succeeds=False)
    assert 'it needs the package numpy, which is not installed.' in done.stderr


def test_pickled_models_have_the_classes_of_older_versions(tmp_path):
    torch.save(CrossFormer(ARCH, position_bias='absolute'), tmp_path / 'model.pt')
    with zipfile.ZipFile(tmp_path / 'model.pt') as archive:
        (name,) = [name for name in archive.namelist() if name.endswith('/data.pkl')]
        steps = pickletools.genops(archive.read(name))
        found = {argument for step, argument, _ in steps if step.name == 'GLOBAL'}
    assert {one for one in found if 'crossformer_mm' in one} == {
        'crossformer_mm.attention GroupAttention',
        'crossformer_mm.backbone CrossFormer',
        'crossformer_mm.backbone CrossFormerStage',
        'crossformer_mm.block CrossFormerBlock',
        'crossformer_mm.block DropPath',
        'crossformer_mm.embedding CrossScaleConvs',
        'crossformer_mm.embedding PatchEmbedding',
        'crossformer_mm.embedding PatchMerging',
        'crossformer_mm.layers Mlp',
        'crossformer_mm.position_bias AbsolutePosition',
        'crossformer_mm.position_bias NoPositionBias',
    }


def test_pickled_models_go_both_ways(tmp_path):
    model = CrossFormer(ARCH, frozen_stages=1)
    torch.save(model, tmp_path / 'model.pt')
    program = """
import crossformer_mm
torch.save(torch.load(sys.argv[1], weights_only=False), sys.argv[2])
"""
    run_alone(program, tmp_path / 'model.pt', tmp_path / 'back.pt')
    back = torch.load(tmp_path / 'back.pt', weights_only=False)
    image = torch.rand(1, 3, 70, 50)
    torch.testing.assert_close(back(image), model(image), rtol=0, atol=0)


def test_what_needs_mmengine_says_how_to_install_it():
    """Each module of the package can be imported, or says so."""
    program = f"""
import importlib, pkgutil
import crossformer_mm
for module in pkgutil.iter_modules(crossformer_mm.__path__):
    name = f'crossformer_mm.{{module.name}}'
    try:
        importlib.import_module(name)
    except ImportError as error:
        if any(package in str(error) for package in {OPENMMLAB}):
            assert f'{{name}} needs mmengine' in str(error) and 'pip install' in str(error), error
for name in {sorted(NEED_MMENGINE)}:
    try:
        exec(f'from crossformer_mm import {{name}}')
    except ImportError as error:
        assert f'crossformer_mm.{{name}} needs mmengine' in str(error), error
    else:
        raise AssertionError(name)
try:
    crossformer_mm.CrossFormer('t', init_cfg=dict(type='Xavier', layer='Linear')).init_weights()
except ImportError as error:
    print(error)
"""
    (said,) = run_alone(program, blocked=OPENMMLAB).stdout.splitlines()
    assert "'Xavier'" in said and 'needs mmengine, which is not installed: pip install' in said


def test_a_checkpoint_with_a_log_is_read_with_mmengine(tmp_path):
    torch.save(dict(a=torch.ones(1), log=HistoryBuffer([1.0], [1])), tmp_path / 'log.pth')
    assert numpy.allclose(read_checkpoint(str(tmp_path / 'log.pth'))['log'].mean(), 1)
