"""Access to OpenMMLab's data sets: those inside wrappers, their files and transforms."""

import os
from typing import Dict, Iterator, Optional


def leaves(dataset) -> Iterator:
    """Yield the data sets inside wrappers that prepare images as MMEngine's do."""
    inside = vars(dataset) if hasattr(dataset, '__dict__') else {}
    inner = [inside[name] for name in ('_dataset', 'dataset') if name in inside]
    inner += list(inside.get('datasets') or ())
    for one in inner:
        yield from leaves(one)
    if not inner and hasattr(type(dataset), 'prepare_data') and hasattr(dataset, 'get_data_info'):
        yield dataset


def source_of(dataset) -> str:
    """Name the file or folder that lists a data set's images, for messages."""
    if getattr(dataset, 'ann_file', None):
        return f"annotation file '{dataset.ann_file}'"
    prefix = getattr(dataset, 'data_prefix', None) or {}
    prefix = prefix if isinstance(prefix, dict) else dict(img_path=prefix)
    return f"image folder '{prefix.get('img_path') or prefix.get('img') or ''}'"


def backend_of(dataset) -> Optional[dict]:
    """Return the ``backend_args`` of a data set's files; None: they are local."""
    for part in (dataset, *steps_of(dataset)):
        if getattr(part, 'backend_args', None):
            return part.backend_args
    return None


def files_of(dataset, info: dict) -> Dict[str, str]:
    """Return the files that a data set loads of one image, by kind: 'Image', 'Label map'. ``info``
    is its ``get_data_info`` of the image."""
    files = {'Image': info.get('img_path')}
    # MMDetection names a label map for images whose pipeline loads none.
    if any(getattr(step, 'with_seg', False) for step in steps_of(dataset)):
        files['Label map'] = info.get('seg_map_path')
    # Other libraries' may be lists, of the images of a video or of a pair.
    return {what: str(path) for what, path in files.items() if path and is_path(path)}


def is_path(value) -> bool:
    return isinstance(value, (str, os.PathLike))


def steps_of(part) -> Iterator:
    """Yield the transforms of a data set's pipeline, those inside wrappers included."""
    part = getattr(part, 'pipeline', part)
    part = getattr(part, 'subroutines', None) or getattr(part, 'transforms', part)
    for step in part if isinstance(part, (list, tuple)) else ():
        if callable(step):
            yield step
            yield from steps_of(step)
