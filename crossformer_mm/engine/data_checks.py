"""Data sets that say what is wrong with their files, in one sentence that names the file."""

import logging
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import cv2
import mmcv
import numpy as np
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner.base_loop import BaseLoop

from ..compat import is_cut_short
from .errors import ConfigError, DataError, frames_of, said
from .randomness import restart_workers

EMPTY = (
    '{} leaves no image to use: there is none, or filter_cfg drops all, for they are small or '
    'have no objects of the classes.'
)
MOST_IN_A_ROW = 20  # bad images, after which the fault must lie elsewhere
# What OpenCV reads; of files with other names nothing is said but that they cannot be opened.
IMAGES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')
# Before, it fills with grey what a JPEG that is cut short does not have, and says nothing.
SAYS_WHAT_IS_CUT_SHORT = tuple(map(int, cv2.__version__.split('.')[:2])) >= (4, 12)


@HOOKS.register_module()
class CheckDataHook(Hook):
    """Do not trust the files of data sets, of OpenMMLab's or derived from them, in wrappers or not.

    Before a run: each data set has images, every file that it names exists, folders of classes have
    images, and the model has as many classes. When an image is loaded: its files can be read and a
    label map has no label that is no class. An error of another kind is logged with the image's
    name and goes on its way.

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
        for mode in ('train', 'val', 'test'):
            loop = getattr(runner, f'_{mode}_loop', None)
            if isinstance(loop, BaseLoop) and hasattr(loop, 'dataloader'):
                skip_to = self.skip_to if mode == 'train' else None
                for dataset in leaves(loop.dataloader.dataset):
                    check_files(dataset, skip_to)
                    guard(dataset, skip_to)
                restart_workers(loop)
                check_number_of_classes(runner, mode)

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


def steps_of(dataset) -> Sequence:
    """The transforms of a data set's pipeline."""
    return getattr(getattr(dataset, 'pipeline', None), 'transforms', ())


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


def check_number_of_classes(runner, mode: str) -> None:
    """See that heads can tell the classes of a data set apart.

    Which of a detector's must, MMDetection knows. More classes than there are is no mistake: models
    of words, and trainings on a part of the classes.
    """
    dataset = getattr(runner, f'{mode}_dataloader').dataset
    classes = getattr(dataset, 'metainfo', {}).get('classes')
    if not classes or isinstance(classes, str):
        return
    small = [
        (name, module)
        for name, module in runner.model.named_modules()
        if isinstance(getattr(module, 'num_classes', None), int)
        and module.num_classes < len(classes)
    ]
    scope = getattr(runner.default_scope, 'scope_name', None)
    if scope == 'mmseg':  # auxiliary heads may tell something else apart, as borders
        small = [
            (name, module)
            for name, module in small
            if name.rstrip('.0123456789').endswith('decode_head')
        ]
    elif small and type(runner.model).__module__.startswith('mmdet') or scope == 'mmdet':
        small = [part for part in small if not passes_in_mmdet(runner, part, dataset)]
    else:
        small = []
    if small:
        name, module = small[0]
        raise ConfigError(
            f'model.{name}.num_classes = {module.num_classes} is too small for the '
            f'{len(classes)} classes of the data set, {classes[0]} to {classes[-1]}.'
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


@contextmanager
def categories_checked() -> Iterator[None]:
    """See that what MMDetection reads meanwhile numbers categories as the classes are."""
    try:
        from mmdet.datasets import CocoDataset
    except ImportError:
        yield
        return
    load = CocoDataset.load_data_list

    def load_and_check(dataset) -> List[dict]:
        read = {}

        def api(path):
            coco = type(dataset).COCOAPI(path)
            read.update(coco.cats)
            return coco

        dataset.COCOAPI = api
        try:
            data = load(dataset)
        finally:
            del dataset.COCOAPI
        classes = dataset.metainfo.get('classes')
        if read and classes:
            check_categories(source_of(dataset), read, dataset.cat_ids, list(classes))
        return data

    CocoDataset.load_data_list = load_and_check
    try:
        yield
    finally:
        CocoDataset.load_data_list = load


def check_categories(source: str, categories: dict, used: list, classes: list) -> None:
    """See that MMDetection numbers categories as the classes are: it goes by their order in the
    file, and leaves out a class that the file does not have."""
    there = [category['name'] for category in categories.values()]
    absent = [name for name in classes if name not in there]
    if absent:
        raise DataError(
            f"Class '{absent[0]}' of the config's metainfo.classes is no category of "
            f"{source}, which has {', '.join(map(repr, there))}."
        )
    order = [categories[number]['name'] for number in used]
    if order != classes:
        raise DataError(
            f"The config's metainfo.classes are in another order than in {source}, by "
            f"which labels are numbered: give them as {', '.join(map(repr, order))}."
        )
    left = [name for name in there if name not in classes]
    if left:
        print_log(
            f"Objects of {', '.join(map(repr, left))} in {source} are left out, for the "
            "config's metainfo.classes do not name them.",
            'current',
            logging.WARNING,
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
            if item is not None:
                self.check_labels(item, index)
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

    def check_labels(self, item: dict, index: int) -> None:
        """See that a label map has no label but the classes and the ignored one."""
        if not isinstance(item, dict):
            return
        classes = self.dataset.metainfo.get('classes')
        truth = getattr(item.get('data_samples'), 'gt_sem_seg', None)
        if truth is not None:
            labels = truth.data.numpy()
            # Cropped with its image, or read for the metrics at its first size.
            sizes = (
                tuple(getattr(item['inputs'], 'shape', ())[-2:]),
                tuple(item['data_samples'].ori_shape),
            )
        elif isinstance(item.get('gt_seg_map'), np.ndarray):  # what a wrapper goes on with
            labels = item['gt_seg_map']
            sizes = (tuple(item['img'].shape[:2]), tuple(item.get('ori_shape', ())))
        else:
            return
        if not classes or not hasattr(self.dataset, 'reduce_zero_label'):
            return  # no segmentor's: numbers of things of a panoptic one mean something else

        def path() -> str:
            return self.dataset.get_data_info(index)['seg_map_path']

        ignored = getattr(self.dataset, 'ignore_index', 255)
        if tuple(labels.shape[-2:]) not in sizes:
            raise DataError(f"Label map '{path()}' is of another size than its image.")
        wrong = labels[(labels >= len(classes)) & (labels != ignored)]
        if len(wrong):
            reduced = (
                ' (1 was taken from each, as reduce_zero_label says)'
                if (self.dataset.reduce_zero_label)
                else ''
            )
            raise DataError(
                f"Label map '{path()}' has label {int(wrong[0])}{reduced}, allowed "
                f'are 0 to {len(classes) - 1}, the classes, and {ignored}, which is ignored.'
            )

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
        return None

    def skip(self, problem: DataError) -> None:
        assert self.skip_to is not None
        line = f'{problem}\n'
        path = Path(self.skip_to)
        if path.exists() and line in path.read_text(encoding='utf-8').splitlines(keepends=True):
            return
        with path.open('a', encoding='utf-8') as file:  # one write: workers share the file
            file.write(line)
        print_log(f'Skipped: {problem}', 'current', logging.WARNING)
