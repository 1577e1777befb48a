"""Smaller weights, and what they cost: crossformer_mm/export/smaller.py."""

import re

import cv2
import numpy as np
import pytest
from mmengine.registry import DATASETS, init_default_scope

from crossformer_mm.without_torch.model import Model

from ..trainings import make_data
from ..without_torch.exported import LISTED, RETINANET


def test_a_file_of_one_size_in_int8(output_of, refusal_of, tmp_path):
    """On data of shapes, of which random weights know nothing: an AP of 0 is said, too."""
    make_data(tmp_path / 'shapes', train=1, val=2, size=64)
    config, file = tmp_path / 'config.py', tmp_path / 'model.onnx'
    config.write_text(RETINANET)
    classes = "test_dataloader.dataset.metainfo.classes=('disk','square','triangle','star')"
    data = '--data-root', tmp_path / 'shapes/coco', '--cfg-options', classes
    options = '--threads 1 --fixed-shape 64 96 --int8'
    printed = output_of('export.py', config, '--out', file, options, *data)
    assert re.search(r'int8: AP \d\.\d{3} before, \d\.\d{3} after \([+-]\d\.\d{3}\), on 2', printed)
    assert '1 x 64 x 96: relative difference' in printed
    model = Model(file)
    image = np.random.default_rng(0).integers(256, size=(30, 400, 3), dtype=np.uint8)
    found = model(image)  # made smaller and filled up
    assert model.about['fixed_shape'] == [64, 96] and set(found) == {'boxes', 'scores', 'labels'}
    assert 'fill' in model.about and model.about.keys() <= LISTED
    assert (found['boxes'] >= 0).all() and (found['boxes'] <= [400, 30, 400, 30]).all()
    for arguments, said in {
        '--fixed-shape 0 9': 'must be two numbers',
        '--fixed-shape 64 96 --resize-inside': 'of any size',
        '--int8 --float16': 'give one',
        '--int8': '--data-root',
    }.items():
        assert said in refusal_of('export.py', config, '--out', file, arguments)


def test_what_weights_of_fewer_bits_cost_is_said_by_the_libraries_metrics(tmp_path):
    """The annotations, or half of them, stand in for a model's predictions."""
    from crossformer_mm.export.smaller import metric_of

    make_data(tmp_path, train=1, val=3, size=64)
    names = ('disk', 'square', 'triangle', 'star')

    def data_of(scope: str, dataset: dict):
        init_default_scope(scope)
        return DATASETS.build(dict(test_mode=True, pipeline=[], **dataset))

    coco = dict(ann_file='annotations/instances_val2017.json', data_prefix=dict(img='val2017/'))
    coco.update(type='CocoDataset', data_root=str(tmp_path / 'coco'), metainfo=dict(classes=names))
    boxes = data_of('mmdet', coco)
    truths = iter([boxes.get_data_info(index)['instances'] for index in range(3)] * 2)

    def found(share: float):
        objects = next(truths)
        objects = objects[: max(1, int(share * len(objects)))]
        return dict(
            boxes=np.array([one['bbox'] for one in objects], np.float32),
            scores=np.ones(len(objects), np.float32),
            labels=np.array([one['bbox_label'] for one in objects]),
        )

    assert metric_of('mmdet', boxes, lambda image: found(1.0)) == ('AP', 1.0)
    assert 0 < metric_of('mmdet', boxes, lambda image: found(0.5))[1] < 1

    ade = dict(type='BaseSegDataset', data_root=str(tmp_path / 'ade'), reduce_zero_label=True)
    ade.update(img_suffix='.jpg', seg_map_suffix='.png', metainfo=dict(classes=('none', *names)))
    ade['data_prefix'] = dict(img_path='images/validation', seg_map_path='annotations/validation')
    maps = data_of('mmseg', ade)
    infos = [maps.get_data_info(index) for index in range(3)]
    truths = iter([cv2.imread(info['seg_map_path'], cv2.IMREAD_UNCHANGED) for info in infos])
    # 0 of a label map is "other", and becomes 255, which no metric counts.
    name, value = metric_of('mmseg', maps, lambda _: dict(labels=next(truths).astype(int) - 1))
    assert (name, value) == ('mIoU', 1.0)

    pytest.importorskip('mmpretrain')

    class Classes(list):
        def get_data_info(self, index):
            return self[index]

    classes = Classes(dict(img_path=__file__, gt_label=label) for label in (0, 1))
    scores = np.array([0.9, 0.1], np.float32)
    accuracy = metric_of('mmpretrain', classes, lambda _: dict(scores=scores))
    assert accuracy == ('top-1 accuracy', 0.5)
