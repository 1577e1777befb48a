"""Data sets that say what is wrong with their files, in one sentence that names the file."""
import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Optional

import mmcv
import numpy as np
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import DATASETS, DefaultScope
from torch.utils.data import Dataset

from .errors import UserError, said

EMPTY = ('{} leaves no image to use: there is none, or filter_cfg drops all, for they are small or '
         'have no objects of the classes.')
MOST_IN_A_ROW = 20  # bad images, after which the fault must lie elsewhere


class DataError(UserError):
    """Data that cannot be used; the message is one sentence that names the file."""

    def __init__(self, text: str):
        # PyTorch raises an error of a worker anew, from its printed traceback.
        super().__init__(text.strip().splitlines()[-1].split(f'{__name__}.DataError: ')[-1])


class DatasetWrapper(Dataset):
    """A data set in all but what a subclass changes.

    Args:
        dataset (dict | Dataset): the one inside, or its configuration.
    """

    def __init__(self, dataset):
        self.dataset = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str):
        if name == 'dataset' or name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.dataset, name)


@DATASETS.register_module()
class CheckedDataset(DatasetWrapper):
    """A data set of MMDetection, MMSegmentation or MMPretrain whose files are not trusted.

    When built: the annotation file can be read, has the classes of the configuration,
    leaves any image, every file that it names exists, and folders of classes have images. When
    an image is loaded: its files can be read and a label map has no label that is no class.

    Args:
        dataset: see :class:`DatasetWrapper`.
        skip_to (str, optional): take another image in place of one that cannot be
            used, and add a line to this file. None: no image is skipped.

    Raises:
        DataError: what was found.
    """

    def __init__(self, dataset, skip_to: Optional[str] = None):
        source = source_of(dataset)
        try:
            with categories_read() as categories:
                super().__init__(dataset)
                if hasattr(self, 'full_init'):
                    self.full_init()
        except Exception as error:  # whatever there is in a file
            if 'at least one array' in str(error):  # mmengine packs an empty list of images
                raise DataError(EMPTY.format(source)) from error
            raise DataError(f'{source} could not be used: {said(error)}.') from error
        self.skip_to = skip_to
        self.classes = self.metainfo.get('classes')
        if categories and self.classes:
            check_categories(source, categories, self.dataset.cat_ids, list(self.classes))
        if not len(self):
            raise DataError(EMPTY.format(source))
        self.check_files(source)

    def check_files(self, source: str) -> None:
        """See that every image and label map is there, and that images are of the classes."""
        folders, missing, seen = {}, [], set()
        for index in range(len(self)):
            info = self.get_data_info(index)
            label = info.get('gt_label')
            if isinstance(label, int) and label not in seen:
                seen.add(label)
                if self.classes and label not in range(len(self.classes)):
                    raise DataError(f"Image '{info['img_path']}' has label {label} in {source}, "
                                    f'allowed are 0 to {len(self.classes) - 1}, the classes.')
            for path in files_of(info).values():
                folder, name = os.path.split(path)
                if folder not in folders:
                    folders[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
                if name not in folders[folder]:
                    missing.append(path)
        if missing:
            more = f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''
            sentence = f"File '{missing[0]}'{more}, which {source} names, does not exist"
            if self.skip_to is None:
                raise DataError(f'{sentence}.')
            print_log(f'{sentence}, and is skipped.', 'current', logging.WARNING)
        for folder, label in getattr(self.dataset, 'folder_to_idx', {}).items():
            if label not in seen:
                raise DataError(f"Class folder '{folder}' of {source} has no image.")

    def __getitem__(self, index: int) -> dict:
        for _ in range(MOST_IN_A_ROW):
            try:
                item = self.dataset[index]
                self.check_labels(item, index)
                return item
            except Exception as error:  # whatever there is in a file
                problem = self.problem(index, error)
                if self.skip_to is None:
                    raise problem from error
            self.skip(problem)
            index = np.random.randint(len(self))
        raise DataError(f'{MOST_IN_A_ROW} images in a row could not be used, the last of them: '
                        f'{problem}')

    def check_labels(self, item: dict, index: int) -> None:
        """See that a label map has no label but the classes and the ignored one."""
        truth = getattr(item.get('data_samples'), 'gt_sem_seg', None)
        if truth is None or not self.classes:
            return

        def path() -> str:
            return self.get_data_info(index)['seg_map_path']

        ignored, labels = getattr(self.dataset, 'ignore_index', 255), truth.data
        # Cropped with its image, or read for the metrics at its first size.
        sizes = (tuple(getattr(item['inputs'], 'shape', ())[-2:]),
                 tuple(item['data_samples'].ori_shape))
        if tuple(labels.shape[-2:]) not in sizes:
            raise DataError(f"Label map '{path()}' is of another size than its image.")
        wrong = labels[(labels >= len(self.classes)) & (labels != ignored)]
        if len(wrong):
            reduced = ' (1 was taken from each, as reduce_zero_label says)' if getattr(
                self.dataset, 'reduce_zero_label', False) else ''
            raise DataError(
                f"Label map '{path()}' has label {int(wrong[0])}{reduced}, allowed "
                f'are 0 to {len(self.classes) - 1}, the classes, and {ignored}, which is ignored.')

    def problem(self, index: int, error: Exception) -> DataError:
        """What is wrong with an image that could not be loaded."""
        if isinstance(error, DataError):
            return error
        files = files_of(self.get_data_info(index))
        for what, path in files.items():
            try:
                pixels = mmcv.imfrombytes(Path(path).read_bytes(), flag='unchanged')
                if pixels is None:
                    return DataError(f"{what} '{path}' is cut short or no image.")
                if what == 'Label map' and 1 in pixels.shape[:2]:
                    return DataError(f"{what} '{path}' has {pixels.shape[0]} x {pixels.shape[1]} "
                                     'pixels, MMSegmentation needs 2 or more on each side.')
            except OSError as fault:
                return DataError(f"{what} '{path}' could not be opened: {fault.strerror}.")
            except Exception as fault:  # of the decoder
                return DataError(f"{what} '{path}' is cut short or no image: {said(fault)}.")
        names = ' and '.join(repr(path) for path in files.values())
        return DataError(f'{names} or its annotation could not be used: {said(error)}.')

    def skip(self, problem: DataError) -> None:
        line = f'{problem}\n'
        path = Path(self.skip_to)
        if path.exists() and line in path.read_text(encoding='utf-8').splitlines(keepends=True):
            return
        with path.open('a', encoding='utf-8') as file:  # one write: workers share the file
            file.write(line)
        print_log(f'Skipped: {problem}', 'current', logging.WARNING)


class CountSkipped(Hook):
    """Say after each epoch and at the end how many images were skipped, and where they are listed.

    Args:
        path (str): ``skip_to`` of the :class:`CheckedDataset`.
    """

    def __init__(self, path: str):
        self.path = Path(path)

    def after_train_epoch(self, runner) -> None:
        if self.path.exists():
            count = len(self.path.read_text(encoding='utf-8').splitlines())
            runner.logger.warning(f"{count} images were skipped, see '{self.path}'.")


def source_of(dataset: dict) -> str:
    """Where a data set's list of images is, for sentences."""
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    root, prefix = Path(dataset.get('data_root') or ''), image_folders(dataset)
    if list_of_images(dataset):
        return f"annotation file '{list_of_images(dataset)}'"
    return f"image folder '{root / (prefix.get('img_path') or prefix.get('img') or '')}'"


def image_folders(dataset: dict) -> dict:
    """The folders of a data set below its root, by what is in them."""
    # MMPretrain's may be one folder, named after the split if not otherwise.
    prefix = dataset.get('data_prefix') or dataset.get('split') or {}
    return dict(img_path=prefix) if isinstance(prefix, str) else prefix


def list_of_images(dataset: dict) -> Optional[Path]:
    """The file that lists a data set's images; None: all in its folders are taken."""
    root = Path(dataset.get('data_root') or '')
    if dataset.get('ann_file'):
        return root / dataset['ann_file']
    listed = root / 'meta' / f"{dataset.get('split')}.txt"  # where MMPretrain looks for one
    return listed if listed.exists() else None


def files_of(info: dict) -> dict:
    """The files of one image, by what they are; only those of this machine."""
    files = {'Image': info.get('img_path'), 'Label map': info.get('seg_map_path')}
    return {what: path for what, path in files.items() if path and '://' not in str(path)}


@contextmanager
def categories_read() -> Iterator[dict]:
    """The categories, by id, of the annotation file that MMDetection reads meanwhile."""
    categories = {}
    scope = DefaultScope.get_current_instance()
    if scope is None or scope.scope_name != 'mmdet':
        yield categories
        return
    from mmdet.datasets import CocoDataset
    reader = CocoDataset.COCOAPI

    def read(path):
        coco = reader(path)
        categories.update(coco.cats)
        return coco

    CocoDataset.COCOAPI = staticmethod(read)
    try:
        yield categories
    finally:
        CocoDataset.COCOAPI = reader


def check_categories(source: str, categories: dict, used: list, classes: list) -> None:
    """See that MMDetection numbers categories as the classes are: it goes by their order in the
    file, and leaves out a class that the file does not have."""
    there = [category['name'] for category in categories.values()]
    absent = [name for name in classes if name not in there]
    if absent:
        raise DataError(f"Class '{absent[0]}' of the config's metainfo.classes is no category of "
                        f"{source}, which has {', '.join(map(repr, there))}.")
    order = [categories[number]['name'] for number in used]
    if order != classes:
        raise DataError(f"The config's metainfo.classes are in another order than in {source}, by "
                        f"which labels are numbered: give them as {', '.join(map(repr, order))}.")
    left = [name for name in there if name not in classes]
    if left:
        print_log(f"Objects of {', '.join(map(repr, left))} in {source} are left out, for the "
                  "config's metainfo.classes do not name them.", 'current', logging.WARNING)
