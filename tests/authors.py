"""Results of the authors' code in ``tests/golden``, the weights and inputs they belong to, and files of
the structure that the authors released."""

import json
import os
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Dict, Iterator, NamedTuple, Tuple

import numpy as np
import torch
from torch import Tensor

from crossformer_mm import CrossFormer

FOLDER = Path(__file__).parent / 'golden'
ENVIRONMENT = 'CROSSFORMER_GOLDEN'  # a folder of more files, which hold weights and features whole


class Golden(NamedTuple):
    """One model on one input size.

    Args:
        name (str): of the case.
        settings (dict): arguments of :class:`CrossFormer`.
        weights (dict): its state dict.
        image (Tensor): (B, 3, H, W).
        features (tuple): per stage the places in the flattened feature, the values there and the
            norm of the whole feature.
        gradients (dict): norm of each parameter's gradient of the loss of the fixture ``probe``.
    """

    name: str
    settings: dict
    weights: Dict[str, Tensor]
    image: Tensor
    features: Tuple[Tuple[np.ndarray, np.ndarray, float], ...]
    gradients: Dict[str, float]

    def build(self, **options) -> CrossFormer:
        """The model in evaluation mode."""
        return build(self.settings, self.weights, **options)


def build(settings: dict, weights: Dict[str, Tensor], **options) -> CrossFormer:
    """A CrossFormer of these settings and weights, in evaluation mode."""
    backbone = CrossFormer(**settings, **options)
    backbone.load_state_dict(weights, strict=True)
    return backbone.eval()


def normal(name: str, *shape: int) -> Tensor:
    """Normally distributed float32 numbers that depend on the name alone."""
    numbers = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(numbers).float()


def draw_weights(settings: dict) -> Dict[str, Tensor]:
    """The weights of a case: every one of them changes the result."""

    def draw(name: str, shape: torch.Size) -> Tensor:
        if name.endswith('bias'):
            return 0.2 * normal(name, *shape)
        if len(shape) == 1:
            return 1 + 0.2 * normal(name, *shape)
        return normal(name, *shape) * (2 / shape[1:].numel()) ** 0.5

    parameters = CrossFormer(**settings).state_dict()
    return {name: draw(name, value.shape) for name, value in parameters.items()}


def settings_of(meta: dict) -> dict:
    """Arguments of :class:`CrossFormer` from a case's own words."""
    arch = {key: meta[key] for key in ('embed_dims', 'depths', 'num_heads')}
    return dict(
        arch=arch, **{key: meta[key] for key in ('group_size', 'interval', 'lda', 'cooling')}
    )


def committed() -> Dict[str, dict]:
    """Settings, sizes and parameter names by case of ``authors.npz``."""
    with np.load(FOLDER / 'authors.npz') as arrays:
        return json.loads(str(arrays['meta']))


def read(name: str, size: str) -> Golden:
    """One case of ``authors.npz``; size as 'BxHxW'."""
    batch, *sides = map(int, size.split('x'))
    meta = committed()[name]
    settings = settings_of(meta)
    with np.load(FOLDER / 'authors.npz') as arrays:
        features = []
        for level in range(4):
            values = arrays[f'{name}/{size}/feature{level}']
            channels = meta['embed_dims'] * 2**level
            count = batch * channels * (sides[0] // (4 * 2**level)) * (sides[1] // (4 * 2**level))
            random = np.random.RandomState(zlib.crc32(f'{name} {size} {level}'.encode()))
            places = random.randint(0, count, len(values))
            features.append((places, values, float(arrays[f'{name}/{size}/norm{level}'])))
        norms = arrays.get(f'{name}/{size}/gradients', ())
    return Golden(
        name,
        settings,
        draw_weights(settings),
        normal(f'image {size}', batch, 3, *sides),
        tuple(features),
        dict(zip(meta.get('parameters', ()), map(float, norms))),
    )


def read_larger(path: Path) -> Iterator[Golden]:
    """All sizes of a file with whole weights, images and features."""
    with np.load(path) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays['meta']))
    numbers = dict(meta['kw'], lda=meta['lda'], cooling=meta['acl'])
    numbers.update(embed_dims=numbers['embed_dim'], interval=numbers['crs_interval'])

    def under(prefix: str) -> dict:
        start = f'{prefix}/'
        return {key[len(start) :]: value for key, value in arrays.items() if key.startswith(start)}

    weights = {key: torch.from_numpy(np.asarray(value)) for key, value in under('w').items()}
    for size, image in under('x').items():
        features = [under(f'y/{size}')[str(level)] for level in range(4)]
        yield Golden(
            f'{path.stem} {size}',
            settings_of(numbers),
            weights,
            torch.from_numpy(image).float(),
            tuple((np.arange(f.size), f.ravel(), float(np.linalg.norm(f))) for f in features),
            {key: float(norm) for key, norm in under(f'g/{size}').items()},
        )


def larger_files() -> list:
    """The files in the folder that the environment names."""
    folder = os.environ.get(ENVIRONMENT)
    return sorted(Path(folder).glob('*.npz')) if folder else []


# Released files


def earlier(block: str) -> dict:
    """Buffers of a block in files of the authors' earlier code."""
    return {
        f'{block}.attn.biases': torch.zeros(169, 2),
        f'{block}.attn.relative_position_index': torch.zeros(49, 49).long(),
    }


def later(block: str) -> dict:
    """Buffers that their later code may add."""
    return {**earlier(block), f'{block}.attn_mask': torch.zeros(64, 49, 49)}


def no_buffers(block: str) -> dict:
    return {}


def with_buffers(state: dict, buffers) -> OrderedDict:
    """Weights with a set of buffers in each block. No `_metadata`: mmcv of then dropped it."""
    state = OrderedDict(state)
    for block in {key.split('.attn.qkv')[0] for key in state if '.attn.qkv' in key}:
        state.update(buffers(block))
    return state


def imagenet_file(backbone, buffers, classes: int = 1000) -> dict:
    """A file as the authors' main.py saves it, with a norm and a linear layer that matter."""
    state = with_buffers(backbone.state_dict(), buffers)
    channels = backbone.out_channels[-1]
    state.update(
        {
            'norm.weight': 1 + 0.1 * torch.randn(channels),
            'norm.bias': 0.1 * torch.randn(channels),
            'head.weight': 0.2 * torch.randn(classes, channels),
            'head.bias': torch.randn(classes),
        }
    )
    optimizer = torch.optim.AdamW(backbone.parameters())
    return dict(
        model=state,
        optimizer=optimizer.state_dict(),
        max_accuracy=82.5,
        epoch=299,
        lr_scheduler=dict(decay_t=9382, t_initial=375300, lr_min=1e-5, base_values=[1e-3]),
        config=OrderedDict(AMP_OPT_LEVEL='O1', MODEL=OrderedDict(NAME='crossformer')),
        amp=dict(loss_scaler0=dict(loss_scale=65536.0, unskipped=12)),
    )


def openmmlab_file(model, buffers, **meta) -> dict:
    """A file as MMDetection 2.8 and MMSegmentation 0.12 save it."""
    state = with_buffers(model.state_dict(), buffers)
    return dict(
        meta=dict(
            mmcv_version='1.2.7',
            env_info='sys.platform: linux',
            seed=None,
            config="model = dict(type='MaskRCNN')\n",
            epoch=12,
            iter=87960,
            time='Thu Aug  5 12:00:00 2021',
            hook_msgs=dict(),
            **meta,
        ),
        state_dict=state,
        optimizer=dict(state={}, param_groups=[]),
    )


DETECTION = dict(mmdet_version='2.8.0')
SEGMENTATION = dict(mmseg_version='0.12.0')
