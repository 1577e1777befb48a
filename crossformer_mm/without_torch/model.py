"""Exported models, from the pixels of an image to boxes, masks, label maps or scores."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, List, Optional

import cv2
import numpy as np

from .errors import UserError

MAX_CLASSES = 5  # that are reported for an image
# OpenCV's names of the interpolations in the metadata.
INTERPOLATIONS = dict(
    nearest='INTER_NEAREST',
    bilinear='INTER_LINEAR',
    bicubic='INTER_CUBIC',
    area='INTER_AREA',
    lanczos='INTER_LANCZOS4',
)
LOAD = dict(color_type='color', to_float32=False)  # LoadImageFromFile's defaults
PROVIDERS = dict(cpu='CPUExecutionProvider', cuda='CUDAExecutionProvider', openvino=None)


class ModelError(UserError):
    """A file, a provider or an image that cannot be used; the message says why."""


class Model:
    """A model in a file, with the steps before and after it. Threads may share it.

    Args:
        file: of tools/export.py, a whole model.
        provider: 'cpu' or 'cuda', of ONNX Runtime, or 'openvino', which takes the package openvino.
        threads: of the CPU; 0: as the runtime chooses.

    Raises:
        ModelError: the file or the provider cannot be used.
    """

    def __init__(self, file: str, provider: str = 'cpu', threads: int = 0):
        if not Path(file).is_file():
            raise ModelError(f"model: file '{file}' does not exist.")
        self.file = file
        self.inputs, self.outputs, self.run, texts = (
            start_openvino(str(file), threads)
            if provider == 'openvino'
            else start_onnxruntime(str(file), provider, threads)
        )
        try:
            self.about = {key: json.loads(texts[key]) for key in ('task', 'resize', 'classes')}
            # Files written before these options were kept: pipelines used to have the defaults.
            self.about['load'] = dict(LOAD)
            for key, text in texts.items():
                self.about[key] = json.loads(text)
        except (KeyError, ValueError):
            raise ModelError(
                f"model: '{file}' does not say how it is run; tools/export.py writes files that "
                'do, with --what model.'
            ) from None
        if (self.about['resize'] or {}).get('backend') == 'pillow' and find_spec('PIL') is None:
            raise ModelError(f"model: '{file}' needs the package pillow, to resize images.")

    def decode(self, data: bytes) -> Optional[np.ndarray]:
        """Decode an image file as the training's pipeline did.

        Args:
            data: the bytes of the file.

        Returns:
            np.ndarray: (height, width, 3) uint8, blue first; None if OpenCV cannot decode it.
        """
        flag = cv2.IMREAD_COLOR
        if self.about['load']['color_type'] == 'color_ignore_orientation':
            flag |= cv2.IMREAD_IGNORE_ORIENTATION
        try:
            return cv2.imdecode(np.frombuffer(data, np.uint8), flag) if data else None
        except cv2.error:  # more pixels than OpenCV takes
            return None

    def __call__(self, image: np.ndarray) -> Dict[str, np.ndarray]:
        """Predict what is in an image.

        Args:
            image: (height, width, 3) uint8, blue first, as :meth:`decode` returns it.

        Raises:
            ModelError: the image is anything else.

        Returns:
            dict: of a detector ``boxes`` (n, 4) as left, top, right, bottom, ``scores`` (n,),
            ``labels`` (n,) and, if it has any, ``masks`` (n, height, width), boolean; of a
            segmentor ``labels`` (height, width) or ``logits`` (classes, height, width); of a
            classifier ``scores`` (classes,).
        """
        check_image(image)
        height, width = image.shape[:2]
        resized = self.prepare(image)
        fixed = self.about.get('fixed_shape')
        padded = self.pad(resized, *fixed) if fixed else resized
        dtype = np.float32 if 'float' in self.inputs['image'] else np.uint8
        rgb = padded[None, ..., ::-1].transpose(0, 3, 1, 2)  # (1, 3, height, width)
        given = dict(image=np.ascontiguousarray(rgb, dtype))
        if 'size' in self.inputs:
            given['size'] = np.array([height, width], np.int64)
        found = dict(zip(self.outputs, self.run(given)))
        if self.about['task'] in ('label map', 'classes'):
            return {name: values[0] for name, values in found.items()}
        scale = [resized.shape[1] / width, resized.shape[0] / height]
        found['boxes'] = found['boxes'] / np.array(scale * 2, np.float32)
        if fixed:
            found['boxes'] = np.minimum(found['boxes'], np.array([width, height] * 2, np.float32))
        if 'masks' in found:
            found['masks'] = paste(
                found['masks'], found['boxes'], height, width, self.about['mask_threshold']
            )
        return found

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Convert, resize and crop an image as the training's test pipeline did."""
        if self.about['load']['to_float32']:
            image = image.astype(np.float32)
        image = self.resize(image)
        return middle(image, *self.about['crop']) if 'crop' in self.about else image

    def resize(self, image: np.ndarray) -> np.ndarray:
        """Resize an image as for training, unless the file resizes it."""
        rule = self.about['resize']
        fixed = self.about.get('fixed_shape')
        if 'crop' in self.about:
            fixed = None  # it is what is cut out
        if rule is None and not fixed:
            return image
        height, width = image.shape[:2]
        if fixed and 'boxes' not in self.outputs:
            size = fixed[1], fixed[0]
        elif fixed:
            factor = min(fixed[0] / height, fixed[1] / width)
            size = int(width * factor), int(height * factor)
        elif 'edge' in rule:
            sets_width = dict(short=width < height, long=width > height, width=True, height=False)
            side = rule['size']
            size = (
                (side, int(side * height / width))
                if sets_width[rule['edge']]
                else (int(side * width / height), side)
            )
        elif rule['keep_ratio']:
            sides = sorted((rule['height'], rule['width']))
            factor = min(sides[1] / max(height, width), sides[0] / min(height, width))
            size = int(width * factor + 0.5), int(height * factor + 0.5)
        else:
            size = rule['width'], rule['height']
        size = max(1, size[0]), max(1, size[1])
        how = rule['interpolation'] if rule else 'bilinear'
        if rule and rule.get('backend') == 'pillow':
            from PIL import Image

            return np.array(Image.fromarray(image).resize(size, Image.Resampling[how.upper()]))
        return cv2.resize(image, size, interpolation=getattr(cv2, INTERPOLATIONS[how]))

    def pad(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
        """Pad an image at the right and below, with the mean colour."""
        out = np.empty((height, width, 3), image.dtype)
        out[:] = self.about['fill'][::-1]
        out[: image.shape[0], : image.shape[1]] = image
        return out


def check_image(image) -> None:
    """Raise a ModelError if an image is no uint8 array (height, width, 3)."""
    if (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.ndim == 3
        and image.shape[2] == 3
        and image.size
    ):
        return
    if image is None:
        found = 'None, which cv2.imread returns for a file that it cannot read'
    elif isinstance(image, np.ndarray):
        found = f'an array of {image.dtype} {image.shape}'
    else:
        found = f'a {type(image).__name__}'
    raise ModelError(
        'image: it must be an array of uint8 (height, width, 3) with the values of blue, green '
        f'and red, got {found}.'
    )


def start_onnxruntime(file: str, provider: str, threads: int):
    """Load a file in ONNX Runtime.

    Returns:
        tuple: types of the inputs by their names, names of the outputs, the function between them,
        and the metadata.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ModelError('--provider cpu and cuda need the package onnxruntime.') from None
    name = PROVIDERS[provider]
    if name not in onnxruntime.get_available_providers():
        raise ModelError(
            f'--provider {provider}: this onnxruntime has no {name}; '
            f'it has {", ".join(onnxruntime.get_available_providers())}.'
        )
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(file, options, providers=[name])
    except (state.Fail, state.InvalidProtobuf, state.InvalidGraph, state.NotImplemented) as error:
        raise ModelError(
            f"model: '{file}' cannot be loaded: {str(error).splitlines()[0]}"
        ) from None
    inputs = {given.name: given.type for given in session.get_inputs()}
    outputs = [given.name for given in session.get_outputs()]
    texts = session.get_modelmeta().custom_metadata_map
    return inputs, outputs, lambda given: session.run(outputs, given), texts


def start_openvino(file: str, threads: int):
    """Load a file in OpenVINO, like :func:`start_onnxruntime`."""
    try:
        import openvino
    except ImportError:
        raise ModelError('--provider openvino needs the package openvino.') from None
    core = openvino.Core()
    options: Dict[str, Any] = {'INFERENCE_PRECISION_HINT': 'f32'}
    if threads:
        options['INFERENCE_NUM_THREADS'] = threads
    try:
        read = core.read_model(file)
        compiled = core.compile_model(read, 'CPU', options)
    except RuntimeError as error:
        raise ModelError(
            f"model: '{file}' cannot be loaded: {str(error).splitlines()[0]}"
        ) from None
    inputs = {given.any_name: given.element_type.to_string() for given in compiled.inputs}
    outputs = [given.any_name for given in compiled.outputs]
    inputs = {name: 'float' if kind.startswith('f') else kind for name, kind in inputs.items()}
    try:  # where OpenVINO keeps the metadata of an ONNX file
        texts = {key: given for key, given in read.get_rt_info(['framework']).value.items()}
    except RuntimeError:
        texts = {}

    def run(given: dict) -> List[np.ndarray]:
        # `compiled(given)` would use one request for all threads, which mixes up their results.
        results = compiled.create_infer_request().infer(given)
        return [np.array(results[index]) for index in range(len(outputs))]

    return inputs, outputs, run, texts


def middle(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crop an image around its centre; a smaller side stays."""
    begin = [max(0, round((side - out) / 2)) for side, out in zip(image.shape, (height, width))]
    return image[begin[0] : begin[0] + height, begin[1] : begin[1] + width]


def paste(
    masks: np.ndarray, boxes: np.ndarray, height: int, width: int, threshold: float
) -> np.ndarray:
    """Stretch masks (n, h, w) over their boxes in an image, (n, height, width) boolean.

    Values are interpolated linearly between the centres of a mask's cells, and to 0 outside.
    """
    pasted = np.zeros((len(masks), height, width), bool)
    for out, mask, box in zip(pasted, masks, boxes.astype(np.float32)):
        begin = np.maximum(np.floor(box[:2]) - 1, 0).astype(int)
        end = np.minimum(np.ceil(box[2:]) + 1, (width, height)).astype(int)
        columns, rows = (
            weights(begin[axis], end[axis], box[axis], box[axis + 2], mask.shape[1 - axis])
            for axis in range(2)
        )
        out[begin[1] : end[1], begin[0] : end[0]] = rows @ mask @ columns.T >= threshold
    return pasted


def weights(begin: int, end: int, low: float, high: float, cells: int) -> np.ndarray:
    """Return the share (pixels, cells) of each cell of a box's side in each pixel."""
    pixel = np.arange(begin, max(begin, end), dtype=np.float32) + np.float32(0.5)
    with np.errstate(divide='ignore', invalid='ignore'):
        place = (pixel - low) / (high - low)
    place = np.where(np.isinf(place), np.float32(0.5), place) * cells - np.float32(0.5)
    return np.maximum(1 - np.abs(place[:, None] - np.arange(cells, dtype=np.float32)), 0)


def best_classes(scores: np.ndarray) -> List[int]:
    """Return the classes of a classifier with the best scores, best first."""
    return np.argsort(-scores, kind='stable')[:MAX_CLASSES].tolist()
