"""Classifiers: trained, tested, loaded from the authors' files, and their weights in detectors."""

import pickle
import re
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope

from crossformer_mm.checkpoint import fit_checkpoint, read_checkpoint
from crossformer_mm.engine.dataset_checks import check_files

from .. import authors
from ..authors import earlier, imagenet_file, later, no_buffers
from ..helpers import CLASSIFIER, DEMO_DETECTOR, ROOT, add_noise, assert_same, build_model, run_tool
from ..oracle import plain_features, plain_logits

pytestmark = pytest.mark.usefixtures('own_loaders')
SMALL = dict(embed_dims=16, depths=(1, 2, 3, 1), num_heads=(1, 1, 2, 2))
CLASSES = ('ant', 'bee', 'cow')
SIDE = 64


def write_config(folder: Path, data: Path, kind: str = 'cf_s') -> Path:
    """A config of a small classifier that learns quickly; all else is as in pretraining."""
    cfg = Config.fromfile(ROOT / f'configs/imagenet/{kind}_300e.py')
    cfg.model.backbone.arch = dict(SMALL, cooling=kind == 'cfpp_s')
    cfg.model.neck.in_channels = cfg.model.head.in_channels = 128
    cfg.model.head.num_classes = cfg.model.data_preprocessor.num_classes = 3
    cfg.custom_hooks[0].momentum = 0.3
    cfg.default_hooks.logger.interval = 1
    cfg.train_dataloader.dataset.pipeline[1].scale = SIDE
    cfg.train_cfg.update(max_epochs=3, val_interval=3)
    for split in 'train', 'val', 'test':
        cfg[f'{split}_dataloader'].update(batch_size=6, num_workers=0, persistent_workers=False)
        dataset = cfg[f'{split}_dataloader'].dataset
        dataset.update(data_root=str(data), metainfo=dict(classes=CLASSES))
        if split != 'train':
            dataset.pipeline[1].scale = dataset.pipeline[2].crop_size = SIDE
            cfg[f'{split}_evaluator'].topk = 1
    cfg.param_scheduler = None  # its warm-up's first steps change little
    cfg.dump(folder / f'{kind}.py')
    return folder / f'{kind}.py'


@pytest.fixture(scope='module')
def clean(tmp_path_factory) -> Path:
    """ImageNet's layout: 3 classes, 6 training and 4 validation images."""
    data, rng = tmp_path_factory.mktemp('data') / 'net', np.random.default_rng(0)
    for split, count in ('train', 6), ('val', 4):
        for index in range(count):
            label = index % len(CLASSES)
            path = data / split / CLASSES[label] / f'{split}_{index}.JPEG'
            path.parent.mkdir(parents=True, exist_ok=True)
            image = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            image[..., label] = 200
            cv2.imwrite(str(path), image)
    return data


@pytest.fixture
def data(clean, tmp_path) -> Path:
    """A data set of its own for a test to spoil."""
    return Path(shutil.copytree(clean, tmp_path / 'net'))


@pytest.fixture(scope='module')
def trained(clean, tmp_path_factory) -> Path:
    """The work folder of a classifier trained for 3 epochs of one iteration, with its config."""
    folder = tmp_path_factory.mktemp('trained')
    options = f'--work-dir {folder} --tensorboard-samples 2'
    assert run_tool('train.py', write_config(folder, clean, 'cfpp_s'), options, folder=folder) == 0
    return folder


def weights(folder: Path, epoch: int, which: str = 'state_dict') -> dict:
    state = read_checkpoint(str(folder / f'epoch_{epoch}.pth'))[which]
    return {key.removeprefix('module.'): state[key] for key in state if key != 'steps'}


class TestTraining:
    def test_weights_that_count_are_the_averaged_ones(self, trained):
        plain = [weights(trained, i, 'ema_state_dict') for i in (1, 2, 3)]
        averaged = weights(trained, 3)
        assert averaged.keys() == plain[0].keys()
        for key, value in averaged.items():
            expected = plain[0][key].lerp(plain[1][key], 0.3).lerp(plain[2][key], 0.3)
            torch.testing.assert_close(value, expected)
        assert not torch.equal(averaged['head.fc.weight'], plain[2]['head.fc.weight'])

    def test_every_part_learns(self, trained):
        first, last = (weights(trained, i, 'ema_state_dict') for i in (1, 3))
        parts = (
            'backbone.patch_embed.projs.3.weight',
            'backbone.layers.3.blocks.0.mlp.fc1.weight',
            'neck.norm.weight',
            'head.fc.bias',
        )
        assert all(not torch.equal(first[key], last[key]) for key in parts)

    def test_pictures_of_predictions_are_in_tensorboard(self, trained):
        events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
        log = events.EventAccumulator(str(next(trained.glob('*/vis_data/events*')))).Reload()
        assert len(log.Tags()['images']) == 2 and 'accuracy/top1' in log.Tags()['scalars']

    def test_evaluation_is_of_the_averaged_weights(self, trained, output_of, tmp_path):
        paths = f'--work-dir {tmp_path} --out {tmp_path}/x.pkl --show-dir {tmp_path}/shown'
        said = output_of('test.py', 'cfpp_s.py epoch_3.pth', paths, folder=trained)
        assert 'accuracy/top1:' in said
        assert len(list((tmp_path / 'shown').glob('*/*.JPEG'))) == 4  # by class
        check_scores(tmp_path / 'x.pkl', trained / 'cfpp_s.py', weights(trained, 3))

    def test_a_resumed_training_ends_with_the_same_weights(self, trained, output_of, tmp_path):
        paths = f'--work-dir {tmp_path} --resume {trained}/epoch_2.pth'
        output_of('train.py', 'cfpp_s.py', paths, folder=trained)
        assert not (tmp_path / 'epoch_2.pth').exists()
        for which in 'state_dict', 'ema_state_dict':
            assert_same(weights(tmp_path, 3, which), weights(trained, 3, which))


def as_theirs(state: dict) -> dict:
    """The other way round than the package does it."""
    return {
        re.sub(r'^(backbone|neck)\.', '', key).replace('head.fc', 'head'): value
        for key, value in state.items()
    }


def check_scores(kept: Path, config: Path, state: dict) -> None:
    """Check that tools/test.py kept the scores that these weights give, by the definition."""
    cfg = Config.fromfile(config)
    init_default_scope('mmpretrain')
    samples = pickle.loads(kept.read_bytes())
    assert len(samples) == 4
    dataset, backbone = DATASETS.build(cfg.test_dataloader.dataset), cfg.model.backbone
    images = torch.stack(pseudo_collate([dataset[i] for i in range(4)])['inputs']).flip(1).float()
    mean, std = (
        torch.tensor(cfg.model.data_preprocessor[key]).view(3, 1, 1) for key in ('mean', 'std')
    )
    assert images.shape == (4, 3, SIDE, SIDE)
    theirs, groups = as_theirs(state), (backbone.group_size, backbone.interval, backbone.lda)
    features = plain_features(theirs, (images - mean) / std, *groups)
    expected = plain_logits(theirs, features[-1]).softmax(-1)
    scores = torch.stack([sample['pred_score'] for sample in samples])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)
    assert expected.std(0).min() > 1e-5  # or images made no difference


def released_file(config: Path, buffers, classes: int = 3) -> dict:
    """A file of the authors, for the backbone of a config."""
    torch.manual_seed(0)
    backbone = MODELS.build(Config.fromfile(config).model.backbone)
    return imagenet_file(add_noise(backbone), buffers, classes)


class TestReleasedFiles:
    @pytest.mark.parametrize('kind, buffers', [('cf_s', later), ('cfpp_s', no_buffers)])
    def test_evaluation_gives_their_scores(self, clean, tmp_path, kind, buffers):
        config = write_config(tmp_path, clean, kind)
        content = released_file(config, buffers)
        torch.save(content, tmp_path / 'theirs.pth')
        assert run_tool('test.py', config, 'theirs.pth --out x.pkl', folder=tmp_path) == 0
        check_scores(tmp_path / 'x.pkl', config, content['model'])

    @pytest.mark.parametrize(
        'name, size, kind',
        [('interval', '2x224x224', 'cf_s'), ('block_pgs_cooling', '1x224x224', 'cfpp_s')],
    )
    def test_logits_follow_from_the_features_of_their_code(self, name, size, kind):
        golden = authors.read(name, size)
        cfg = Config.fromfile(ROOT / f'configs/imagenet/{kind}_300e.py')
        arch = dict(golden.settings['arch'], cooling=golden.settings['cooling'])
        channels = arch['embed_dims'] * 8
        cfg.model.backbone.arch = arch
        cfg.model.neck.in_channels = cfg.model.head.in_channels = channels
        assert tuple(cfg.model.backbone.group_size) == tuple(golden.settings['group_size'])
        model = build_model(cfg)
        ends = {
            'norm.weight': torch.rand(channels),
            'norm.bias': torch.randn(channels),
            'head.weight': torch.randn(1000, channels),
            'head.bias': torch.randn(1000),
        }
        fit_checkpoint(model, dict(model={**golden.weights, **ends}), 'theirs')
        # tests/test_golden.py holds these features to those of the authors
        with torch.no_grad():
            feature = golden.build()(golden.image)[3]
            logits = model(golden.image)
        precise = {key: value.double() for key, value in ends.items()}
        expected = plain_logits(precise, feature.double())
        assert (logits - expected).abs().max() / expected.abs().max() < 2e-5

    @pytest.mark.parametrize(
        'change, expected',
        [
            (lambda state: state.pop('head.bias'), 'missing head.fc.bias'),
            (lambda state: state.pop('norm.weight'), 'missing neck.norm.weight'),
            (lambda state: state.pop('layers.1.blocks.0.norm1.bias'), 'missing backbone.layers.1.'),
            (lambda state: state.update(extra=torch.ones(1)), 'unexpected backbone.extra'),
            (
                lambda state: state.update({'head.weight': torch.ones(1000, 128)}),
                'of another shape head.fc.weight ((1000, 128) in the file, (3, 128) here)',
            ),
        ],
    )
    def test_what_does_not_fit_is_named(self, refusal_of, clean, tmp_path, change, expected):
        config = write_config(tmp_path, clean)
        content = released_file(config, earlier)
        change(content['model'])
        torch.save(content, tmp_path / 'theirs.pth')
        said = refusal_of('test.py', config, tmp_path / 'theirs.pth', '--work-dir', tmp_path)
        assert expected in said and 'theirs.pth' in said

    def test_training_starts_from_one_for_other_classes(self, clean, output_of, tmp_path):
        config = write_config(tmp_path, clean)
        content = released_file(config, earlier, classes=1000)
        torch.save(content, tmp_path / 'theirs.pth')
        options = 'load_from=theirs.pth optim_wrapper.optimizer.lr=0. train_cfg.max_epochs=1'
        arguments = ('--work-dir', tmp_path, '--cfg-options', options)
        said = output_of('train.py', config, *arguments, folder=tmp_path)
        assert 'of another shape head.fc.bias' in said
        trained = as_theirs(weights(tmp_path, 1))
        for key in ('layers.3.blocks.0.mlp.fc1.weight', 'norm.bias'):
            assert torch.equal(trained[key], content['model'][key])


class TestDetectionFromIt:
    """Values of model.backbone.init_cfg.checkpoint."""

    @pytest.mark.parametrize('file', ['epoch_3.pth', 'NAME.pth', 'NAME.safetensors'])
    def test_a_detector_starts_from_the_averaged_weights(self, trained, tmp_path, capfd, file):
        source = trained / file
        if file.startswith('NAME'):
            if file.endswith('safetensors'):
                pytest.importorskip('safetensors')
            assert run_tool('publish_model.py', 'epoch_3.pth', tmp_path / file, folder=trained) == 0
            source = Path(capfd.readouterr().out.strip().splitlines()[-1])
            assert set(read_checkpoint(str(source))) == {'state_dict', 'meta'}
        cfg = Config.fromfile(ROOT / DEMO_DETECTOR)
        # G and I of the published detectors, whatever they were in pretraining.
        cfg.model.backbone.update(arch=dict(SMALL, cooling=True), out_norm=False)
        cfg.model.backbone.init_cfg.checkpoint = str(source)
        cfg.model.neck.in_channels = [16, 32, 64, 128]
        detector = build_model(cfg)
        detector.init_weights()
        averaged = weights(trained, 3)
        for key, value in detector.backbone.state_dict().items():
            assert torch.equal(value, averaged[f'backbone.{key}'])


def without_folders(data):
    for image in list((data / 'val').glob('*/*')):
        image.rename(data / 'val' / image.name)
    for name in CLASSES:
        (data / 'val' / name).rmdir()


def without_images(data):
    for image in (data / 'train' / 'bee').iterdir():
        image.unlink()


def another_class(data):
    for split in 'train', 'val':
        shutil.copytree(data / split / 'bee', data / split / 'dog')


def listed(*lines):
    def write(data):
        (data / 'meta').mkdir()
        (data / 'meta' / 'train.txt').write_text('\n'.join(lines))

    return write


class TestData:
    @pytest.mark.parametrize(
        'spoil, expected',
        [
            (shutil.rmtree, "the train dataset is not there: '{}' does not exist"),
            (lambda data: shutil.rmtree(data / 'val'), "the val dataset is not there: '{}/val'"),
            (without_folders, "'{}/val' must hold a folder of images for each class"),
            (without_images, "Class folder 'bee' of image folder '{}/train' has no image."),
            (lambda data: (data / 'val/bee').rename(data / 'val/cat'), "only one has 'bee'."),
            (another_class, 'The number of subfolders (4)'),
            (
                listed('ant/train_0.JPEG 0', 'ant/none.JPEG 1'),
                "'{0}/train/ant/none.JPEG', which annotation file '{0}/meta/train.txt' names, does not",
            ),
            (
                listed('ant/train_0.JPEG 3'),
                "train_0.JPEG' has label 3 in annotation file '{0}/meta/train.txt', allowed are 0 to 2",
            ),
            (listed('ant/train_0.JPEG'), "annotation file '{}/meta/train.txt' could not be used: "),
        ],
    )
    def test_what_cannot_work_is_said(self, refusal_of, data, tmp_path, spoil, expected):
        spoil(data)
        said = refusal_of('train.py', write_config(tmp_path, data), '--work-dir', tmp_path)
        assert expected.format(data) in said

    def test_another_folder_is_named_by_an_option(self, output_of, refusal_of, clean, tmp_path):
        config = write_config(tmp_path, tmp_path / 'nowhere')
        arguments = f'{config} --work-dir {tmp_path} --data-root'
        said = refusal_of('train.py', arguments, tmp_path / 'gone')
        assert str(tmp_path / 'gone') in said and '--data-root' in said
        once = '--cfg-options train_cfg.max_epochs=1'
        output_of('train.py', arguments, clean, once, folder=tmp_path)

    def test_lists_name_images_and_their_classes(self, data, tmp_path):
        listed('ant/train_0.JPEG 2', 'cow/train_2.JPEG 0')(data)
        (data / 'train' / 'none').mkdir()  # a folder that no list names does not count
        cfg = Config.fromfile(write_config(tmp_path, data))
        init_default_scope('mmpretrain')
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
        check_files(dataset)
        infos = map(dataset.get_data_info, range(len(dataset)))
        found = [(Path(info['img_path']).name, info['gt_label']) for info in infos]
        assert found == [('train_0.JPEG', 2), ('train_2.JPEG', 0)]

    def test_an_unreadable_image_ends_or_is_skipped(self, output_of, refusal_of, data, tmp_path):
        bad = data / 'train' / 'bee' / 'train_1.JPEG'
        bad.write_bytes(bad.read_bytes()[:300])
        config = write_config(tmp_path, data)
        said = refusal_of('train.py', config, '--work-dir', tmp_path)
        assert said == f"Image '{bad}' is cut short or no image."
        once = '--skip-bad-images --cfg-options train_cfg.max_epochs=1'
        output_of('train.py', config, '--work-dir', tmp_path, once, folder=tmp_path)
        assert (tmp_path / 'skipped_images.txt').read_text() == f'{said}\n'


@pytest.mark.parametrize(
    'package, expected',
    [
        ('mmpretrain', 'needs the package mmpretrain, which is not installed.'),
        ('torchvision', f'needs a torchvision that fits torch {torch.__version__}'),
    ],
)
def test_a_missing_package_is_named(refusal_of, monkeypatch, package, expected):
    monkeypatch.setitem(sys.modules, package, None)
    # Tests before this one may have imported it.
    monkeypatch.setattr('crossformer_mm.engine.config.registered_scopes', set)
    for tool in 'train.py', 'get_flops.py':
        assert expected in refusal_of(tool, CLASSIFIER)


@pytest.mark.parametrize(
    'option, expected',
    [
        (
            'model.head.num_classes=4',
            'model.data_preprocessor.num_classes = 3 and model.head.num_classes = 4 must be equal.',
        ),
        ('val_evaluator.topk=(1,5)', 'val_evaluator.topk has 5, but there are 3 classes.'),
    ],
)
def test_parts_that_disagree_on_classes(refusal_of, clean, tmp_path, option, expected):
    options = f'--work-dir {tmp_path} --cfg-options {option}'
    assert refusal_of('train.py', write_config(tmp_path, clean), options) == expected
