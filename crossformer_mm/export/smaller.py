"""Smaller weights in ONNX files, and the metric before and after."""

from pathlib import Path
from typing import Callable, Tuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.registry import DATASETS

from ..config_parts import innermost
from ..errors import UserError

MAX_IMAGES = 100  # first images of the test data; more take long and change little


def to_int8(file: Path) -> None:
    """Store the weights of linear layers as int8, with dynamic quantisation of activations."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    proto = onnx.load(file)
    metadata = {prop.key: prop.value for prop in proto.metadata_props}  # the quantiser drops it
    # The quantiser transposes weights, and fails if their shapes are given.
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
    onnx.helper.set_model_props(proto, metadata)
    onnx.save(proto, file)


def to_float16(file: Path) -> None:
    """Store weights as float16; a runtime converts them to float32 when it loads the file."""
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


def test_data(cfg: Config):
    """Load the test data of a config.

    Raises:
        UserError: there are none.
    """
    reason = 'the config has no test_dataloader'
    if cfg.get('test_dataloader'):
        try:
            data = DATASETS.build({**innermost(cfg.test_dataloader.dataset), 'test_mode': True})
            data.full_init()
            return data
        except (OSError, ValueError) as error:
            reason = f'the test data of the config cannot be read: {error}'
    raise UserError(
        f'--int8 and --float16 print what they cost, but {reason}; name its folder with '
        '--data-root.'
    )


def metric_of(scope: str, data, predict: Callable) -> Tuple[str, float]:
    """Compute a library's own metric on the first images.

    Args:
        scope: default_scope of the config.
        data: its test data.
        predict: function of the bytes of an image file that returns the results of a Model.

    Returns:
        tuple: its name and its value, from 0 to 1; if there are masks, AP is that of masks.
    """
    images = [data.get_data_info(index) for index in range(min(len(data), MAX_IMAGES))]
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
    return 'AP', 0.0  # CocoMetric returns nothing if there are no results


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
