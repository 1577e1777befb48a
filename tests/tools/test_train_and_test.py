"""The command line tools: train, test, resume, and a one-line error for what cannot work."""

import pickle
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ..helpers import DEMO_DETECTOR, DEMO_SEGMENTOR, ROOT, Marker, ToolProcess, metrics

SMALL = ['train_dataloader.batch_size=2', 'default_hooks.logger.interval=1']
ONE_EPOCH = [*SMALL, 'train_cfg.max_epochs=1', 'train_cfg.val_interval=1']
TWO_ITERATIONS_TWICE = [
    *SMALL,
    'train_cfg.max_iters=4',
    'train_cfg.val_interval=2',
    'default_hooks.checkpoint.interval=2',
]
MAKE_SHAPES = '--train 8 --val 4 --size 96'


def run(tool: str, *command) -> str:
    """Run a tool in a process of its own, without an error; its output."""
    with tempfile.TemporaryDirectory() as folder:
        process = ToolProcess(Path(folder) / 'log', f'tools/{tool}', *command)
        assert process.wait() == 0, process.output[-3000:]
        return process.output


@pytest.fixture(scope='module')
def shapes(tmp_path_factory) -> Path:
    """A data set of 8 training and 4 held-out images."""
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    run('make_shapes.py', folder, MAKE_SHAPES)
    return folder


@pytest.fixture(scope='module')
def detector(shapes, tmp_path_factory) -> Path:
    """Work folder of a detector trained for one epoch."""
    work = tmp_path_factory.mktemp('detector')
    arguments = f'{DEMO_DETECTOR} --work-dir {work} --data-root {shapes}/coco'
    output = run('train.py', arguments, '--tensorboard-samples 2 --cfg-options', *ONE_EPOCH)
    assert 'loss_mask' in output and 'eta' in output and 'coco/segm_mAP' in output
    assert output.index('no pretrained checkpoint is given') < output.index('Epoch(train)')
    return work


@pytest.fixture(scope='module')
def segmentor(shapes, tmp_path_factory) -> Path:
    """Work folder of a segmentor trained for four iterations."""
    work = tmp_path_factory.mktemp('segmentor')
    arguments = f'{DEMO_SEGMENTOR} --work-dir {work} --data-root {shapes}/ade'
    options = '--tensorboard-samples 3 --cfg-options'
    output = run('train.py', arguments, options, *TWO_ITERATIONS_TWICE)
    assert 'decode.loss_ce' in output and 'eta' in output and 'mIoU' in output
    return work


def tensorboard(work: Path) -> EventAccumulator:
    """Read the TensorBoard events of the first training in a work folder."""
    first = min(work.glob('*/vis_data/events*'))
    return EventAccumulator(str(first), size_guidance=dict(images=0)).Reload()


class TestDetector:
    def test_training_leaves_a_checkpoint_and_tensorboard_events(self, detector):
        assert (detector / 'epoch_1.pth').is_file()
        events = tensorboard(detector)
        assert {'loss', 'coco/bbox_mAP'} <= set(events.Tags()['scalars'])
        # ground truth and prediction, side by side
        assert {
            name: [(image.step, image.height, image.width) for image in events.Images(name)]
            for name in events.Tags()['images']
        } == {f'val_00000000000{i}.png': [(4, 96, 192)] for i in (1, 4)}

    def test_evaluation_keeps_predictions_and_pictures(self, detector, shapes, tmp_path):
        predictions, pictures = tmp_path / 'predictions.pkl', tmp_path / 'pictures'
        files = f'{DEMO_DETECTOR} {detector}/epoch_1.pth --data-root {shapes}/coco'
        out = f'--work-dir {tmp_path} --out {predictions} --show-dir {pictures}'
        run('test.py', files, out)
        kept = pickle.loads(predictions.read_bytes())
        assert len(kept) == 4
        # What metrics are worth is in test_predict.py, with a model that finds something.
        for one in kept:
            found = one['pred_instances']
            assert len(found['bboxes']) == len(found['scores']) == len(found['masks']) > 0
        # ground truth and prediction, side by side
        assert sorted(cv2.imread(str(p)).shape for p in pictures.iterdir()) == [(96, 192, 3)] * 4

    def test_resume_goes_on_after_the_newest_epoch(self, detector, shapes):
        arguments = f'{DEMO_DETECTOR} --work-dir {detector} --data-root {shapes}/coco'
        options = 'train_cfg.max_epochs=2 train_cfg.val_interval=2'
        output = run('train.py', arguments, '--resume --cfg-options', *SMALL, options)
        assert 'Epoch(train) [2][1/4]' in output and 'Epoch(train) [1]' not in output
        assert (detector / 'epoch_2.pth').is_file()


class TestSegmentor:
    def test_the_same_validation_images_are_in_tensorboard_each_time(self, segmentor):
        events = tensorboard(segmentor)
        assert {
            name: [image.step for image in events.Images(name)] for name in events.Tags()['images']
        } == {f'val_00000000000{i}.jpg': [2, 4] for i in (1, 3, 4)}
        encoded = events.Images('val_000000000001.jpg')[0].encoded_image_string
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
        truth, predicted = np.hsplit(image, 2)
        assert truth.shape == (96, 96, 3) and cv2.absdiff(truth, predicted).mean() > 1

    def test_evaluation_keeps_label_maps_and_pictures(self, segmentor, shapes, tmp_path):
        maps, pictures = tmp_path / 'maps', tmp_path / 'pictures'
        config = tmp_path / 'config.py'  # evaluators in a list, no visualizer, no hook for pictures
        config.write_text(f'''
_base_ = {str(ROOT / DEMO_SEGMENTOR)!r}
visualizer = None
default_hooks = dict(visualization=None)
test_evaluator = [dict(_base_.test_evaluator)]
''')
        files = f'{config} {segmentor}/iter_4.pth --data-root {shapes}/ade'
        run('test.py', files, f'--work-dir {tmp_path} --out {maps} --show-dir {pictures}')
        kept, truth = (
            np.stack([cv2.imread(str(file), cv2.IMREAD_UNCHANGED) for file in sorted(files)])
            for files in (maps.glob('*.png'), (shapes / 'ade/annotations/validation').glob('*'))
        )
        assert kept.shape == truth.shape == (4, 96, 96)
        both = [((kept == i) & (truth == i)).sum() for i in range(1, 6)]
        either = [((kept == i) | (truth == i)).sum() for i in range(1, 6)]
        assert metrics(tmp_path)['mIoU'] == pytest.approx(
            100 * np.mean(np.divide(both, either)), abs=0.01
        )
        assert len(list(pictures.glob('*.jpg'))) == 4

    def test_resume_goes_on_after_the_newest_iteration(self, segmentor, shapes):
        arguments = f'{DEMO_SEGMENTOR} --work-dir {segmentor} --data-root {shapes}/ade'
        options = 'train_cfg.max_iters=6 train_cfg.val_interval=6'
        output = run('train.py', arguments, '--resume --cfg-options', *SMALL, options)
        assert 'Iter(train) [5/6]' in output and 'Iter(train) [4/6]' not in output


def test_an_incomplete_dataset_names_the_missing_file(refusal_of, shapes, tmp_path):
    (tmp_path / 'annotations').mkdir()
    missing = tmp_path / 'annotations' / 'instances_train2017.json'
    assert str(missing) in refusal_of('train.py', DEMO_DETECTOR, '--data-root', tmp_path)


@pytest.mark.parametrize('base', [DEMO_DETECTOR, 'configs/mask_rcnn/r50_1x.py'])
def test_weights_in_a_list_are_looked_for(refusal_of, tmp_path, base):
    config = tmp_path / 'config.py'
    config.write_text(f'''
_base_ = {str(ROOT / base)!r}
model = dict(backbone=dict(init_cfg=[dict(type='Pretrained', checkpoint='none.pth')]))
''')
    said = refusal_of('train.py', config)
    assert said == "model.backbone.init_cfg.checkpoint: file 'none.pth' does not exist."


def test_wrong_backbone_option_is_said_before_training(refusal_of, shapes, tmp_path):
    arguments = f'{DEMO_DETECTOR} --work-dir {tmp_path} --data-root {shapes}/coco'
    said = refusal_of('train.py', arguments, '--cfg-options model.backbone.lda=tiles')
    assert "lda must be one of 'interval', 'block', 'shifted', 'none', got 'tiles'" in said


@pytest.mark.parametrize('tool', ['train.py', 'test.py'])
def test_a_checkpoint_with_code_is_refused_and_not_run(refusal_of, shapes, tmp_path, tool):
    marker, checkpoint = tmp_path / 'marker', tmp_path / 'bad.pth'
    torch.save(dict(state_dict={}, extra=Marker(marker)), checkpoint)
    arguments = ['--resume', checkpoint] if tool == 'train.py' else [checkpoint]
    paths = f'--work-dir {tmp_path} --data-root {shapes}/coco'
    said = refusal_of(tool, DEMO_DETECTOR, *arguments, paths)
    assert str(checkpoint) in said and 'was not run' in said
    assert not marker.exists()


class TestMakeShapes:
    def test_same_arguments_give_the_same_files(self, shapes, tmp_path):
        run('make_shapes.py', tmp_path / 'again', MAKE_SHAPES)
        files = sorted(p.relative_to(shapes) for p in shapes.rglob('*') if p.is_file())
        assert len(files) == 12 * 3 + 2 + 1
        for file in files:
            assert (shapes / file).read_bytes() == (tmp_path / 'again' / file).read_bytes()

    def test_a_whole_set_is_reused(self, shapes):
        assert 'is there already' in run('make_shapes.py', shapes, MAKE_SHAPES)

    def test_other_files_are_never_removed(self, refusal_of, tmp_path):
        (tmp_path / 'thesis.txt').write_text('x')
        assert 'holds other files' in refusal_of('make_shapes.py', tmp_path)
        assert (tmp_path / 'thesis.txt').exists()

    def test_label_maps_and_instances_agree(self, shapes):
        coco = COCO(str(shapes / 'coco' / 'annotations' / 'instances_val2017.json'))
        for image in coco.loadImgs(coco.getImgIds()):
            file = shapes / 'ade/annotations/validation' / image['file_name']
            labels = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
            drawn = np.ones_like(labels)
            for annotation in coco.loadAnns(coco.getAnnIds(image['id'])):
                mask = coco.annToMask(annotation).astype(bool)
                assert annotation['area'] == mask.sum() > 0
                drawn[mask] = annotation['category_id'] + 1
            assert (labels == drawn).all()
