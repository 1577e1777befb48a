"""Recipes of docs/other_libraries.md, run as they stand on a small architecture.

What is not installed is skipped: ``make test-others`` makes an environment that has it all.
"""

import json
import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Dict

import cv2
import numpy as np
import pytest
import torch

from crossformer_mm import ARCHITECTURES, CrossFormer
from crossformer_mm.checkpoint import read_checkpoint

from .authors import imagenet_file, no_buffers
from .helpers import ROOT, assert_same, blocks, pretrained, run_python

FILE = ROOT / 'docs' / 'other_libraries.md'
PAGE, RECIPES = FILE.read_text(encoding='utf-8'), blocks(FILE, 'python')
TINY = dict(embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), drop_path_rate=0.0)


def recipe(*words: str) -> str:
    """The recipe that has some words."""
    (found,) = [text for text in RECIPES if all(word in text for word in words)]
    return found


def needs(package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f'{package} is not installed (make test-others)')


def test_each_recipe_has_20_lines_at_most():
    assert len(RECIPES) == 9
    for text in RECIPES:
        assert len([line for line in text.splitlines() if line.strip()]) <= 20, text


@pytest.fixture
def weights(tmp_path, monkeypatch, small) -> Dict[str, torch.Tensor]:
    """Weights of 'crossformer-s.pth' in the working folder, and architecture s as small as they."""
    monkeypatch.setitem(ARCHITECTURES, 's', dict(TINY, cooling=False))
    backbone = small('s')
    torch.save(imagenet_file(backbone, no_buffers), tmp_path / 'crossformer-s.pth')
    monkeypatch.chdir(tmp_path)
    return backbone.state_dict()


def run(text: str, *changes: tuple) -> dict:
    """Run a recipe, with smaller numbers in it, and return its names."""
    for old, new in (('[192, 384, 768]', '[32, 64, 128]'), *changes):
        text = text.replace(old, new)
    names: dict = {'__name__': 'recipe'}
    exec(text, names)
    return names


def backbone_of(model) -> CrossFormer:
    (found,) = [part for part in model.modules() if isinstance(part, CrossFormer)]
    return found


def check_trained(names: dict) -> None:
    """Every parameter of the backbone had its part in the loss."""
    assert names['loss'].isfinite()
    parameters = backbone_of(names['model']).named_parameters()
    assert not [key for key, p in parameters if p.requires_grad and p.grad is None]


def has_weights(model, weights) -> bool:
    found = backbone_of(model).state_dict()
    return found.keys() == weights.keys() and all(
        torch.equal(found[key], value) for key, value in weights.items()
    )


def test_timm(weights):
    needs('timm')
    names = run(recipe('features_only=True'))
    assert names['logits'].shape == (2, 10)
    assert [tuple(feature.shape) for feature in names['features']] == [
        (2, 32, 54, 80), (2, 64, 27, 40), (2, 128, 14, 20)
    ]  # fmt: skip
    assert has_weights(names['backbone'], weights) and has_weights(names['classifier'], weights)
    scales = {group['lr_scale'] for group in names['optimizer'].param_groups}
    assert scales == {0.8**depth for depth in range(7)}


def test_train_py_of_timm(weights, tmp_path):
    """``CROSSFORMER_TIMM`` names a checkout of timm, whose wheel has no train.py."""
    needs('timm')
    source = os.environ.get('CROSSFORMER_TIMM')
    if not source:
        pytest.skip('CROSSFORMER_TIMM names no checkout of timm')
    for split, name in ((split, name) for split in ('train', 'validation') for name in 'abc'):
        write_image(tmp_path / 'data/imagenet' / split / name / '0.png')
    (command,) = re.findall(r'^python pytorch-image-models/train.py (.*?)\n```', PAGE, re.S | re.M)
    arch = str(dict(TINY, cooling=False)).replace(' ', '')
    words = command.replace('\\\n', ' ').replace('--num-classes 10', '--num-classes 3').split()
    smaller = f'--model-kwargs arch={arch} --epochs 1 --batch-size 3 --img-size 64 --device cpu'
    smaller += ' --workers 0 --no-prefetcher --output out --experiment it'
    done = start(Path(source) / 'train.py', *words, *smaller.split())
    assert not done.returncode, done.stderr[-3000:]
    checkpoint = read_checkpoint('out/it/last.pth.tar')
    assert checkpoint['args'].model == 'crossformer_small'
    assert {'state_dict', 'state_dict_ema'} < checkpoint.keys()
    pretrained('out/it/last.pth.tar')


@pytest.mark.parametrize('kind', ['Unet', 'FPN', 'UPerNet', 'Segformer'])
def test_segmentation_models_pytorch(weights, kind):
    needs('segmentation_models_pytorch')
    assert f'smp.{kind}' in PAGE
    text = recipe('import segmentation_models_pytorch')
    names = run(text, ('smp.Unet', f'smp.{kind}'))
    check_trained(names)
    assert names['model'](names['images']).shape == (2, 5, 96, 160)
    fresh = run(text.split('optimizer')[0], ('smp.Unet', f'smp.{kind}'))
    assert has_weights(fresh['model'], weights)
    odd = torch.rand(1, 3, 97, 131)
    if kind == 'Unet':
        assert fresh['model'].eval()(odd).shape == (1, 5, 97, 131)
    else:
        with pytest.raises(RuntimeError, match='divisible by 32'):
            fresh['model'](odd)


@pytest.mark.parametrize('kind', ['DeepLabV3', 'DeepLabV3Plus', 'PAN'])
def test_dilated_models_of_smp_are_refused(weights, kind):
    needs('segmentation_models_pytorch')
    with pytest.raises(ValueError, match='CrossFormer has no dilated stages'):
        run(recipe('import segmentation_models_pytorch'), ('smp.Unet', f'smp.{kind}'))


SMALLER = {
    'RTDetr': 'encoder_hidden_dim=32, encoder_ffn_dim=32, encoder_attention_heads=2, d_model=32, '
    'decoder_in_channels=[32, 32, 32], decoder_layers=1, decoder_ffn_dim=32, '
    'decoder_attention_heads=2, num_queries=10, num_denoising=4, ',
    'Detr': 'd_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, '
    'decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=10, ',
    'Mask2Former': 'feature_size=32, mask_feature_size=32, hidden_dim=32, '
    'encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, '
    'dim_feedforward=32, num_queries=10, train_num_points=64, ',
}


@pytest.mark.parametrize('kind', SMALLER)
def test_dense_models_of_transformers(weights, kind):
    needs('transformers')
    text = recipe(f' {kind}Config,')
    smaller = ('num_labels=4', f'{SMALLER[kind]}num_labels=4')
    names = run(text, smaller)
    check_trained(names)
    assert has_weights(names['model'], weights) == (kind == 'RTDetr')
    odd = ('96, 160', '97, 131')
    if kind == 'RTDetr':
        with pytest.raises(RuntimeError, match='must match'):
            run(text, smaller, odd)
    else:
        check_trained(run(text, smaller, odd))


def test_wrapped_classifier_of_transformers(weights):
    needs('transformers')
    text = recipe('TimmWrapperConfig(')
    names = run(text)
    check_trained(names)
    assert_same(names['again'].state_dict(), names['model'].state_dict())
    image = torch.rand(1, 3, 65, 97)
    # Up to the last bit: the second model's weights are aligned otherwise in memory.
    logits = (names[name].eval()(image).logits for name in ('model', 'again'))
    torch.testing.assert_close(*logits)
    fresh = run(text.split('optimizer')[0])
    assert has_weights(fresh['model'], weights)


@pytest.mark.parametrize('kind', ['MaskRCNN', 'FasterRCNN', 'RetinaNet'])
def test_torchvision(weights, kind):
    pytest.importorskip('torchvision.models.detection', exc_type=ImportError)
    assert f'{kind}(' in PAGE or f'or {kind}' in PAGE
    changes = [('MaskRCNN', kind), ('rpn_anchor', 'anchor')] if kind == 'RetinaNet' else []
    text = recipe('class Pyramid').replace('MaskRCNN', kind).replace('256', '16')
    names = run(text.replace('16, 512)', '256, 512)'), *changes)
    assert has_weights(names['model'], weights)
    model = names['model'].train()
    model.transform.min_size, model.transform.max_size = (96,), 160
    target = dict(boxes=torch.tensor([[10.0, 10.0, 50.0, 40.0]]), labels=torch.tensor([1]))
    images = [torch.rand(3, 97, 131), torch.rand(3, 120, 86)]
    targets = [dict(target, masks=torch.ones(1, *image.shape[1:], dtype=torch.uint8))
               for image in images]  # fmt: skip
    loss = sum(model(images, targets).values())
    loss.backward()
    check_trained(dict(loss=loss, model=model))
    with torch.no_grad():
        assert {'boxes', 'labels', 'scores'} <= model.eval()(images)[0].keys()


# MMRotate and MMPose, by the tools that they install


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8))


def start(*command) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    return run_python(*command, folder=Path.cwd(), PYTHONPATH=path)


def train(library: str, text: str, *settings: str) -> None:
    """Train a recipe's config for an epoch by its library's own tool."""
    (name,) = re.findall(rf'^python {library}/tools/train.py (\w+\.py)$', PAGE, re.MULTILINE)
    assert f'Save as `{name}`' in PAGE
    text = text.replace("arch='s'", f'arch={TINY}')
    Path(name).write_text(text.replace('[96, 192, 384, 768]', '[16, 32, 64, 128]'))
    shorter = '--work-dir work --cfg-options train_cfg.max_epochs=1'
    for loader in ('train', 'val'):
        shorter += (
            f' {loader}_dataloader.num_workers=0 {loader}_dataloader.persistent_workers=False'
        )
    tool = Path(find_spec(library).origin).parent / '.mim/tools/train.py'
    done = start(tool, name, *shorter.split(), *settings)
    assert not done.returncode, done.stderr[-3000:]
    assert "Loaded backbone weights from 'crossformer-s.pth'" in done.stdout + done.stderr
    assert Path('work/epoch_1.pth').is_file()


def test_mmrotate(weights):
    needs('mmrotate')
    if find_spec('mmcv._ext') is None:
        pytest.skip('MMRotate needs a compiled mmcv (make test-others)')
    data = Path('data/split_ss_dota/trainval')
    for i in range(2):
        write_image(data / f'images/P{i}.png')
        (data / 'annfiles').mkdir(exist_ok=True)
        (data / f'annfiles/P{i}.txt').write_text('20 20 60 25 58 50 18 45 plane 0\n')
    train(
        'mmrotate',
        recipe('mmrotate::'),
        'train_dataloader.dataset.pipeline.3.scale=(96,96)',
        'train_cfg.val_interval=2',  # not here: MMRotate starts four processes for its metric
    )


def test_mmpose(weights):
    needs('mmpose')
    for split in ('train', 'val'):
        write_image(Path(f'data/coco/{split}2017/0.jpg'))
        points = [number for j in range(17) for number in (15 + 3 * j, 20 + 3 * j, 2)]
        person = dict(
            id=1, image_id=0, category_id=1, bbox=[10, 10, 60, 70], area=4200, iscrowd=0,
            num_keypoints=17, keypoints=points,
        )  # fmt: skip
        names = [str(j) for j in range(17)]
        content = dict(
            images=[dict(id=0, file_name='0.jpg', width=128, height=96)],
            annotations=[person],
            categories=[dict(id=1, name='person', keypoints=names, skeleton=[])],
        )
        file = Path(f'data/coco/annotations/person_keypoints_{split}2017.json')
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    text = recipe('mmpose::')
    smaller = "model['head'] = dict(in_channels=128, deconv_out_channels=(16, 16, 16))\n"
    boxes = 'val_dataloader.dataset.bbox_file='  # none: those of the annotations
    train('mmpose', text + smaller, boxes, 'train_cfg.val_interval=1')
