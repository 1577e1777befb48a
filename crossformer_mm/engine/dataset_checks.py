"""Checks of data sets before a run: images, files, EXIF orientations, label maps."""

import os
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np
import PIL.Image

from ..errors import ConfigError, DataError, frames_of, said
from ..openmmlab import warn
from .dataset_access import backend_of, files_of, source_of, steps_of

NO_IMAGES = (
    '{} leaves no image to use: there is none, or filter_cfg drops all, for they are small or '
    'have no objects of the classes.'
)
KNOWN_PACKAGES = ('mmcv', 'mmseg', 'mmdet', 'mmengine')  # their transforms are known
AFTER_REDUCING = ' (1 was taken from each, as reduce_zero_label says)'
MAX_CHECKED_BEFORE_A_RUN = 200  # images or label maps, evenly spaced, of one data set
EXIF_ORIENTATION = 0x0112


def check_files(dataset, skip_to: Optional[str] = None) -> None:
    """Raise a DataError if a data set has no images, a file does not exist or a label is no class.

    Files on a remote backend are not looked for. With ``skip_to``, the list of skipped images, a
    missing file is a warning.
    """
    source = source_of(dataset)
    with explained_data():
        dataset.full_init()
    if not len(dataset):
        raise DataError(NO_IMAGES.format(source))
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
                    f"Image '{info.get('img_path')}' has label {label} in {source}, "
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
        message = f"File '{missing[0]}'{more}, which {source} names, does not exist"
        if skip_to is None:
            raise DataError(f'{message}.')
        warn(f'{message}, and is skipped.')
    for folder, label in (getattr(dataset, 'folder_to_idx', None) or {}).items():
        if label not in seen:
            raise DataError(f"Class folder '{folder}' of {source} has no image.")


@contextmanager
def explained_data() -> Iterator[None]:
    """Raise a DataError that names the data set for an error that was raised while it was built
    inside this context. An error that no data set raised is raised as it is."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # whatever there is in a file
        # Registries build data sets, one inside another: only the traceback has the one at fault.
        frames = frames_of(error)
        owners: List[Any] = [
            frame.f_locals.get('self')
            for frame in frames
            if frame.f_code.co_name in ('full_init', 'load_data_list')
        ]
        if not owners:
            raise
        source = source_of(owners[-1])
        packing = any(frame.f_code.co_name == '_serialize_data' for frame in frames)
        if packing and owners[-1].data_list == []:  # MMEngine cannot pack an empty list
            raise DataError(NO_IMAGES.format(source)) from error
        raise DataError(f'{source} could not be used: {said(error)}.') from error


def evenly_spaced(dataset) -> List[int]:
    """Return indices of at most MAX_CHECKED_BEFORE_A_RUN images of a data set, evenly spaced."""
    count = min(len(dataset), MAX_CHECKED_BEFORE_A_RUN)
    return [len(dataset) * number // count for number in range(count)]


def check_orientations(dataset, skip_to: Optional[str] = None) -> None:
    """Raise a DataError if the annotations of some image fit it as it is stored, and not as it is
    loaded by its EXIF orientation."""
    if skip_to is not None:
        return  # each image is checked when it is loaded
    unclear = []
    indices = evenly_spaced(dataset)
    for index in indices:
        info = dataset.get_data_info(index)
        problem, is_unclear = orientation_problem(dataset, info)
        if problem:
            raise problem
        if is_unclear:
            unclear.append(info['img_path'])
    if unclear:
        warn(
            f'{len(unclear)} of the {len(indices)} images checked in {source_of(dataset)}, such as '
            f"'{unclear[0]}', have an EXIF orientation, which is applied when they are loaded: "
            'annotations must be of the turned image. To load images as stored, give '
            "LoadImageFromFile color_type='color_ignore_orientation'."
        )


def orientation_problem(dataset, info: dict) -> Tuple[Optional[DataError], bool]:
    """Compare an image's size, as it is loaded, with that of its annotations or label map.

    Returns:
        tuple[DataError or None, bool]: the fault; whether the image has an EXIF orientation and
        sizes do not tell if annotations follow it.
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
    """Return the error for an image whose (width, height) is not that of its annotations."""
    return DataError(
        f"Image '{path}' is {loaded[0]} x {loaded[1]} pixels wide and high{note}, but "
        f'{expected[0]} x {expected[1]} in {what}.'
    )


def check_label_maps(dataset, skip_to: Optional[str] = None) -> None:
    """Load some label maps of a segmentation data set and check their labels.

    A warning lists classes without a pixel. Data sets with transforms of other packages, which may
    change labels, are not checked.

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
    if any(type(step).__module__.partition('.')[0] not in KNOWN_PACKAGES for step in steps):
        return
    found: set = set()
    for count, index in enumerate(evenly_spaced(dataset), start=1):
        info = dataset.get_data_info(index)
        try:
            labels = load(info)['gt_seg_map']
        except Exception:  # the guard names the file when the training loads it
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
        warn(
            f'{len(absent)} of {len(classes)} classes have no pixel in the {count} label maps '
            f'checked in {source_of(dataset)}: {names}{more}. Labels found'
            f'{AFTER_REDUCING if dataset.reduce_zero_label else ""}: '
            f'{", ".join(map(str, sorted(found)))}; {ignored} is ignored.'
            f'{binary if len(classes) == 2 and 255 in found else ""}'
        )


def check_reduce_zero_label(load, dataset) -> None:
    """Raise a ConfigError if a pipeline and its data set differ in ``reduce_zero_label``."""
    reduced = getattr(load, 'reduce_zero_label', None)
    if reduced not in (None, dataset.reduce_zero_label):
        raise ConfigError(
            f'LoadAnnotations in the pipeline of {source_of(dataset)} has reduce_zero_label='
            f'{reduced}, the data set has {dataset.reduce_zero_label}: set it in the data set only.'
        )


def label_problem(dataset, path: str, labels: np.ndarray) -> Optional[DataError]:
    """Return the fault of a label map's labels, or None."""
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
