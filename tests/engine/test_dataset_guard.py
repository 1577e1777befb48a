"""Data sets in wrappers, pipelines that hooks switch and files behind a backend work as with
MMDetection's own tool, and an error names the right file."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmcv.transforms import BaseTransform
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.fileio import register_backend
from mmengine.fileio.backends import LocalBackend
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS, TRANSFORMS, init_default_scope
from mmengine.runner import Runner

from ..helpers import NO_VALIDATION
from ..trainings import ONE_STAGE, write_config
from .spoilt_data import truncate

LOADED = []  # the names of images, in the order in which RecordName saw them


@TRANSFORMS.register_module()
class RecordName(BaseTransform):
    """Notes which image it is given."""

    def transform(self, results: dict) -> dict:
        LOADED.append(Path(results['img_path']).name)
        return results


@TRANSFORMS.register_module()
class FailsSometimes(BaseTransform):
    """A user's own transform, with a mistake that only some images show."""

    def transform(self, results: dict) -> dict:
        if results['img_path'].endswith('3.png'):
            return results['no such key']
        return results


@HOOKS.register_module()
class FailingHook(Hook):
    """A user's own hook, with a mistake."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        raise LookupError('a mistake of mine')


@register_backend('elsewhere', prefixes='elsewhere')
class Elsewhere(LocalBackend):
    """A store whose files have other paths than those of this machine."""

    folder = ''

    def __init__(self, path_mapping=None):
        self.path_mapping = path_mapping or {}

    def local(self, filepath) -> str:
        for mapped, path in {**self.path_mapping, 'elsewhere://bucket': self.folder}.items():
            filepath = str(filepath).replace(mapped, path)
        return filepath

    def get(self, filepath) -> bytes:
        return super().get(self.local(filepath))

    def get_text(self, filepath, encoding='utf-8') -> str:
        return self.get(filepath).decode(encoding)

    def get_local_path(self, filepath):
        return super().get_local_path(self.local(filepath))

    def exists(self, filepath) -> bool:
        return super().exists(self.local(filepath))


@DATASETS.register_module()
class MistakenDataset(CocoDataset):
    """A user's own data set, with a mistake."""

    def load_data_list(self):
        return [][len(self.ann_file)]


@pytest.fixture
def config(data, tmp_path):
    """Writes a configuration of one epoch without validation, some of whose settings are changed
    by code that knows the others."""

    def write(code: str = '', place: Path = data) -> Path:
        path = tmp_path / 'configs' / 'guarded.py'
        epoch = dict(max_epochs=1)
        base = write_config(ONE_STAGE, path, place, **NO_VALIDATION, train_cfg=epoch)
        base.rename(base.with_name('base.py'))
        path.write_text(f"_base_ = './base.py'\n{code}")
        return path

    return write


def test_data_sets_may_be_in_wrappers(output_of, config, tmp_path):
    file = config('''
inner = _base_.train_dataloader.dataset
balanced = dict(type='ClassBalancedDataset', oversample_thr=0.9, dataset=inner)
both = dict(type='ConcatDataset', datasets=[balanced, inner])
train_dataloader = dict(dataset=dict(_delete_=True, type='RepeatDataset', times=2, dataset=both))
''')
    said = output_of('train.py', file, '--work-dir', tmp_path)
    assert re.search(r'Epoch\(train\) +\[1\]\[ *8/', said)  # twice two times four images
    assert (tmp_path / 'epoch_1.pth').exists()


def test_a_corrupt_partner_in_a_mosaic_is_named(output_of, refusal_of, config, own_data, tmp_path):
    bad = own_data / 'coco/train2017/000000000002.png'
    truncate(bad)
    # Images are loaded two by two: the first batch loads almost all as partners.
    mosaic = '''
inner = {**_base_.train_dataloader.dataset, 'pipeline': _base_.train_pipeline[:-1]}
mix = [dict(type='Mosaic', img_scale=(48, 48), prob=1.0), _base_.train_pipeline[-1]]
train_dataloader = dict(dataset=dict(
    _delete_=True, type='MultiImageMixDataset', dataset=inner, pipeline=mix))
'''
    file = config(mosaic, own_data)
    fault = f"Image '{bad}' is cut short or no image."
    assert refusal_of('train.py', file, '--work-dir', tmp_path) == fault
    output_of('train.py', file, '--work-dir', tmp_path, '--skip-bad-images')
    assert (tmp_path / 'skipped_images.txt').read_text() == f'{fault}\n'


def drawn_by_mmengine(file: Path, epoch: int) -> list:
    """The images of an epoch of a configuration whose pipeline records names."""
    init_default_scope('mmdet')
    loader = Runner.build_dataloader(Config.fromfile(file).train_dataloader, seed=0)
    loader.batch_sampler.sampler.set_epoch(epoch)
    LOADED.clear()
    list(loader)
    return list(LOADED)


RECORDED = 'steps = [dict(type="mmengine.RecordName"), *_base_.train_pipeline]\n'


@pytest.mark.parametrize(
    'hook',
    [
        "type='PipelineSwitchHook', switch_epoch=1, switch_pipeline=steps",
        pytest.param(
            "type='mmpretrain.SwitchRecipeHook', "
            'schedule=[dict(action_epoch=2, train_pipeline=steps)]',
            marks=pytest.mark.skipif(not find_spec('mmpretrain'), reason='needs mmpretrain'),
        ),
    ],
    ids=['PipelineSwitchHook', 'SwitchRecipeHook'],
)
def test_hooks_switch_pipelines(output_of, config, tmp_path, hook):
    file = config(f'{RECORDED}custom_hooks = [dict({hook})]\ntrain_cfg = dict(max_epochs=2)\n')
    LOADED.clear()
    output_of('train.py', file, '--work-dir', tmp_path)
    loaded = list(LOADED)
    file = config(RECORDED + 'train_dataloader = dict(dataset=dict(pipeline=steps))\n')
    expected = drawn_by_mmengine(file, epoch=1)  # nothing was recorded before it
    assert loaded == expected and len(expected) == 4


def test_a_part_of_an_epoch_has_the_images_that_mmengine_draws(output_of, config, tmp_path):
    loader = 'dict(num_batch_per_epoch=1, dataset=dict(pipeline=steps))'
    file = config(f'{RECORDED}train_cfg = dict(max_epochs=3)\ntrain_dataloader = {loader}\n')
    LOADED.clear()
    output_of('train.py', file, '--work-dir', tmp_path)
    loaded = list(LOADED)
    expected = [drawn_by_mmengine(file, epoch) for epoch in range(3)]
    assert loaded == sum(expected, []) and len(loaded) == 6


@pytest.mark.parametrize(
    'root, backend',
    [
        ('elsewhere://bucket', None),
        ('/nowhere/bucket', dict(backend='elsewhere', path_mapping={'/nowhere': 'elsewhere:/'})),
    ],
    ids=['address', 'mapped'],
)
def test_files_behind_a_backend_are_left_to_it(
    output_of, config, data, tmp_path, monkeypatch, root, backend
):
    monkeypatch.setattr(Elsewhere, 'folder', str(data))
    file = config(f'''
load = dict(type='LoadImageFromFile', backend_args={backend})
train_dataloader = dict(dataset=dict(
    data_root='{root}/coco', backend_args={backend}, pipeline=[load, *_base_.train_pipeline[1:]]))
''')
    output_of('train.py', file, '--work-dir', tmp_path)
    assert (tmp_path / 'epoch_1.pth').exists()


# Mistakes of the user's own


def test_a_mistaken_transform_keeps_its_traceback_and_skips_no_image(output_of, config, tmp_path):
    file = config('''
train_dataloader = dict(dataset=dict(pipeline=[
    *_base_.train_pipeline[:2], dict(type='mmengine.FailsSometimes'),
    *_base_.train_pipeline[2:]]))
''')
    said = output_of('train.py', file, '--work-dir', tmp_path, '--skip-bad-images', expect=1)
    assert said.strip().splitlines()[-1] == "KeyError: 'no such key'"
    (log,) = tmp_path.glob('*/*.log')
    for text in (said, log.read_text()):
        assert "000000000003.png' can be read" in text and 'KeyError' in text
        assert 'Traceback' in text and "return results['no such key']" in text
    assert not (tmp_path / 'skipped_images.txt').exists()


def test_a_mistake_in_a_hook_keeps_its_traceback(output_of, config, tmp_path):
    file = config("custom_hooks = [dict(type='mmengine.FailingHook')]\n")
    said = output_of('train.py', file, '--work-dir', tmp_path, expect=1)
    assert said.strip().splitlines()[-1] == 'LookupError: a mistake of mine'
    (log,) = tmp_path.glob('*/*.log')
    assert 'LookupError: a mistake of mine' in log.read_text()


def test_a_mistake_in_a_data_set_has_the_sentence_and_the_traceback(output_of, config, tmp_path):
    file = config("train_dataloader = dict(dataset=dict(type='mmengine.MistakenDataset'))\n")
    said = output_of('train.py', file, '--work-dir', tmp_path, expect=2)
    last = said.strip().splitlines()[-1]
    assert last.endswith('could not be used: IndexError: list index out of range.')
    (log,) = tmp_path.glob('*/*.log')
    assert 'return [][len(self.ann_file)]' in said
    assert 'return [][len(self.ann_file)]' in log.read_text()


# Numbers of classes


def test_a_detector_with_too_many_classes_trains_tests_and_predicts(output_of, data, tmp_path):
    # With score_thr=0, it detects classes that the annotation file does not have.
    lines, epoch = "model['bbox_head']['num_classes'] = 80", dict(max_epochs=1, val_interval=1)
    file = write_config(ONE_STAGE, tmp_path / 'configs' / '80.py', data, lines, train_cfg=epoch)
    said = output_of('train.py', file, '--work-dir', tmp_path)
    assert said.count('model.bbox_head.num_classes = 80: more than the 4 classes') == 1
    assert 'coco/bbox_mAP:' in said
    weights = tmp_path / 'epoch_1.pth'
    images, truth = data / 'coco/val2017', data / 'coco/annotations/instances_val2017.json'
    options = ('--out', tmp_path / 'out', '--ann-file', truth, '--score-thr', 1)
    said = output_of('predict.py', file, weights, images, *options)
    assert 'the model has 80 classes, but was trained on 4, disk to star' in said
    found = json.loads((tmp_path / 'out/results.bbox.json').read_text())
    assert {one['category_id'] for one in found} <= {1, 2, 3, 4}
    # Names of the config are no names of what a checkpoint without its own was trained on.
    content = torch.load(weights, weights_only=False)
    torch.save(dict(state_dict=content['state_dict']), weights)
    said = output_of('predict.py', file, weights, images, *options, expect=2)
    assert 'the model has 80 classes, but the names of 4 are known' in said
