"""Validate data sets: before a run, and each image when it is loaded."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

import cv2
import mmcv
import numpy as np
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS

from ..errors import DataError, said
from ..openmmlab import warn
from ..without_torch.files import IMAGES, is_cut_short
from .coco_checks import check_metrics
from .dataset_access import backend_of, files_of, leaves, source_of
from .dataset_checks import (
    check_files,
    check_label_maps,
    check_orientations,
    label_problem,
    orientation_problem,
    size_error,
)
from .num_classes import check_number_of_classes, evaluate_only_named
from .randomness import restart_workers
from .runner_access import built_loop

MAX_SKIPPED_IN_A_ROW = 20  # bad images, after which the fault must lie elsewhere
# Before 4.12 it silently fills the missing part of a truncated JPEG with grey.
OPENCV_DETECTS_TRUNCATION = tuple(map(int, cv2.__version__.split('.')[:2])) >= (4, 12)


@HOOKS.register_module()
class CheckDataHook(Hook):
    """Validate data sets of OpenMMLab, or derived from these, in wrappers or not.

    Before a run it checks that each data set has images, that every listed file exists, that
    folders of classes have images, that the model has enough classes and that metrics can use their
    annotation files. Some images and label maps are checked for EXIF orientations, sizes and
    classes without a pixel. When an image is loaded it checks that its files can be read, that its
    size is that of the annotation file and that its label map has only labels that are classes. An
    error of another kind is logged with the image's name and raised.

    Args:
        skip_to (str, optional): replace training images whose files cannot be used by others, and
            add a line for each to this file. None: such an image is an error.

    Raises:
        DataError: data cannot be used.
        ConfigError: the model has too few classes.
    """

    def __init__(self, skip_to: Optional[str] = None):
        self.skip_to = skip_to

    def before_run(self, runner) -> None:
        warnings = []
        for mode in ('train', 'val', 'test'):
            loop: Any = built_loop(runner, mode)
            if hasattr(loop, 'dataloader'):
                skip_to = self.skip_to if mode == 'train' else None
                for dataset in leaves(loop.dataloader.dataset):
                    check_files(dataset, skip_to)
                    check_orientations(dataset, skip_to)
                    check_label_maps(dataset, skip_to)
                    # Transforms do not know the data set, and wrappers call no other method.
                    dataset.prepare_data = Guard(dataset, skip_to)
                restart_workers(loop)
                warnings.append(check_number_of_classes(runner, mode))
                if hasattr(loop, 'evaluator'):
                    check_metrics(runner, mode, loop)
                    if warnings[-1]:
                        evaluate_only_named(loop)
        for warning in dict.fromkeys(filter(None, warnings)):
            runner.logger.warning(warning)

    def after_train_epoch(self, runner) -> None:
        if self.skip_to and Path(self.skip_to).exists():
            count = len(Path(self.skip_to).read_text(encoding='utf-8').splitlines())
            runner.logger.warning(f"{count} images were skipped, see '{self.skip_to}'.")


class Guard:
    """Replacement of a data set's ``prepare_data`` that names the file if an image cannot be used.
    ``skip_to`` is that of :class:`CheckDataHook`."""

    def __init__(self, dataset, skip_to: Optional[str]):
        self.dataset, self.skip_to, self.in_a_row = dataset, skip_to, 0

    def __call__(self, index: int):
        """Load an image and apply the pipeline; None makes MMEngine take another image.

        Raises:
            DataError: the image's files cannot be used.
        """
        try:
            if not OPENCV_DETECTS_TRUNCATION:
                self.check_truncation(index)
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
                names = ' and '.join(map(repr, files)) or f'The files of item {index}'
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
        if self.in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise DataError(
                f'{MAX_SKIPPED_IN_A_ROW} images in a row could not be used, the last of them: '
                f'{problem}'
            )
        list_skipped(self.skip_to, problem)
        return None

    def check_truncation(self, index: int) -> None:
        """Raise a DataError if a JPEG of an image is cut short."""
        for what, path in files_of(self.dataset, self.dataset.get_data_info(index)).items():
            with suppress(OSError):  # the data set itself will raise it
                if is_cut_short(get(path, backend_args=backend_of(self.dataset))):
                    raise DataError(f"{what} '{path}' is cut short or no image.")

    def check_size(self, item: dict, info: dict) -> None:
        """Raise a DataError if an image has another size than its annotations or its label map."""
        shape: Any = getattr(sample_of(item), 'ori_shape', item.get('ori_shape'))
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
        """Raise a DataError if a label map has a label that is no class, or another size than its
        image."""
        sample = sample_of(item)
        truth = getattr(sample, 'gt_sem_seg', None)
        if truth is not None:
            labels = truth.data.numpy()
            # Cropped with its image, or of the original size for the metrics.
            inputs = item['inputs'][0] if isinstance(item['inputs'], list) else item['inputs']
            sizes = (tuple(inputs.shape[-2:]), tuple(sample.ori_shape))
        elif isinstance(item.get('gt_seg_map'), np.ndarray):  # before a wrapper's transforms
            labels = item['gt_seg_map']
            sizes = (tuple(item['img'].shape[:2]), tuple(item.get('ori_shape', ())))
        else:
            return
        if not self.dataset.metainfo.get('classes'):
            return
        if not hasattr(self.dataset, 'reduce_zero_label'):
            return  # not a segmentor's: a panoptic label map numbers objects, not classes
        path = info['seg_map_path']
        problem = label_problem(self.dataset, path, labels)
        if problem is None and tuple(labels.shape[-2:]) not in sizes:
            problem = DataError(f"Label map '{path}' is of another size than its image.")
        if problem:
            raise problem

    def problem(self, index: int) -> Optional[DataError]:
        """Return the fault of the files of an image that could not be prepared, or None."""
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


def sample_of(item: dict) -> Any:
    """Return the data sample of a prepared image, the first of several views, or None."""
    sample = item.get('data_samples')
    return sample[0] if isinstance(sample, list) else sample


def list_skipped(file: str, problem: DataError) -> None:
    """Add a fault to the file that lists skipped images, unless it is there."""
    line = f'{problem}\n'
    path = Path(file)
    if path.exists() and line in path.read_text(encoding='utf-8').splitlines(keepends=True):
        return
    with path.open('a', encoding='utf-8') as list_of_skipped:  # one write: workers share the file
        list_of_skipped.write(line)
    warn(f'Skipped: {problem}')
