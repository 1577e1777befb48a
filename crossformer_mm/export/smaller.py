"""Smaller files, and what they cost: the metric of both on the data of a config."""

from pathlib import Path
from typing import Callable, List, Optional, Tuple

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS

from ..engine.command_line import innermost

MOST_IMAGES = 100  # of the test data, the first of them; more take long and change little


def to_int8(file: Path) -> None:
    """Replace the weights of linear layers by whole numbers, and quantise what they are multiplied
    with while it is computed."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    said = onnx.load(file).metadata_props  # which the quantiser leaves out
    quantize_dynamic(
        file,
        file,
        op_types_to_quantize=['MatMul', 'Gemm'],
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options=dict(MatMulConstBOnly=True),
    )
    proto = onnx.load(file)
    del proto.metadata_props[:]
    proto.metadata_props.extend(said)
    onnx.save(proto, file)


def to_float16(file: Path) -> None:
    """Keep weights as float16; a runtime turns them back when it loads the file."""
    import onnx

    proto = onnx.load(file)
    casts = []
    for weight in proto.graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or np.prod(weight.dims) < 256:
            continue
        values = onnx.numpy_helper.to_array(weight)
        short = f'{weight.name}_float16'
        casts.append(onnx.helper.make_node('Cast', [short], [weight.name], to=1))
        half = np.clip(values, -65504, 65504).astype(np.float16)
        weight.CopyFrom(onnx.numpy_helper.from_array(half, short))
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    onnx.save(proto, file)


def test_data(cfg: Config) -> Tuple[Optional[object], str]:
    """The test data of a config, and, if there are none, why."""
    if not cfg.get('test_dataloader'):
        return None, 'the config has no test_dataloader'
    try:
        data = DATASETS.build({**innermost(cfg.test_dataloader.dataset), 'test_mode': True})
        data.full_init()
    except (OSError, ValueError) as error:
        return None, f'the test data of the config cannot be read: {error}'
    return data, ''


def box_ap(data, predict: Callable) -> float:
    """COCO's AP of boxes, or of masks if there are any, on the first images.

    Args:
        data: a CocoDataset of MMDetection.
        predict: takes an image as OpenCV reads it, returns what tools/run_onnx.py's Model does.
    """
    import cv2
    from pycocotools import mask as coco
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found: List[dict] = []
    ids = []
    for index in range(min(len(data), MOST_IMAGES)):
        info = data.get_data_info(index)
        ids.append(info['img_id'])
        results = predict(cv2.imread(info['img_path']))
        for place, (box, score, label) in enumerate(
            zip(results['boxes'].tolist(), results['scores'].tolist(), results['labels'])
        ):
            one = dict(image_id=info['img_id'], category_id=data.cat_ids[label], score=score)
            one['bbox'] = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            if 'masks' in results:
                mask = np.asfortranarray(results['masks'][place], np.uint8)
                one['segmentation'] = coco.encode(mask)
            found.append(one)
    if not found:
        return 0.0
    kind = 'segm' if 'segmentation' in found[0] else 'bbox'
    known = COCO(data.ann_file)
    evaluation = COCOeval(known, known.loadRes(found), kind)
    evaluation.params.imgIds = ids
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])


def mean_iou(data, predict: Callable) -> float:
    """Mean over the classes that occur of intersection over union, on the first images; arguments
    as of :func:`box_ap`, data of MMSegmentation."""
    import cv2

    classes = len(data.metainfo['classes'])
    counts = np.zeros((classes, classes), np.int64)
    for index in range(min(len(data), MOST_IMAGES)):
        info = data.get_data_info(index)
        labels = predict(cv2.imread(info['img_path']))['labels']
        truth = cv2.imread(info['seg_map_path'], cv2.IMREAD_UNCHANGED).astype(np.int64)
        truth = truth - 1 if data.reduce_zero_label else truth
        known = (truth >= 0) & (truth < classes)
        pairs = truth[known] * classes + labels[known]
        counts += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return float((counts.diagonal() / np.maximum(union, 1))[counts.sum(1) > 0].mean())
