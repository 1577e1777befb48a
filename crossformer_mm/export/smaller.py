"""Smaller files, and what they cost: the metric of both on the data of a config."""

from pathlib import Path
from typing import Any, Callable, Optional, Tuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.registry import DATASETS

from ..engine.command_line import innermost

MOST_IMAGES = 100  # of the test data, the first of them; more take long and change little


def to_int8(file: Path) -> None:
    """Replace the weights of linear layers by whole numbers, and quantise what they are multiplied
    with while it is computed."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    proto = onnx.load(file)
    said = proto.metadata_props  # which the quantiser leaves out
    # It turns weights, and does not expect that their shapes are here.
    del proto.graph.value_info[:]
    onnx.save(proto, file)
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


def test_data(cfg: Config) -> Tuple[Optional[Any], str]:
    """The test data of a config, and, if there are none, why."""
    if not cfg.get('test_dataloader'):
        return None, 'the config has no test_dataloader'
    try:
        data = DATASETS.build({**innermost(cfg.test_dataloader.dataset), 'test_mode': True})
        data.full_init()
    except (OSError, ValueError) as error:
        return None, f'the test data of the config cannot be read: {error}'
    return data, ''


def metric_of(scope: str, data, predict: Callable) -> Tuple[str, float]:
    """The metric of a library of OpenMMLab, by that library, on the first images.

    Args:
        scope: default_scope of the config.
        data: its test data.
        predict: takes the bytes of an image file, returns what tools/run_onnx.py's Model does.

    Returns:
        tuple: its name and its value, from 0 to 1; AP is of masks if there are any.
    """
    images = [data.get_data_info(index) for index in range(min(len(data), MOST_IMAGES))]
    metric, sample_of = METRICS_OF[scope](data, images)
    for info in images:
        found = predict(Path(info['img_path']).read_bytes())
        metric.process({}, [sample_of(info, found)])
    values = metric.evaluate(len(images))
    for name, key, factor in (
        ('AP', 'coco/segm_mAP', 1.0),
        ('AP', 'coco/bbox_mAP', 1.0),
        ('mIoU', 'mIoU', 0.01),
        ('top-1 accuracy', 'accuracy/top1', 0.01),
    ):
        if key in values:
            return name, factor * float(values[key])
    return 'AP', 0.0  # what CocoMetric says nothing of, for nothing was found


def of_boxes(data, images) -> Tuple[BaseMetric, Callable]:
    from mmdet.evaluation import CocoMetric

    metric = CocoMetric(ann_file=data.ann_file, metric=['bbox'])
    metric.dataset_meta = data.metainfo
    metric.img_ids = [info['img_id'] for info in images]

    def sample_of(info: dict, found: dict) -> dict:
        instances = {
            name: torch.from_numpy(np.ascontiguousarray(found[key]))
            for name, key in (('bboxes', 'boxes'), ('scores', 'scores'), ('labels', 'labels'))
        }
        if 'masks' in found:
            instances['masks'] = torch.from_numpy(found['masks'])
            metric.metrics = ['segm']
        shape = (info['height'], info['width'])
        return dict(img_id=info['img_id'], ori_shape=shape, pred_instances=instances)

    return metric, sample_of


def of_label_maps(data, images) -> Tuple[BaseMetric, Callable]:
    from mmseg.datasets.transforms import LoadAnnotations
    from mmseg.evaluation import IoUMetric

    metric = IoUMetric()
    metric.dataset_meta = data.metainfo
    load = LoadAnnotations(reduce_zero_label=data.reduce_zero_label)

    def sample_of(info: dict, found: dict) -> dict:
        truth = load(dict(info))['gt_seg_map'].astype(np.int64)
        return dict(
            pred_sem_seg=dict(data=torch.from_numpy(found['labels'])),
            gt_sem_seg=dict(data=torch.from_numpy(truth)),
        )

    return metric, sample_of


def of_classes(data, images) -> Tuple[BaseMetric, Callable]:
    from mmpretrain.evaluation import Accuracy

    def sample_of(info: dict, found: dict) -> dict:
        truth = torch.tensor([info['gt_label']])
        return dict(pred_score=torch.from_numpy(found['scores']), gt_label=truth)

    return Accuracy(topk=1), sample_of


METRICS_OF = dict(mmdet=of_boxes, mmseg=of_label_maps, mmpretrain=of_classes)
