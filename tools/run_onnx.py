"""Predict with a file of tools/export.py: NumPy, OpenCV and ONNX Runtime are all it needs.

    python tools/run_onnx.py model.onnx photos --out predictions

writes into the folder of --out what tools/predict.py writes:

    pictures/      what was predicted, drawn over each image
    images.json    names, sizes and ids of the images and of the categories, and what was skipped
    results.bbox.json, results.segm.json
                   of a detector: boxes, and masks if it has any, in COCO's format of results;
                   masks need pycocotools
    labels/        of a segmentor: label maps as PNG, with the values that the dataset's own have

and, of a classifier, results.classes.json: of each image the five classes with the best scores.

A file that cannot be read, and one whose picture or label map cannot be written, is named at the
end; the exit status is then 1.

To use a model in a program of your own, copy this file beside it:

    from run_onnx import Model
    model = Model('model.onnx')
    found = model(model.decode(open('photo.jpg', 'rb').read()))    # a dict of arrays

Several threads may call one model at the same time.
"""

import argparse
import glob
import json
import os
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import cv2
import numpy as np

MOST_CLASSES = 5  # that are written of an image
IMAGES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')
# How OpenCV calls what the metadata names.
INTERPOLATIONS = dict(
    nearest='INTER_NEAREST',
    bilinear='INTER_LINEAR',
    bicubic='INTER_CUBIC',
    area='INTER_AREA',
    lanczos='INTER_LANCZOS4',
)
PROVIDERS = dict(cpu='CPUExecutionProvider', cuda='CUDAExecutionProvider', openvino=None)


class ModelError(ValueError):
    """A file, a provider or an image that cannot be used; the message is a sentence."""


class Model:
    """A model in a file, and all that has to be done before and after it.

    Threads may share a model.

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
        start = start_openvino if provider == 'openvino' else start_onnxruntime
        self.inputs, self.outputs, self.run, texts = start(str(file), provider, threads)
        try:
            self.about = {key: json.loads(texts[key]) for key in ('task', 'resize', 'classes')}
            # Files written before these options were kept: pipelines used to have the defaults.
            self.about['load'] = dict(color_type='color', to_float32=False)
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
        """An image in the size that the model was trained for, if the file does not see to it."""
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
            lie = dict(short=width < height, long=width > height, width=True, height=False)
            side = rule['size']
            size = (
                (side, int(side * height / width))
                if lie[rule['edge']]
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
        """An image in the upper left corner of a larger one, of the colour that says nothing."""
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
    """Inputs with their types, names of outputs, the function between them, and metadata."""
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


def start_openvino(file: str, provider: str, threads: int):
    """As :func:`start_onnxruntime`."""
    try:
        import openvino
    except ImportError:
        raise ModelError('--provider openvino needs the package openvino.') from None
    core = openvino.Core()
    options = {'INFERENCE_PRECISION_HINT': 'f32'}
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
    try:  # where OpenVINO keeps what an ONNX file says of itself
        texts = {key: given for key, given in read.get_rt_info(['framework']).value.items()}
    except RuntimeError:
        texts = {}

    def run(given: dict) -> List[np.ndarray]:
        # `compiled(given)` would use one request for all threads, which mixes up their results.
        results = compiled.create_infer_request().infer(given)
        return [np.array(results[index]) for index in range(len(outputs))]

    return inputs, outputs, run, texts


def middle(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """What lies in the middle of an image; as much as there is."""
    begin = [max(0, round((side - out) / 2)) for side, out in zip(image.shape, (height, width))]
    return image[begin[0] : begin[0] + height, begin[1] : begin[1] + width]


def paste(
    masks: np.ndarray, boxes: np.ndarray, height: int, width: int, threshold: float
) -> np.ndarray:
    """Stretch masks (n, h, w) over their boxes in an image, (n, height, width) boolean.

    Between the middles of a mask's cells values change linearly, and beyond the outer ones to 0.
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
    """(pixels, cells): how much of each cell of a box' side a pixel is made of."""
    pixel = np.arange(begin, max(begin, end), dtype=np.float32) + np.float32(0.5)
    with np.errstate(divide='ignore', invalid='ignore'):
        place = (pixel - low) / (high - low)
    place = np.where(np.isinf(place), np.float32(0.5), place) * cells - np.float32(0.5)
    return np.maximum(1 - np.abs(place[:, None] - np.arange(cells, dtype=np.float32)), 0)


# Files


def find_files(patterns: Sequence[str], out: Path) -> List[Path]:
    """The files that arguments name, each once; those of folders sorted, none of our own output."""
    found = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            inside = sorted(
                file
                for file in path.rglob('*')
                if file.suffix.lower() in IMAGES and out.absolute() not in file.absolute().parents
            )
            if not inside:
                fail(f"folder '{pattern}' holds no images: looked for {', '.join(IMAGES)}.")
        elif path.is_file():
            inside = [path]
        else:
            inside = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
            if not inside:
                fail(f"images: '{pattern}' is no file, no folder and matches nothing.")
        found += inside
    return list({file.absolute(): file for file in found}.values())


def names_of(files: Sequence[Path]) -> List[Tuple[str, str]]:
    """Of each its path below the folder that all share, and that without suffix, no two alike."""
    shared = Path(os.path.commonpath([file.absolute().parent for file in files]))
    names = [file.absolute().relative_to(shared) for file in files]
    taken = Counter([*names, *(name.with_suffix('') for name in names if name.suffix)])
    return [
        (
            name.as_posix(),
            (name if taken[name.with_suffix('')] > 1 else name.with_suffix('')).as_posix(),
        )
        for name in names
    ]


def read_image(path: Path, decode: Callable) -> Tuple[Optional[np.ndarray], str]:
    """An image, or None and why there is none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return None, f'it could not be opened: {error.strerror or error}'
    image = None if is_cut_short(data) else decode(data)
    return image, '' if image is not None else 'it is cut short or no image that OpenCV reads'


def is_cut_short(data: bytes) -> bool:
    """Whether these are of a JPEG without its end, which is read as one that is grey from there."""
    if not data.startswith(b'\xff\xd8'):
        return False
    place = 2
    # A preview in the head has an end marker of its own: to the first scan, from part to part.
    while data[place : place + 1] == b'\xff' and data[place + 1 : place + 2] != b'\xda':
        if data[place + 1 : place + 2] == b'\xff':  # filling
            place += 1
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], 'big')
    return b'\xff\xd9' not in data[place:]


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{os.getpid()}')  # no longer than the name of any file
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_image(path: Path, image: np.ndarray) -> str:
    """Write an image file; the reason if that is not possible, or nothing."""
    try:
        encoded, data = cv2.imencode(path.suffix, image)
        if not encoded:
            raise cv2.error(f'OpenCV cannot encode {image.shape[1]} x {image.shape[0]} pixels')
        write(path, data.tobytes())
    except (OSError, cv2.error) as error:
        return f"'{path}' could not be written: {str(error).strip().splitlines()[-1]}"
    return ''


class Ids:
    """Ids of images and of categories: counted from 1, or those of COCO annotations."""

    def __init__(self, ann_file: Optional[str], classes: Sequence[str], first: int):
        self.images: Optional[dict] = None
        self.categories = list(range(first, first + len(classes)))
        if not ann_file:
            return
        try:
            known = json.loads(Path(ann_file).read_text(encoding='utf-8'))
            listed = [image['file_name'] for image in known['images']]
            self.images = dict(zip(listed, [image['id'] for image in known['images']]))
            by_name = {category['name']: category['id'] for category in known['categories']}
        except (OSError, ValueError, KeyError, TypeError):
            fail(f"--ann-file: '{ann_file}' is no file of COCO annotations.")
        if len(self.images) < len(listed):
            twice = Counter(listed).most_common(1)[0][0]
            fail(f"--ann-file: '{ann_file}' lists the image '{twice}' more than once.")
        unknown = [name for name in classes if name not in by_name]
        if unknown:
            fail(f"--ann-file: '{ann_file}' has no category '{unknown[0]}', which the model has.")
        self.categories = [by_name[name] for name in classes]

    def of(self, files: Sequence[Path]) -> List[int]:
        """Of each image, by as much of the end of its path as the annotations have."""
        if self.images is None:
            return list(range(1, len(files) + 1))
        found: Dict[int, Path] = {}
        for file in files:
            parts = file.absolute().parts
            ends = ('/'.join(parts[start:]) for start in range(len(parts)))
            known = [self.images[end] for end in ends if end in self.images]
            if not known:
                fail(f"--ann-file: it names no image '{file}'.")
            if known[0] in found:
                fail(f"--ann-file: '{found[known[0]]}' and '{file}' are one image in it.")
            found[known[0]] = file
        return list(found)


def in_coco_format(found: dict, image: int, categories: Sequence[int]) -> Dict[str, List[dict]]:
    """A detector's results as COCO has them, boxes and, if there are any, masks."""
    alike = [
        dict(image_id=image, category_id=categories[label], score=score)
        for label, score in zip(found['labels'], found['scores'].tolist())
    ]
    boxes = found['boxes'].tolist()
    results = dict(
        bbox=[
            {**one, 'bbox': [left, top, right - left, bottom - top]}
            for one, (left, top, right, bottom) in zip(alike, boxes)
        ]
    )
    if 'masks' in found:
        from pycocotools import mask as coco

        results['segm'] = []
        for one, mask in zip(alike, found['masks']):
            encoded = coco.encode(np.asfortranarray(mask, np.uint8))
            one['segmentation'] = dict(size=encoded['size'], counts=encoded['counts'].decode())
            results['segm'].append(one)
    return results


def best_classes(scores: np.ndarray) -> List[int]:
    """Some classes of a classifier, best first."""
    return np.argsort(-scores, kind='stable')[:MOST_CLASSES].tolist()


def draw(image: np.ndarray, found: dict, about: dict, threshold: float) -> np.ndarray:
    """What was found, drawn over an image."""
    drawn = image.copy()
    if about['task'] == 'classes':
        for line, label in enumerate(best_classes(found['scores'])):
            text = f'{name_of(about, label)} {found["scores"][label]:.2f}'
            write_on(drawn, text, 5, 18 * (line + 1))
        return drawn
    palette = np.array(about['palette'] or [[255, 0, 0]], np.uint8)[:, ::-1]
    if about['task'] == 'label map':
        colours = palette[found['labels'] % len(palette)]
        return cv2.addWeighted(image, 0.5, colours, 0.5, 0)
    shown = np.flatnonzero(found['scores'] >= threshold)
    for index in shown[::-1]:
        label = int(found['labels'][index])
        colour = [int(value) for value in palette[label % len(palette)]]
        if 'masks' in found:
            mask = found['masks'][index]
            drawn[mask] = (0.5 * drawn[mask] + 0.5 * np.array(colour)).astype(np.uint8)
        left, top, right, bottom = (int(round(float(side))) for side in found['boxes'][index])
        cv2.rectangle(drawn, (left, top), (right, bottom), colour, 2)
        text = f'{name_of(about, label)} {found["scores"][index]:.2f}'
        write_on(drawn, text, left, max(top - 4, 10))
    return drawn


def name_of(about: dict, label: int) -> str:
    return about['classes'][label] if label < len(about['classes']) else str(label)


def write_on(image: np.ndarray, text: str, left: int, bottom: int) -> None:
    """Letters, white with a dark edge."""
    for ink, thickness in ((0, 3), (255, 1)):
        cv2.putText(
            image, text, (left, bottom), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (ink, ink, ink), thickness,
            cv2.LINE_AA,
        )  # fmt: skip


# The command


def peak_memory() -> str:
    try:
        import resource
    except ImportError:  # on Windows
        return 'peak memory is not known here'
    unit = 1 if sys.platform == 'darwin' else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return f'peak memory {peak:.2f} GiB'


def fail(sentence: str) -> None:
    print(f'error: {sentence}', file=sys.stderr)
    sys.exit(2)


def parse_args():
    parser = argparse.ArgumentParser(
        description='Predict with a file of tools/export.py, without PyTorch'
    )
    parser.add_argument('model', help='file of tools/export.py, a whole model')
    parser.add_argument(
        'images', nargs='+', help="images, folders of them, or patterns such as 'photos/*.jpg'"
    )
    parser.add_argument(
        '--out', default='predictions', metavar='DIR', help='folder to write (default: %(default)s)'
    )
    parser.add_argument(
        '--provider',
        choices=list(PROVIDERS),
        default='cpu',
        help='what computes: cpu or cuda of ONNX Runtime, or OpenVINO (default: cpu)',
    )
    parser.add_argument(
        '--threads', type=int, default=0, help='of the CPU (default: as the runtime chooses)'
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        metavar='SCORE',
        help='lowest score of the objects in pictures (default: 0.3); the .json files have all',
    )
    parser.add_argument(
        '--ann-file',
        metavar='FILE.json',
        help='take the ids of images and categories from these COCO annotations, by name; '
        'without, they count from 1',
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        fail(f"--out: '{args.out}' is a file.")
    if not 0 <= args.score_thr <= 1:
        fail(f'--score-thr must be from 0 to 1, got {args.score_thr}.')
    if args.threads < 0:
        fail(f'--threads must be at least 0, got {args.threads}.')
    files = find_files(args.images, out)
    try:
        model = Model(args.model, args.provider, args.threads)
    except ModelError as error:
        fail(str(error))
    about = model.about
    task = about['task']
    detection = task in ('boxes', 'instances')
    if args.ann_file and not detection:
        fail('--ann-file is of detectors; results of others have no ids.')
    if task == 'label map' and 'labels' not in model.outputs:
        fail(f"model: '{args.model}' returns logits; this tool writes labels.")
    if 'masks' in model.outputs:
        try:
            import pycocotools  # noqa: F401
        except ImportError:
            fail('masks are written as COCO has them, which needs the package pycocotools.')
    ids = Ids(args.ann_file, about['classes'], 1 if detection else about['first_value'])
    names = names_of(files)
    numbers = ids.of(files)
    for written in ('images', 'results.bbox', 'results.segm', 'results.classes'):
        # Of an earlier run: from now on not the truth.
        (out / f'{written}.json').unlink(missing_ok=True)

    entries: List[dict] = []
    skipped: List[dict] = []
    results: Dict[str, List[dict]] = dict(bbox=[]) if detection else {}
    if task == 'classes':
        results['classes'] = []
    if 'masks' in model.outputs:
        results['segm'] = []
    seconds = 0.0

    def predict(file: Path, name: str, stem: str, number: int) -> str:
        """Predict on one file; the reason if it could not be read or written, or nothing."""
        nonlocal seconds
        image, reason = read_image(file, model.decode)
        if image is None:
            return reason
        start = time.perf_counter()
        found = model(image)
        seconds += time.perf_counter() - start
        entry = dict(id=number, file_name=name, height=image.shape[0], width=image.shape[1])
        if detection:
            for kind, new in in_coco_format(found, number, ids.categories).items():
                results[kind] += new
        elif task == 'classes':
            results['classes'] += [
                dict(image_id=number, category_id=label, score=float(found['scores'][label]))
                for label in best_classes(found['scores'])
            ]
        else:
            labels = found['labels'] + about['first_value']
            labels = labels.astype(np.uint8 if labels.max() < 256 else np.uint16)
            path = out / 'labels' / f'{stem}.png'
            reason = write_image(path, labels)
            if reason:
                return reason
            entry['label_map'] = path.relative_to(out).as_posix()
        entries.append(entry)
        drawn = draw(image, found, about, args.score_thr)
        return write_image(out / 'pictures' / f'{stem}.jpg', drawn)

    def write_results() -> None:
        for kind, found in results.items():
            write(out / f'results.{kind}.json', json.dumps(found).encode())
        categories = [
            dict(id=id_, name=name) for id_, name in zip(ids.categories, about['classes'])
        ]
        listed = dict(images=entries, categories=categories, skipped=skipped)
        write(out / 'images.json', json.dumps(listed, indent=1).encode())

    try:
        for file, (name, stem), number in zip(files, names, numbers):
            reason = predict(file, name, stem, number)
            if reason:
                skipped.append(dict(file_name=name, reason=reason))
    except Exception:
        write_results()  # what was predicted before is kept
        raise
    write_results()
    print(f"{len(entries)} images predicted, see '{out}'; {len(skipped)} files skipped")
    if entries:
        print(f'{len(entries) / seconds:.2f} images per second, {peak_memory()}')
    for one in skipped:
        print(f"error: '{one['file_name']}' was skipped: {one['reason']}.", file=sys.stderr)
    sys.exit(1 if skipped else 0)


if __name__ == '__main__':
    main()
