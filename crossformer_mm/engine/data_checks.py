"""Checks of data sets; each error names the file in one line."""

import logging
import os
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional, Tuple

import cv2
import mmcv
import numpy as np
import PIL.Image
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner.base_loop import BaseLoop

from ..compat import is_cut_short
from ..errors import ConfigError, DataError, frames_of, said
from .class_names import drop_unnamed
from .coco_checks import check_coco_metric
from .randomness import restart_workers

EMPTY = (
    '{} leaves no image to use: there is none, or filter_cfg drops all, for they are small or '
    'have no objects of the classes.'
)
OWN = ('mmcv', 'mmseg', 'mmdet', 'mmengine')  # packages whose transforms are known
AFTER_REDUCING = ' (1 was taken from each, as reduce_zero_label says)'
MOST_CHECKED_BEFORE_A_RUN = 200  # images or label maps, evenly spaced, of one data set
EXIF_ORIENTATION = 0x0112
MOST_IN_A_ROW = 20  # bad images, after which the fault must lie elsewhere
# What OpenCV reads; of files with other names nothing is said but that they cannot be opened.
IMAGES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')
# Before, it fills with grey what a JPEG that is cut short does not have, and says nothing.
SAYS_WHAT_IS_CUT_SHORT = tuple(map(int, cv2.__version__.split('.')[:2])) >= (4, 12)


@HOOKS.register_module()
class CheckDataHook(Hook):
    """Validate data sets of OpenMMLab, or derived from these, in wrappers or not.

    Before a run: each data set has images, every file that it names exists, folders of classes have
    images, the model has enough classes, and metrics can use their annotation files. Some images
    and label maps are checked for EXIF orientations, sizes and classes without a pixel. When an
    image is loaded: its files can be read, its size is that of the annotation file and its label
    map has only labels that are classes. An error of another kind is logged with the image's name
    and raised.

    Args:
        skip_to (str, optional): take another image in place of one of the training whose files
            cannot be used, and add a line to this file. None: no image is skipped.

    Raises:
        DataError: what was found in the data.
        ConfigError: the model has too few classes.
    """

    def __init__(self, skip_to: Optional[str] = None):
        self.skip_to = skip_to

    def before_run(self, runner) -> None:
        warnings = []
        for mode in ('train', 'val', 'test'):
            loop = getattr(runner, f'_{mode}_loop', None)
            if isinstance(loop, BaseLoop) and hasattr(loop, 'dataloader'):
                skip_to = self.skip_to if mode == 'train' else None
                for dataset in leaves(loop.dataloader.dataset):
                    check_files(dataset, skip_to)
                    check_orientations(dataset, skip_to)
                    check_label_maps(dataset, skip_to)
                    guard(dataset, skip_to)
                restart_workers(loop)
                warnings.append(check_number_of_classes(runner, mode))
                if hasattr(loop, 'evaluator'):
                    check_metrics(runner, mode, loop)
                    if warnings[-1]:
                        evaluate_named(loop)
        for warning in dict.fromkeys(filter(None, warnings)):
            runner.logger.warning(warning)

    def after_train_epoch(self, runner) -> None:
        if self.skip_to and Path(self.skip_to).exists():
            count = len(Path(self.skip_to).read_text(encoding='utf-8').splitlines())
            runner.logger.warning(f"{count} images were skipped, see '{self.skip_to}'.")


# Which data sets, and what of them


def leaves(dataset) -> Iterator:
    """The data sets inside wrappers that prepare images as MMEngine's do."""
    inside = vars(dataset) if hasattr(dataset, '__dict__') else {}
    inner = [inside[name] for name in ('_dataset', 'dataset') if name in inside]
    inner += list(inside.get('datasets') or ())
    for one in inner:
        yield from leaves(one)
    if not inner and hasattr(type(dataset), 'prepare_data') and hasattr(dataset, 'get_data_info'):
        yield dataset


def source_of(dataset) -> str:
    """Where a data set's list of images is, for sentences."""
    if getattr(dataset, 'ann_file', None):
        return f"annotation file '{dataset.ann_file}'"
    prefix = getattr(dataset, 'data_prefix', None) or {}
    prefix = prefix if isinstance(prefix, dict) else dict(img_path=prefix)
    return f"image folder '{prefix.get('img_path') or prefix.get('img') or ''}'"


def backend_of(dataset) -> Optional[dict]:
    """How the files of a data set are reached; None: they are files of this machine."""
    for part in (dataset, *steps_of(dataset)):
        if getattr(part, 'backend_args', None):
            return part.backend_args
    return None


def files_of(dataset, info: dict) -> Dict[str, str]:
    """The files of one image that a data set loads, by what they are.

    Args:
        dataset (BaseDataset): the data set.
        info (dict): what it knows of the image.
    """
    files = {'Image': info.get('img_path')}
    # MMDetection names a label map for images whose pipeline loads none.
    if any(getattr(step, 'with_seg', False) for step in steps_of(dataset)):
        files['Label map'] = info.get('seg_map_path')
    return {what: str(path) for what, path in files.items() if path}


def steps_of(part) -> Iterator:
    """Yield the transforms of a data set's pipeline, those inside of wrappers included."""
    part = getattr(part, 'pipeline', part)
    part = getattr(part, 'subroutines', None) or getattr(part, 'transforms', part)
    for step in part if isinstance(part, (list, tuple)) else ():
        if callable(step):
            yield step
            yield from steps_of(step)


# Before a run


def check_files(dataset, skip_to: Optional[str] = None) -> None:
    """See that a data set has images, that all files are there, and that labels are classes.

    Files that a backend reaches are left to it.

    Raises:
        DataError: what was found.
    """
    source = source_of(dataset)
    with explained_data():
        dataset.full_init()
    if not len(dataset):
        raise DataError(EMPTY.format(source))
    classes = dataset.metainfo.get('classes')
    folders: Dict[str, set] = {}
    missing: List[str] = []
    seen, local = set(), backend_of(dataset) is None
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        label = info.get('gt_label')
        if isinstance(label, int) and label not in seen:
            seen.add(label)
            if classes and label not in range(len(classes)):
                raise DataError(
                    f"Image '{info['img_path']}' has label {label} in {source}, "
                    f'allowed are 0 to {len(classes) - 1}, the classes.'
                )
        for path in files_of(dataset, info).values() if local else ():
            folder, name = os.path.split(path)
            if '://' in path:
                continue
            if folder not in folders:
                folders[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
            if name not in folders[folder]:
                missing.append(path)
    if missing:
        more = f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''
        sentence = f"File '{missing[0]}'{more}, which {source} names, does not exist"
        if skip_to is None:
            raise DataError(f'{sentence}.')
        print_log(f'{sentence}, and is skipped.', 'current', logging.WARNING)
    for folder, label in (getattr(dataset, 'folder_to_idx', None) or {}).items():
        if label not in seen:
            raise DataError(f"Class folder '{folder}' of {source} has no image.")


@contextmanager
def explained_data() -> Iterator[None]:
    """Name the data set in an error that building it ends in.

    Raises:
        DataError: the sentence, caused by the error. An error that came of no data set is left.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # whatever there is in a file
        owners = [
            frame.f_locals.get('self')
            for frame in frames_of(error)
            if frame.f_code.co_name in ('full_init', 'load_data_list')
        ]
        if not owners:
            raise
        source = source_of(owners[-1])
        if 'at least one array' in str(error):  # mmengine packs an empty list of images
            raise DataError(EMPTY.format(source)) from error
        raise DataError(f'{source} could not be used: {said(error)}.') from error


def check_number_of_classes(runner, mode: str) -> Optional[str]:
    """Compare the numbers of classes of heads and of a data set.

    MMDetection decides which heads of a detector must have as many. More outputs than classes are
    allowed: a training may be on a part of the classes.

    Returns:
        str: a warning, if heads have more outputs than the data set has classes; or None.

    Raises:
        ConfigError: a head has too few.
    """
    dataset = getattr(runner, f'{mode}_dataloader').dataset
    meta = getattr(dataset, 'metainfo', {})
    classes = meta.get('classes')
    if not classes or isinstance(classes, str) or 'thing_classes' in meta:
        return None  # heads of a panoptic model share the classes
    heads = [
        (name, module)
        for name, module in runner.model.named_modules()
        if isinstance(getattr(module, 'num_classes', None), int)
        and module.num_classes != len(classes)
    ]
    scope = getattr(runner.default_scope, 'scope_name', None)

    def is_large(head) -> bool:
        return head[1].num_classes > len(classes)

    def is_called(head, kind: str) -> bool:
        return head[0].rstrip('.0123456789').endswith(kind)

    if scope == 'mmseg':  # auxiliary heads may have fewer outputs, such as borders
        heads = [
            head
            for head in heads
            if is_called(head, 'decode_head')
            or is_called(head, 'auxiliary_head')
            and is_large(head)
        ]
    elif heads and type(runner.model).__module__.startswith('mmdet') or scope == 'mmdet':
        heads = [head for head in heads if not passes_in_mmdet(runner, head, dataset)]
    else:  # MMPretrain's data sets may have names of classes without an image
        heads = [head for head in heads if is_called(head, 'head') and is_large(head)]
    numbers = [f'model.{name}.num_classes = {module.num_classes}' for name, module in heads]
    for head, number in zip(heads, numbers):
        if not is_large(head):
            raise ConfigError(
                f'{number} is too small for the {len(classes)} classes of the data set, '
                f'{classes[0]} to {classes[-1]}.'
            )
    if not numbers or any(
        name.endswith('language_model') for name, _ in runner.model.named_modules()
    ):
        return None  # text-conditioned models score words, not classes
    return (
        f'{", ".join(numbers)}: more than the {len(classes)} classes of the data set, {classes[0]} '
        f'to {classes[-1]}. The other outputs have no training data and no names: set num_classes '
        'to the number of your classes.'
    )


def passes_in_mmdet(runner, part: Tuple[str, Any], dataset) -> bool:
    """Whether MMDetection's own hook lets a module have another number of classes."""
    hook = HOOKS.get('mmdet.NumClassCheckHook')()
    try:
        hook.before_val_epoch(
            SimpleNamespace(
                model=SimpleNamespace(named_modules=lambda: [part]),
                logger=runner.logger,
                val_dataloader=SimpleNamespace(dataset=dataset),
            )
        )
    except AssertionError:
        return False
    return True


def check_metrics(runner, mode: str, loop) -> None:
    """Check the annotation files of metrics.

    Raises:
        DataError: a metric cannot use its file.
    """
    try:
        from mmdet.evaluation import CocoMetric
    except ImportError:
        return
    classes = getattr(loop.dataloader.dataset, 'metainfo', {}).get('classes')
    classes = list(classes) if classes and not isinstance(classes, str) else None
    given = runner.cfg.get(f'{mode}_evaluator')
    given = given if isinstance(given, (list, tuple)) else [given]
    for number, metric in enumerate(loop.evaluator.metrics):
        if isinstance(metric, CocoMetric) and metric._coco_api is not None:
            named = given[number] if number < len(given) else None
            named = named.get('ann_file') if isinstance(named, dict) else None
            image_ids = [
                dataset.get_data_info(index)['img_id']
                for dataset in leaves(loop.dataloader.dataset)
                for index in range(len(dataset))
            ]
            source = f"annotation file '{named or ''}' of {mode}_evaluator"
            check_coco_metric(metric, source, image_ids, classes)


def evaluate_named(loop) -> None:
    """Keep detections of outputs beyond the data set's classes from metrics, which have no name or
    category for them."""
    if 'process' not in vars(loop.evaluator):
        count = len(loop.dataloader.dataset.metainfo['classes'])
        loop.evaluator.process = partial(process_named, loop.evaluator.process, count)


def process_named(process, count: int, data_samples, data_batch=None) -> None:
    """Give an evaluator the detections of the first ``count`` classes."""
    for sample in data_samples:
        drop_unnamed(sample, count)
    process(data_samples=data_samples, data_batch=data_batch)


def spaced(dataset) -> List[int]:
    """Indices of at most MOST_CHECKED_BEFORE_A_RUN images of a data set, evenly spaced."""
    count = min(len(dataset), MOST_CHECKED_BEFORE_A_RUN)
    return [len(dataset) * number // count for number in range(count)]


def check_orientations(dataset, skip_to: Optional[str] = None) -> None:
    """Compare sizes and EXIF orientations of some images with their annotations.

    Raises:
        DataError: the annotations are of the image as it is stored, and not as it is loaded.
    """
    if skip_to is not None:
        return  # each image is checked when it is loaded
    unclear = []
    indices = spaced(dataset)
    for index in indices:
        info = dataset.get_data_info(index)
        problem, is_unclear = orientation_problem(dataset, info)
        if problem:
            raise problem
        if is_unclear:
            unclear.append(info['img_path'])
    if unclear:
        print_log(
            f'{len(unclear)} of the {len(indices)} images checked in {source_of(dataset)}, such as '
            f"'{unclear[0]}', have an EXIF orientation, which is applied when they are loaded: "
            'annotations must be of the turned image. To load images as stored, give '
            "LoadImageFromFile color_type='color_ignore_orientation'.",
            'current',
            logging.WARNING,
        )


def orientation_problem(dataset, info: dict) -> Tuple[Optional[DataError], bool]:
    """Compare an image's size, as it is loaded, with what is known of it.

    Returns:
        (DataError, bool): the fault, if there is one; and whether the image has an EXIF orientation
        of which sizes do not tell if annotations follow it.
    """
    files = files_of(dataset, info)
    load: Any = next(steps_of(dataset), None)
    known = info.get('height') is not None and info.get('width') is not None
    if not ('Label map' in files or known) or type(load).__name__ != 'LoadImageFromFile':
        return None, False
    if backend_of(dataset) is not None:
        return None, False
    try:
        with PIL.Image.open(files['Image']) as image:
            width, height = image.size
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
        expected = (info.get('width'), info.get('height'))
        if 'Label map' in files and orientation != 1:
            with PIL.Image.open(files['Label map']) as image:
                expected = image.size
    except Exception:  # Pillow reads fewer formats than OpenCV; loading names broken files
        return None, False
    applied = orientation != 1 and load.color_type in ('color', 'grayscale')
    loaded = (height, width) if applied and orientation > 4 else (width, height)
    if known and loaded != expected or applied and (width, height) == expected != loaded:
        what = source_of(dataset) if known else f"label map '{files['Label map']}'"
        note = ' (it has no EXIF orientation)'
        if applied:
            note = (
                f' after its EXIF orientation, {orientation}, is applied (color_type='
                "'color_ignore_orientation' of LoadImageFromFile loads it as stored)"
            )
        elif orientation != 1:
            note = f" without its EXIF orientation, {orientation} (color_type='{load.color_type}')"
        return size_error(files['Image'], loaded, what, expected, note), False
    return None, applied and loaded == (width, height)


def size_error(path: str, loaded, what: str, expected, note: str) -> DataError:
    """Error for an image whose size, (width, height), differs from that of its annotations."""
    return DataError(
        f"Image '{path}' is {loaded[0]} x {loaded[1]} pixels wide and high{note}, but "
        f'{expected[0]} x {expected[1]} in {what}.'
    )


def check_label_maps(dataset, skip_to: Optional[str] = None) -> None:
    """Load some label maps of a segmentation data set and check their labels.

    A warning names classes without a pixel. Pipelines with transforms of the user's own, which may
    change labels, are left alone.

    Raises:
        DataError: a label map has several channels, or labels that are no class.
    """
    classes = dataset.metainfo.get('classes')
    if not classes or not hasattr(dataset, 'reduce_zero_label'):
        return
    steps = list(steps_of(dataset))
    load = next((step for step in steps if getattr(step, 'with_seg', False)), None)
    if load is None:
        return
    check_reduce_zero_label(load, dataset)
    if any(type(step).__module__.partition('.')[0] not in OWN for step in steps):
        return
    found: set = set()
    for count, index in enumerate(spaced(dataset), start=1):
        info = dataset.get_data_info(index)
        try:
            labels = load(info)['gt_seg_map']
        except Exception:  # is named when the training comes to it
            continue
        problem = label_problem(dataset, info['seg_map_path'], labels)
        if problem and skip_to is None:
            raise problem
        if problem:
            continue
        found.update(np.unique(labels).tolist())
        if count >= 20 and found.issuperset(range(len(classes))):
            return
    absent = [number for number in range(len(classes)) if number not in found]
    if absent and found:
        names = ', '.join(f"'{classes[number]}' (label {number})" for number in absent[:5])
        more = f' and {len(absent) - 5} more' if len(absent) > 5 else ''
        ignored = dataset.ignore_index
        binary = ' Masks of 2 classes have labels 0 and 1, not 0 and 255.'
        print_log(
            f'{len(absent)} of {len(classes)} classes have no pixel in the {count} label maps '
            f'checked in {source_of(dataset)}: {names}{more}. Labels found'
            f'{AFTER_REDUCING if dataset.reduce_zero_label else ""}: '
            f'{", ".join(map(str, sorted(found)))}; {ignored} is ignored.'
            f'{binary if len(classes) == 2 and 255 in found else ""}',
            'current',
            logging.WARNING,
        )


def check_reduce_zero_label(load, dataset) -> None:
    """Check that a pipeline and its data set agree on ``reduce_zero_label``.

    Raises:
        ConfigError: they do not.
    """
    reduced = getattr(load, 'reduce_zero_label', None)
    if reduced not in (None, dataset.reduce_zero_label):
        raise ConfigError(
            f'LoadAnnotations in the pipeline of {source_of(dataset)} has reduce_zero_label='
            f'{reduced}, the data set has {dataset.reduce_zero_label}: set it in the data set only.'
        )


def label_problem(dataset, path: str, labels: np.ndarray) -> Optional[DataError]:
    """Fault of the labels of a label map, or None."""
    channels = labels.shape[-1] if labels.ndim == 3 and labels.shape[0] != 1 else 1
    if channels != 1:
        return DataError(
            f"Label map '{path}' has {channels} channels; one channel of class numbers is needed."
        )
    last, ignored = len(dataset.metainfo['classes']) - 1, getattr(dataset, 'ignore_index', 255)
    wrong = labels[(labels > last) & (labels != ignored)]
    if not len(wrong):
        return None
    reduced = AFTER_REDUCING if dataset.reduce_zero_label else ''
    return DataError(
        f"Label map '{path}' has label {int(wrong[0])}{reduced}, allowed are 0 to {last}, the "
        f'classes, and {ignored}, which is ignored.'
    )


# When an image is loaded


def guard(dataset, skip_to: Optional[str] = None) -> None:
    """Let a data set say which of its files cannot be used; it stays the object that it was."""
    dataset.prepare_data = Guard(dataset, skip_to)


class Guard:
    """``prepare_data`` of a data set, which says what is wrong with an image's files.

    Args:
        dataset (BaseDataset): whose images are prepared.
        skip_to (str, optional): where to list images that are skipped; None: none is skipped.
    """

    def __init__(self, dataset, skip_to: Optional[str] = None):
        self.dataset, self.skip_to, self.in_a_row = dataset, skip_to, 0

    def __call__(self, index: int):
        """What the pipeline makes of an image; None lets MMEngine take another.

        Raises:
            DataError: the image's files cannot be used.
        """
        try:
            if not SAYS_WHAT_IS_CUT_SHORT:
                self.check_whole(index)
            item = type(self.dataset).prepare_data(self.dataset, index)
            if isinstance(item, dict):
                info = self.dataset.get_data_info(index)
                self.check_size(item, info)
                self.check_labels(item, info)
            if item is not None:
                self.in_a_row = 0
            return item
        except DataError as error:
            problem = error
        except Exception as error:
            found = self.problem(index)
            if found is None:
                files = files_of(self.dataset, self.dataset.get_data_info(index)).values()
                names = ' and '.join(map(repr, files))
                print_log(
                    f'{names} can be read, but preparing it ended in {said(error)}: a '
                    "transform or the image's annotation is at fault.",
                    'current',
                    logging.ERROR,
                )
                raise
            if self.skip_to is None:
                raise found from error
            problem = found
        if self.skip_to is None or self.dataset.test_mode:
            raise problem
        self.in_a_row += 1
        if self.in_a_row == MOST_IN_A_ROW:
            raise DataError(
                f'{MOST_IN_A_ROW} images in a row could not be used, the last of them: {problem}'
            )
        self.skip(problem)
        return None

    def check_whole(self, index: int) -> None:
        """See that no JPEG of an image is cut short."""
        for what, path in files_of(self.dataset, self.dataset.get_data_info(index)).items():
            with suppress(OSError):  # of which the data set itself says more
                if is_cut_short(get(path, backend_args=backend_of(self.dataset))):
                    raise DataError(f"{what} '{path}' is cut short or no image.")

    def check_size(self, item: dict, info: dict) -> None:
        """Check that an image has the size that the annotation file gives, and its label map.

        Raises:
            DataError: it does not.
        """
        sample: Any = item.get('data_samples')
        sample = sample[0] if isinstance(sample, list) else sample
        shape: Any = getattr(sample, 'ori_shape', item.get('ori_shape'))
        expected = (info.get('height'), info.get('width'))
        differs = shape and None not in expected and tuple(shape[:2]) != expected
        if differs or 'Label map' in files_of(self.dataset, info):
            problem, _ = orientation_problem(self.dataset, info)
            if differs and problem is None:
                problem = size_error(
                    info['img_path'],
                    shape[1::-1],
                    source_of(self.dataset),
                    expected[::-1],
                    ' (an EXIF orientation may have turned it)',
                )
            if problem:
                raise problem

    def check_labels(self, item: dict, info: dict) -> None:
        """Check that a label map has only labels that are classes, and the size of its image.

        Raises:
            DataError: it does not.
        """
        sample: Any = item.get('data_samples')
        sample = sample[0] if isinstance(sample, list) else sample
        truth = getattr(sample, 'gt_sem_seg', None)
        if truth is not None:
            labels = truth.data.numpy()
            # Cropped with its image, or read for the metrics at its first size.
            inputs = item['inputs'][0] if isinstance(item['inputs'], list) else item['inputs']
            sizes = (tuple(inputs.shape[-2:]), tuple(sample.ori_shape))
        elif isinstance(item.get('gt_seg_map'), np.ndarray):  # what a wrapper goes on with
            labels = item['gt_seg_map']
            sizes = (tuple(item['img'].shape[:2]), tuple(item.get('ori_shape', ())))
        else:
            return
        if not self.dataset.metainfo.get('classes'):
            return
        if not hasattr(self.dataset, 'reduce_zero_label'):
            return  # no segmentor's: numbers of things of a panoptic one mean something else
        path = info['seg_map_path']
        problem = label_problem(self.dataset, path, labels)
        if problem is None and tuple(labels.shape[-2:]) not in sizes:
            problem = DataError(f"Label map '{path}' is of another size than its image.")
        if problem:
            raise problem

    def problem(self, index: int) -> Optional[DataError]:
        """What is wrong with the files of an image that could not be prepared; None: nothing."""
        for what, path in files_of(self.dataset, self.dataset.get_data_info(index)).items():
            try:
                content = get(path, backend_args=backend_of(self.dataset))
            except OSError as fault:
                return DataError(f"{what} '{path}' could not be opened: {fault.strerror or fault}.")
            if not path.lower().endswith(IMAGES):
                continue
            try:
                pixels = mmcv.imfrombytes(content, flag='unchanged')
            except Exception as fault:  # of the decoder
                return DataError(f"{what} '{path}' is cut short or no image: {said(fault)}.")
            if pixels is None:
                return DataError(f"{what} '{path}' is cut short or no image.")
            if what == 'Label map' and 1 in pixels.shape[:2]:
                return DataError(
                    f"{what} '{path}' has {pixels.shape[0]} x {pixels.shape[1]} "
                    'pixels, MMSegmentation needs 2 or more on each side.'
                )
        problem, _ = orientation_problem(self.dataset, self.dataset.get_data_info(index))
        return problem

    def skip(self, problem: DataError) -> None:
        assert self.skip_to is not None
        list_skipped(self.skip_to, problem)


def list_skipped(file: str, problem: DataError) -> None:
    """Add a fault to the list of skipped images, once."""
    line = f'{problem}\n'
    path = Path(file)
    if path.exists() and line in path.read_text(encoding='utf-8').splitlines(keepends=True):
        return
    with path.open('a', encoding='utf-8') as list_of_skipped:  # one write: workers share the file
        list_of_skipped.write(line)
    print_log(f'Skipped: {problem}', 'current', logging.WARNING)
