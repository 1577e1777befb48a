"""Predict the objects or the label maps of images and videos, with pictures of them.

    python tools/predict.py configs/mask_rcnn/cf_s_1x.py \\
        work_dirs/mask_rcnn/cf_s_1x/epoch_12.pth photos

writes into the folder of --out:

    pictures/      what was predicted, drawn over each image; of a video, a video
    images.json    names, sizes and ids of the images and of the categories, and what was skipped
    results.bbox.json, results.segm.json
                   of a detector: boxes, and masks if it has any, in COCO's format of results
    labels/        of a segmentor: label maps as PNG, with the values that the dataset's own have

A file that cannot be read, and one whose picture, video or label map cannot be written, is named at
the end; the exit status is then 1.
"""

import argparse
import functools
import glob
import json
import math
import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS
from mmengine.utils import ProgressBar
from torch import Tensor, nn

from crossformer_mm.checkpoint import CheckpointError, fit_checkpoint, read_checkpoint
from crossformer_mm.compat import OutOfMemoryError, is_cut_short
from crossformer_mm.engine.class_names import drop_unnamed, names_and_colours, recorded
from crossformer_mm.engine.command_line import (
    DENSE,
    check_file,
    fail,
    innermost,
    kind_of,
    let_draw,
    load_config,
    run,
    sentences_for,
    write_whole,
)
from crossformer_mm.engine.errors import UserError, said
from crossformer_mm.engine.option_checks import add_cfg_options
from crossformer_mm.engine.pictures import as_picture, unique_names, write_image, write_labels
from crossformer_mm.flops import input_channels

IMAGES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')
VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg', '.wmv')


class Source(NamedTuple):
    """A file to predict on.

    Args:
        path: where it is.
        name: its path below the folder that all of them share, as images.json says it.
        stem: the same for what is written about it, without a suffix; no two have the same.
        frames: how many images it holds, as far as it says, but at least 1.
        fps: frames per second of a video, as far as it says; None: it is an image.
    """

    path: Path
    name: str
    stem: str
    frames: int
    fps: Optional[float]


class Image(NamedTuple):
    """One image, or frame of a video, ready for the model."""

    source: Source
    entry: dict  # what images.json says of it
    pixels: np.ndarray  # (H, W, 3) uint8, BGR, to be drawn on
    inputs: dict  # what the test pipeline made of it


def parse_args():
    parser = argparse.ArgumentParser(
        description='Predict the objects or the label maps of images and videos, with pictures'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        'images',
        nargs='+',
        help='images, videos, folders of them, or patterns such as \'photos/*.jpg\'',
    )
    parser.add_argument(
        '--out', default='predictions', metavar='DIR', help='folder to write (default: %(default)s)'
    )
    parser.add_argument(
        '--batch-size',
        type=int,
        default=1,
        metavar='N',
        help='images at a time; those of one batch have the same size, so that '
        'no prediction depends on this (default: %(default)s)',
    )
    parser.add_argument(
        '--device', help="such as cpu, cuda or cuda:1 (default: a GPU if there's one)"
    )
    parser.add_argument(
        '--bf16',
        action='store_true',
        help='compute in bfloat16: backbone and neck of a detector, all of a segmentor',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        metavar='SCORE',
        help='lowest score of the objects in pictures (default: 0.3); the .json '
        'files have all that the detector returns',
    )
    parser.add_argument(
        '--ann-file',
        metavar='FILE.json',
        help='take the ids of images and categories from these COCO annotations, '
        'by name; without, they count from 1',
    )
    add_cfg_options(parser)
    return parser.parse_args()


# Which files


def find_files(patterns: Sequence[str], out: Path) -> List[Path]:
    """The files that arguments name, each once; those of folders sorted, none of our own output.

    Ends the program if an argument names nothing.
    """

    def ours(path: Path) -> bool:
        return out.absolute() in path.absolute().parents

    found = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            inside = sorted(
                file
                for file in path.rglob('*')
                if file.is_file() and file.suffix.lower() in IMAGES + VIDEOS and not ours(file)
            )
            without = f"folder '{pattern}' holds no images or videos: looked for "
            without += f"{', '.join(IMAGES + VIDEOS)}."
        else:
            names = [pattern] if path.is_file() else sorted(glob.glob(pattern, recursive=True))
            inside = [Path(name) for name in names if os.path.isfile(name)]
            without = f"images: '{pattern}' is no file, no folder and matches nothing."
        if not inside:
            fail(without)
        found += inside
    return list({file.absolute(): file for file in found}.values())


def sources_of(files: Sequence[Path], out: Path) -> List[Source]:
    """What is known of files before any is read, but how many frames videos have."""
    named = unique_names([file.absolute() for file in files])
    folders = {parent.as_posix() for name, _ in named for parent in Path(name).parents}
    sources = []
    for file, (name, stem) in zip(files, named):
        frames, fps = 1, None
        if file.suffix.lower() in VIDEOS:
            video = mmcv.VideoReader(str(file))
            frames, fps = max(video.frame_cnt, 1), video.fps
            if stem in folders:  # label maps of a video get a folder of this name
                stem = name
        sources.append(Source(file, name, stem, frames, fps))
        for written in (picture_path(out, sources[-1]), label_path(out, stem)):
            if written.absolute() == file.absolute():
                fail(f"--out: what is predicted of '{file}' would replace it; name another folder.")
    return sources


def picture_path(out: Path, source: Source) -> Path:
    return out / 'pictures' / f'{source.stem}.{"jpg" if source.fps is None else "mp4"}'


def label_path(out: Path, stem: str) -> Path:
    return out / 'labels' / f'{stem}.png'


# The model and what it is fed


def build_inferencer(cfg: Config, args: argparse.Namespace, device: torch.device):
    """MMDetection's or MMSegmentation's inferencer, with weights all of which fit, the data set,
    and whether the checkpoint has names of classes. (The inferencer's own loop keeps all results to
    the end, stops at a bad file and knows no videos.)

    Raises:
        CheckpointError: the file cannot be used; the message is a sentence.
    """
    if cfg.default_scope == 'mmdet':
        from mmdet.apis import DetInferencer as Inferencer
    else:
        from mmseg.apis import MMSegInferencer as Inferencer
    cfg.test_dataloader.dataset = innermost(cfg.test_dataloader.dataset)
    pipeline = cfg.test_dataloader.dataset.pipeline
    pipeline[:] = [step for step in pipeline if 'Annotation' not in kind_of(step)]
    pipeline[0].type = kind_of(pipeline[0])  # in a pure Python config it is a class
    if pipeline[0].type != 'LoadImageFromFile':
        fail(
            f"config '{args.config}': its test pipeline must begin with LoadImageFromFile, found "
            f"'{pipeline[0].type}'."
        )
    let_draw(cfg).vis_backends = None  # pictures are written here
    inferencer = Inferencer(cfg, device=str(device), scope=cfg.default_scope)
    content = read_checkpoint(args.checkpoint)
    try:
        fit_checkpoint(inferencer.model, content, args.checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f'{error} Give the config that it was trained with.') from None
    dataset = DATASETS.build({**cfg.test_dataloader.dataset, 'lazy_init': True})
    meta = names_and_colours(dataset.metainfo, content)
    inferencer.model.dataset_meta = inferencer.visualizer.dataset_meta = meta
    return inferencer, dataset, bool(recorded(content).get('classes'))


def check_names(model: nn.Module, classes: Sequence[str], trained: bool, config: str) -> None:
    """End the program if not all classes of a model have names; warn if its training had no more.

    Args:
        model: the model.
        classes: names of its first classes.
        trained: whether these are of the data that the model was trained on.
        config: the config file.
    """
    head = getattr(model, 'roi_head', model)
    head = getattr(head, 'bbox_head', None) or getattr(head, 'decode_head', None)
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    needed = getattr(head, 'num_classes', 0)
    if trained and len(classes) < needed:
        print(
            f'warning: the model has {needed} classes, but was trained on {len(classes)}, '
            f'{classes[0]} to {classes[-1]}: objects of the others are left out, label maps may '
            'have numbers without a name.',
            file=sys.stderr,
        )
    elif len(classes) < needed:
        fail(
            f"config '{config}': the model has {needed} classes, but the names of "
            f'{len(classes)} are known; name them in test_dataloader.dataset.metainfo.classes.'
        )


def use_bfloat16(model: nn.Module, device: torch.device, detection: bool):
    """What to compute under, and a model prepared for it."""
    autocast = torch.autocast(device.type, torch.bfloat16)
    if not detection:
        return autocast
    extract = model.extract_feat

    def extract_feat(*args, **kwargs) -> Tuple[Tensor, ...]:
        with autocast:
            return tuple(feature.float() for feature in extract(*args, **kwargs))

    model.extract_feat = extract_feat  # mmcv's operators on regions and boxes take no bfloat16
    return nullcontext()


class Pipeline:
    """An inferencer's pipeline in two: only what loading says of an image may be its own fault."""

    def __init__(self, pipeline: Compose, grey: bool):
        self.load, *steps = pipeline.transforms
        self.steps = Compose(steps)
        self.grey = grey  # images are loaded as grey ones

    def load_frame(self, frame: np.ndarray) -> dict:
        """Load a frame of a video, (H, W, 3) BGR, as an image file is loaded."""
        return self.load(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) if self.grey else frame)

    def prepare(self, source: Source, entry: dict, loaded: dict) -> Image:
        """What the model takes; an error names the image and goes on its way."""
        pixels = loaded['img']
        entry.update(height=pixels.shape[0], width=pixels.shape[1])
        try:
            inputs = self.steps({**loaded, 'img_id': entry['id']})
        except Exception:
            print(
                f"'{entry['file_name']}' can be read, but the config's test pipeline could not "
                'prepare it:',
                file=sys.stderr,
            )
            raise
        return Image(source, entry, as_picture(pixels), inputs)


class Ids:
    """Ids of images and of categories: counted from 1, or those of COCO annotations."""

    def __init__(self, ann_file: Optional[str], classes: Sequence[str]):
        self.next, self.images = 1, None
        self.categories = list(range(1, len(classes) + 1))
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
            twice = next(name for name in listed if listed.count(name) > 1)
            fail(f"--ann-file: '{ann_file}' lists the image '{twice}' more than once.")
        unknown = [name for name in classes if name not in by_name]
        if unknown:
            fail(f"--ann-file: '{ann_file}' has no category '{unknown[0]}', which the model has.")
        self.categories = [by_name[name] for name in classes]

    def check(self, sources: Sequence[Source]) -> None:
        """End the program if a file has no id, or that of another one."""
        found: Dict[int, Source] = {}
        for source in sources if self.images is not None else ():
            id_ = self.of(source)
            if source.fps is not None or id_ is None:
                fail(f"--ann-file: it names no image '{source.name}'.")
            if id_ in found:
                fail(f"--ann-file: '{found[id_].name}' and '{source.name}' are one image in it.")
            found[id_] = source

    def of(self, source: Source) -> Optional[int]:
        """The id of an image, by as much of the end of its path as the annotations have."""
        if self.images is None:
            return self.next
        parts = source.path.absolute().parts
        ends = ('/'.join(parts[start:]) for start in range(len(parts)))
        return next((self.images[end] for end in ends if end in self.images), None)

    def leave(self, count: int) -> None:
        """Go on after ``count`` images, whether or not they could be read."""
        self.next += count


class Skipped(List[dict]):
    """Files, or frames, that could not be read or written, with the reasons."""

    def note(self, name: str, reason: str) -> None:
        """Add a file if there is a reason."""
        if reason:
            self.append(dict(file_name=name, reason=reason))


def images_of(
    sources: Sequence[Source],
    pipeline: Pipeline,
    channels: int,
    ids: Ids,
    progress: ProgressBar,
    skipped: Skipped,
) -> Iterator[Image]:
    """Every image of the sources that can be read and has the model's number of channels; the
    others go to ``skipped``."""

    def fits(image: Image) -> bool:
        given = image.inputs['inputs'].shape[0]
        if given != channels:
            skipped.note(
                image.source.name,
                f'it has {given} channels as the test pipeline loads it, and the model takes '
                f'{channels}',
            )
        return given == channels

    for source in sources:
        if source.fps is None:
            try:
                if is_cut_short(source.path.read_bytes()):
                    raise EOFError
                loaded = pipeline.load(str(source.path))
            except OSError as error:
                skipped.note(source.name, f'it could not be opened: {error.strerror or error}')
                progress.update()
            except Exception:  # broken bytes fail in any way in a decoder
                skipped.note(source.name, 'it is cut short or no image that OpenCV reads')
                progress.update()
            else:
                entry = dict(id=ids.of(source), file_name=source.name)
                image = pipeline.prepare(source, entry, loaded)
                if fits(image):
                    yield image
                else:
                    progress.update()
            ids.leave(1)
            continue
        read, fit = 0, True
        for frame in mmcv.VideoReader(str(source.path)):
            entry = dict(id=ids.next + read, file_name=f'{source.name}#{read + 1}', frame=read + 1)
            image = pipeline.prepare(source, entry, pipeline.load_frame(frame))
            fit = fits(image)
            if not fit:
                progress.update(source.frames - read)
                break
            yield image
            read += 1
        # What a video says of its length may be an estimate from its duration.
        if fit and (read < 0.98 * source.frames or not read):
            skipped.note(
                source.name,
                f'its frames from {read + 1} on could not be read'
                if read
                else 'it is no video that OpenCV reads',
            )
            progress.update(source.frames - read)
        ids.leave(max(source.frames, read))


def batches(images: Iterator[Image], size: int) -> Iterator[List[Image]]:
    """Runs of at most ``size`` images that have the same shape when prepared.

    Images of different shapes would be padded to a common one, which changes what a
    detector finds in them; segmentors refuse it.
    """
    batch: List[Image] = []
    for image in images:
        if batch and (
            len(batch) == size or image.inputs['inputs'].shape != batch[0].inputs['inputs'].shape
        ):
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch


# What is written


def mp4_fps(fps: float) -> float:
    """The nearest frame rate that an MP4 file can hold: a fraction of numbers up to 65535, which
    OpenCV makes of up to three decimals; 25 for a rate that no video has."""
    if not 0 < fps < math.inf:
        return 25.0
    fps = min(max(fps, 0.002), 65535.0)
    return next(round(fps * base) / base for base in (1000, 100, 10, 1) if fps * base <= 65535)


class Video:
    """A video that is written frame by frame: under its name is all of it or nothing.

    Args:
        path: of the file.
        fps: frames per second.
        size: width and height of the frames.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, fps: float, size: Tuple[int, int]):
        self.path, self.size = path, size
        path.parent.mkdir(parents=True, exist_ok=True)
        self.part = path.with_name(f'.{os.getpid()}.mp4')
        fourcc = cv2.VideoWriter_fourcc(*'mp4v')
        self.writer = cv2.VideoWriter(str(self.part), fourcc, fps, size)
        if not self.writer.isOpened():
            self.part.unlink(missing_ok=True)
            raise OSError(f'OpenCV writes no MP4 of {size[0]} x {size[1]} pixels at {fps:g} fps')

    def add(self, frame: np.ndarray) -> None:
        # A frame of another size would be left out without a word.
        self.writer.write(
            frame if frame.shape[1::-1] == self.size else cv2.resize(frame, self.size)
        )

    def finish(self, keep: bool) -> None:
        self.writer.release()
        if keep:
            self.part.replace(self.path)
        self.part.unlink(missing_ok=True)


class Pictures:
    """Draws predictions and writes them, images as JPEG and videos as MP4.

    Used as a context: on leaving it, whole videos get their name and others are removed.

    Args:
        draw: an inferencer's ``visualize``, with its options.
        out: folder.
    """

    def __init__(self, draw: Callable, out: Path):
        self.draw, self.out = draw, out
        self.source: Optional[Source] = None  # of the video in the making
        self.video: Optional[Video] = None  # None also if it cannot be written

    def add(self, image: Image, sample) -> str:
        """Draw and write a prediction; the reason if that is not possible, or nothing."""
        if image.source is self.source and self.video is None:
            return ''
        try:
            (rgb,) = self.draw([np.ascontiguousarray(image.pixels[..., ::-1])], [sample])
        except Exception as error:
            return f'its picture could not be drawn: {said(error)}'
        drawn = np.ascontiguousarray(rgb[..., ::-1])
        path = picture_path(self.out, image.source)
        if image.source.fps is None:
            return write_image(path, drawn)
        try:
            if image.source is not self.source:
                self.finish_video()
                self.source = image.source
                self.video = Video(path, mp4_fps(image.source.fps), drawn.shape[1::-1])
            self.video.add(drawn)
        except OSError as error:
            return f"'{path}' could not be written: {said(error)}"
        return ''

    def finish_video(self, keep: bool = True) -> None:
        video, self.video = self.video, None
        if video:
            video.finish(keep)

    def __enter__(self) -> 'Pictures':
        return self

    def __exit__(self, kind, *_) -> None:
        self.finish_video(keep=kind is None)


class Objects:
    """Results of a detector, in COCO's format.

    Args:
        categories: the id of each class.
        as_dict: an inferencer's ``pred2dict``.
    """

    def __init__(self, categories: Sequence[int], as_dict: Callable):
        self.categories, self.as_dict = categories, as_dict
        self.results: Dict[str, List[dict]] = dict(bbox=[])

    def add(self, image: Image, sample) -> str:
        found = self.as_dict(type(sample)(pred_instances=sample.pred_instances))
        labels = [self.categories[label] for label in found['labels']]
        boxes = [
            [left, top, right - left, bottom - top] for left, top, right, bottom in found['bboxes']
        ]
        parts = dict(bbox=('bbox', found['scores'], boxes))
        if 'masks' in found:
            scores = sample.pred_instances.get('mask_scores', np.array(found['scores'])).tolist()
            parts['segm'] = 'segmentation', scores, found['masks']
        for kind, (key, scores, values) in parts.items():
            self.results.setdefault(kind, []).extend(
                {'image_id': image.entry['id'], 'category_id': label, 'score': score, key: value}
                for label, score, value in zip(labels, scores, values)
            )
        return ''

    def write(self, out: Path) -> None:
        for kind, results in self.results.items():
            write_whole(out / f'results.{kind}.json', json.dumps(results).encode())


class LabelMaps:
    """Results of a segmentor: PNGs with the values of the dataset's own label maps.

    Args:
        out: folder.
        first: the value of the first class; 1 in datasets that leave 0 for "other".
    """

    def __init__(self, out: Path, first: int):
        self.out, self.first = out, first

    def add(self, image: Image, sample) -> str:
        """Write a label map; the reason if that is not possible, or nothing."""
        labels = sample.pred_sem_seg.data[0].numpy() + self.first
        stem = image.source.stem
        if image.source.fps is not None:
            stem = f'{stem}/{image.entry["frame"]:06d}'
        path = label_path(self.out, stem)
        reason = write_labels(path, labels)
        if not reason:
            image.entry['label_map'] = path.relative_to(self.out).as_posix()
        return reason

    def write(self, out: Path) -> None:
        """Nothing is left to write."""


def check_options(args: argparse.Namespace, cfg: Config) -> torch.device:
    """End the program with a sentence on the first option that cannot work."""
    detection = cfg.default_scope == 'mmdet'
    if args.batch_size < 1:
        fail(f'--batch-size must be at least 1, got {args.batch_size}.')
    if args.score_thr is not None and not detection:
        fail('--score-thr is of detectors; label maps have no scores.')
    if args.score_thr is not None and not 0 <= args.score_thr <= 1:
        fail(f'--score-thr must be from 0 to 1, got {args.score_thr}.')
    if args.ann_file and not detection:
        fail("--ann-file is of detectors; label maps have no ids.")
    if not cfg.get('test_dataloader'):
        fail(f"config '{args.config}' has no test_dataloader, whose pipeline prepares the images.")
    check_file('checkpoint', args.checkpoint)
    if Path(args.out).exists() and not Path(args.out).is_dir():
        fail(f"--out: '{args.out}' is a file.")
    name = args.device or get_device().replace('mps', 'cpu')  # which MMCV has no operators for
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        fail(f"--device: '{name}' cannot be used: {str(error).splitlines()[0]}")


def main():
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options, DENSE)
    device = check_options(args, cfg)
    detection = cfg.default_scope == 'mmdet'
    out = Path(args.out)
    sources = sources_of(find_files(args.images, out), out)
    # What the libraries remark on losses, palettes and registries is of no use here.
    warnings.filterwarnings('ignore', category=UserWarning, module=r'mm(det|seg|engine|cv)\b')
    MMLogger.get_current_instance().addFilter(
        lambda record: not record.getMessage().startswith('Failed to search registry with scope')
    )

    with sentences_for(ValueError, FileNotFoundError):
        inferencer, dataset, trained = build_inferencer(cfg, args, device)
    model = inferencer.model
    grey = 'grayscale' in cfg.test_dataloader.dataset.pipeline[0].get('color_type', 'color')
    pipeline = Pipeline(inferencer.pipeline, grey)
    classes = model.dataset_meta['classes']
    check_names(model, classes, trained, args.config)
    ids = Ids(args.ann_file, classes)
    ids.check(sources)
    context = use_bfloat16(model, device, detection) if args.bf16 else nullcontext()
    if detection:
        results = Objects(ids.categories, inferencer.pred2dict)
        options = dict(pred_score_thr=0.3 if args.score_thr is None else args.score_thr)
    else:
        first = int(bool(getattr(dataset, 'reduce_zero_label', False)))
        ids.categories = list(range(first, first + len(classes)))
        results = LabelMaps(out, first)
        options = dict(opacity=0.5)
    draw = functools.partial(inferencer.visualize, return_vis=True, **options)

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out: folder '{out}' could not be made: {error.strerror}.")
    for written in ('images.json', 'results.bbox.json', 'results.segm.json'):
        (out / written).unlink(missing_ok=True)  # of an earlier run: from now on not the truth
    skipped = Skipped()
    entries: List[dict] = []

    def write_results() -> None:
        print()
        results.write(out)
        categories = [dict(id=id_, name=name) for id_, name in zip(ids.categories, classes)]
        listed = dict(images=entries, categories=categories, skipped=skipped)
        write_whole(out / 'images.json', json.dumps(listed, indent=1).encode())

    progress = ProgressBar(sum(source.frames for source in sources))
    try:
        with Pictures(draw, out) as pictures:
            images = images_of(sources, pipeline, input_channels(model), ids, progress, skipped)
            for batch in batches(images, args.batch_size):
                try:
                    with context:
                        samples = inferencer.forward(
                            inferencer.collate_fn([image.inputs for image in batch])
                        )
                except OutOfMemoryError:
                    raise UserError(
                        f"--batch-size: {len(batch)} images like '{batch[0].entry['file_name']}' "
                        f'do not fit into the memory of {device}.'
                    ) from None
                for image, sample in zip(batch, samples):
                    sample = sample.cpu()
                    drop_unnamed(sample, len(classes))
                    reason = results.add(image, sample)
                    if not reason:
                        entries.append(image.entry)
                        reason = pictures.add(image, sample)
                    skipped.note(image.entry['file_name'], reason)
                    progress.update()
    except Exception:
        write_results()  # what was predicted before is kept
        raise
    write_results()
    print(f"{len(entries)} images predicted, see '{out}'; {len(skipped)} files skipped")
    for one in skipped:
        print(f"error: '{one['file_name']}' was skipped: {one['reason']}.", file=sys.stderr)
    sys.exit(1 if skipped else 0)


if __name__ == '__main__':
    run(main)
