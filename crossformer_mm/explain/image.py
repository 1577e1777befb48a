"""Load an image as a config's test pipeline and preprocessor would."""

from pathlib import Path
from typing import Optional, Sequence, Tuple

import mmcv
import numpy as np
import torch
from mmengine.registry import TRANSFORMS
from torch import Tensor

from ..errors import UserError
from ..without_torch.files import is_cut_short


def load_image(
    path: str, loading: Optional[dict], scale: Optional[Sequence[int]], channels: int
) -> Tuple[np.ndarray, float]:
    """Load an image and resize it.

    Args:
        path (str): the file.
        loading (dict, optional): config of the transform that loads it.
        scale: largest sides, long and short; None keeps the image's own.
        channels (int): input channels of the model.

    Returns:
        tuple: (H, W, channels), three channels in BGR, and the factor of the sides.

    Raises:
        UserError: the file is no image, or one of other channels.
    """
    load = TRANSFORMS.build(loading or dict(type='LoadImageFromFile'))
    try:
        loaded = None if is_cut_short(Path(path).read_bytes()) else load(dict(img_path=path))
    except Exception:  # broken bytes fail in any way in a decoder
        loaded = None
    if loaded is None:
        raise UserError(f"image: file '{path}' could not be read as an image.")
    image = loaded['img'].reshape(*loaded['img'].shape[:2], -1)
    if image.shape[2] != channels:
        raise UserError(
            f"image: file '{path}' has {image.shape[2]} channels as the config's test pipeline "
            f'loads it, and the model takes {channels}.'
        )
    if scale is None:
        return image, 1.0
    resized, factor = mmcv.imrescale(image, tuple(scale), return_scale=True)
    return resized.reshape(*resized.shape[:2], channels), factor


def normalize(image: np.ndarray, preprocessor: dict) -> Tensor:
    """Convert an image (H, W, C) to (1, C, H, W) as the config of a data preprocessor says."""
    if preprocessor.get('bgr_to_rgb') or preprocessor.get('rgb_to_bgr'):
        image = image[..., ::-1]
    mean = np.array(preprocessor.get('mean') or 0.0)
    std = np.array(preprocessor.get('std') or 1.0)
    return torch.from_numpy((image - mean) / std).float().permute(2, 0, 1)[None]
