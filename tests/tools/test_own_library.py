"""The tools that train, test and count take any library of MMEngine's, such as a user's own."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from crossformer_mm import CrossFormer
from crossformer_mm.checkpoint import read_checkpoint

from ..trainings import assert_same_training

# Names that mean other things in this library than in OpenMMLab's: split, num_classes, classes, topk.
LIBRARY = dict(
    __init__='',
    apis='class CornerInferencer(BaseInferencer): ...',
    registry='''
from mmengine import registry

def own(name, parent):
    here = dict(scope='corner_points', locations=['corner_points.parts'])
    return registry.Registry(name, parent=parent, **here)

MODELS = own('model', registry.MODELS)
DATASETS = own('dataset', registry.DATASETS)
METRICS = own('metric', registry.METRICS)
''',
    parts='''
import json

import numpy as np
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from torch import nn

from .registry import DATASETS, METRICS, MODELS


@DATASETS.register_module()
class Corners(BaseDataset):
    METAINFO = dict(classes=('left', 'right', 'top'), sigmas=np.array([0.1, 0.2]))

    def __init__(self, split, **kwargs):
        super().__init__(ann_file=f'{split}.json', **kwargs)

    def load_data_list(self):
        images = json.load(open(self.ann_file))
        return [
            dict(img_path=f'{self.data_root}/{name}', point=point) for name, point in images.items()
        ]

    def prepare_data(self, index):
        info = self.get_data_info(index)
        image = LoadImageFromFile()(dict(info))['img']
        if np.random.rand() < 0.5 and not self.test_mode:
            image = image[:, ::-1].copy()
            info['point'] = [1 - info['point'][0], info['point'][1]]
        sample = BaseDataElement(metainfo=dict(point=info['point'], img_path=info['img_path']))
        return dict(inputs=torch.from_numpy(image).permute(2, 0, 1), data_samples=sample)


@MODELS.register_module()
class Regression(BaseModel):
    def __init__(self, backbone, head, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.backbone = MODELS.build(backbone)
        self.drop = nn.Dropout(0.2)
        self.head = MODELS.build(head)

    def forward(self, inputs, data_samples, mode='tensor'):
        if isinstance(inputs, (list, tuple)):
            inputs = torch.stack(inputs)
        points = self.head(self.drop(self.backbone(inputs.float() / 255)[-1].mean(dim=(2, 3))))
        if mode == 'tensor':
            return points
        if mode == 'loss':
            truth = torch.tensor([sample.point for sample in data_samples])
            return dict(loss=(points - truth).square().mean())
        for sample, point in zip(data_samples, points):
            sample.set_field(point, 'pred_point')
        return data_samples


@MODELS.register_module()
class PointHead(nn.Linear):
    def __init__(self, in_channels, num_classes):
        super().__init__(in_channels, 2)
        self.num_classes = num_classes


@METRICS.register_module()
class Distance(BaseMetric):
    def __init__(self, topk):
        super().__init__()

    def process(self, data_batch, data_samples):
        for sample in data_samples:
            self.results.append((sample['pred_point'] - torch.tensor(sample['point'])).norm().item())

    def compute_metrics(self, results):
        return dict(mean=sum(results) / len(results))
''',
)

CONFIG = '''
default_scope = 'corner_points'
custom_imports = dict(imports=['crossformer_mm'])
model = dict(
    type='Regression',
    backbone=dict(
        type='CrossFormer', out_indices=(3,), arch=dict(
            embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), drop_path_rate=0.3)),
    head=dict(type='PointHead', in_channels=128, num_classes=7))
dataset = dict(type='Corners', data_root='DATA')
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(split='train', **dataset))
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(split='val', test_mode=True, **dataset))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type='Distance', topk=9)
train_cfg = dict(by_epoch=True, max_epochs=2)
val_cfg = test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
randomness = dict(seed=0)
'''


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('corners')
    rng = np.random.default_rng(0)
    for split, count in (('train', 5), ('val', 2)):
        points = {}
        for number in range(count):
            name = f'{split}{number}.png'
            cv2.imwrite(str(folder / name), rng.integers(0, 255, (40, 48, 3), np.uint8))
            points[name] = rng.random(2).tolist()
        (folder / f'{split}.json').write_text(json.dumps(points))
    return folder


def write_config(path: Path, data: Path, added: str = '') -> Path:
    path.write_text(CONFIG.replace('DATA', str(data)) + added)
    return path


@pytest.fixture(scope='module')
def config(data, tmp_path_factory) -> Path:
    """A config of a library, 'corner_points', that can be imported."""
    folder = tmp_path_factory.mktemp('library')
    (folder / 'corner_points').mkdir()
    for module, text in LIBRARY.items():
        (folder / 'corner_points' / f'{module}.py').write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield write_config(folder / 'corners.py', data)


def test_a_library_of_ones_own_trains_resumes_to_the_bit_and_is_tested(
    output_of, refusal_of, config, tmp_path
):
    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    out = output_of('train.py', config, '--work-dir', whole)
    assert 'corner_points' in (whole / 'corners.py').read_text()
    assert 'attention: ' in out and 'mean: ' in out  # the path, and its metric
    assert 'more than the' not in out  # of heads with other numbers of classes
    assert read_checkpoint(str(whole / 'epoch_1.pth'))['meta']['epoch'] == 1
    output_of('train.py', config, '--work-dir', resumed, '--resume', whole / 'epoch_1.pth')
    assert_same_training(whole / 'epoch_2.pth', resumed / 'epoch_2.pth')
    test = ['test.py', config, whole / 'epoch_2.pth', '--work-dir', tmp_path / 'test']
    out = output_of(*test, '--out', tmp_path / 'kept.pkl')
    assert 'mean: ' in out and (tmp_path / 'kept.pkl').exists()
    said = refusal_of(*test, '--show-dir', tmp_path / 'drawn')
    assert 'Visualizer draws no predictions: give the visualizer of' in said


def test_what_it_costs_is_counted(output_of, refusal_of, config):
    out = output_of('get_flops.py', config, '--shape 64 96 --json')
    counted = json.loads(out.splitlines()[-1])
    for what in ('params', 'flops'):
        assert counted[what] == sum(part[what] for part in counted['parts'].values())
    assert counted['parts']['head'] == dict(params=258, flops=256)
    assert 'backbone.layers.3' in counted['parts']
    said = refusal_of('get_flops.py', config)
    assert '--shape H W is needed for a model of corner_points.' in said


@pytest.mark.usefixtures('config')
def test_a_missing_image_is_named(refusal_of, data, tmp_path):
    named = json.loads((data / 'train.json').read_text())
    (tmp_path / 'train.json').write_text(json.dumps({'gone.png': [0, 0], **named}))
    (tmp_path / 'val.json').write_text((data / 'val.json').read_text())
    missing = write_config(tmp_path / 'missing.py', tmp_path)
    said = refusal_of('train.py', missing, '--work-dir', tmp_path / 'w')
    assert f"File '{tmp_path}/gone.png' (and 5 more), which annotation file" in said


def test_a_misspelt_option_is_named(refusal_of, config, tmp_path):
    options = ('--work-dir', tmp_path, '--cfg-options', 'model.head.in_chanels=3')
    said = refusal_of('train.py', config, *options)
    assert "did you mean 'model.head.in_channels'?" in said


@pytest.mark.parametrize('tool', ['predict.py', 'explain.py', 'export.py'])
def test_tools_that_know_results_name_the_librarys_inferencer(refusal_of, config, tmp_path, tool):
    file = tmp_path / 'empty.pth'
    file.touch()
    arguments = {
        'predict.py': [file, file],
        'explain.py': [file, file, '--out', tmp_path],
        'export.py': ['--what', 'backbone', '--out', tmp_path / 'a.onnx'],
    }[tool]
    if tool == 'export.py':
        pytest.importorskip('onnxscript')
    said = refusal_of(tool, config, *arguments)
    assert "has default_scope 'corner_points', allowed are 'mmdet', 'mmseg'" in said
    assert 'corner_points predicts by its own corner_points.apis: CornerInferencer.' in said


@pytest.mark.parametrize(
    'scope, source, expected',
    [
        ('not_there', None, 'needs the package not_there, which is not installed.'),
        ('mmdet3d', None, 'needs the package mmdet3d, which is not installed.'),
        ('broken', 'import gone', "import ends in ModuleNotFoundError: No module named 'gone'."),
        ('plain', '', "and this package has no registry of MMEngine's"),
        (None, None, "has default_scope None, and MMEngine itself has no model 'Regression'"),
    ],
)
def test_a_library_that_cannot_be_used_is_named(
    refusal_of, data, monkeypatch, tmp_path, scope, source, expected
):
    if source is not None:
        (tmp_path / scope).mkdir()
        (tmp_path / scope / '__init__.py').write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = write_config(tmp_path / 'c.py', data, f'default_scope = {scope!r}\n')
    said = refusal_of('get_flops.py', config)
    assert f"config '{config}' " in said and str(scope) in said and expected in said


def test_models_of_mmengine_need_no_library(output_of, monkeypatch, tmp_path):
    """A config without default_scope, with a model that the user's module registers in MMEngine."""
    (tmp_path / 'own_model.py').write_text('''
from mmengine.model import BaseModel
from mmengine.registry import MODELS


@MODELS.register_module()
class OwnBackboneOnly(BaseModel):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)

    def forward(self, imgs, labels, mode):
        return self.backbone(imgs)
''')
    config = tmp_path / 'own.py'
    config.write_text('''
custom_imports = dict(imports=['own_model', 'crossformer_mm'])
model = dict(type='OwnBackboneOnly', backbone=dict(type='CrossFormer', arch='t'))
''')
    monkeypatch.syspath_prepend(tmp_path)
    out = output_of('get_flops.py', config, '--shape 224 224 --json')
    params = sum(parameter.numel() for parameter in CrossFormer('t').parameters())
    assert json.loads(out.splitlines()[-1])['params'] == params
