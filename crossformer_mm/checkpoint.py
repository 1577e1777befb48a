"""Read weights, ours and the authors', without executing code in the file."""

import argparse
import json
import zipfile
from collections import OrderedDict
from contextvars import ContextVar
from typing import Any, Dict, Iterable, List, Mapping, Optional

from torch import Tensor, nn

from .compat import ForeignObject, load_plain
from .errors import UserError
from .installed import is_installed
from .openmmlab import HistoryBuffer, get_local_path, print_log, warn

# What the authors' ImageNet files hold besides the backbone: the classifier's final norm and linear
# layer, with their names in a classifier here (configs/_base_/models/classifier.py), and buffers
# that their code recomputes anyway.
CLASSIFIER_NAMES = {'norm.': 'neck.norm.', 'head.': 'head.fc.'}
BUFFER_KEYS = ('attn.biases', 'attn.relative_position_index', 'attn_mask')


# True while modules initialise weights that a checkpoint of the whole model then replaces: random
# weights need no warning.
whole_model_follows: ContextVar[bool] = ContextVar('whole_model_follows', default=False)


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message gives the file and the reason."""


def log_statistic(owner, name: str):
    """Return a HistoryBuffer's own statistic: all of ``getattr`` that a stored log needs."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise ForeignObject('builtins.getattr')
    return getattr(owner, name)


# Allowed in a file next to tensors and plain values: the log in mmengine's own checkpoints, which
# resuming needs, the configuration in the authors' files, read as a plain dict, and the arguments
# in checkpoints of timm's train.py.
SAFE_GLOBALS: List[Any] = [
    (HistoryBuffer, 'mmengine.logging.history_buffer.HistoryBuffer'),
    argparse.Namespace,
    (log_statistic, 'builtins.getattr'),
    (OrderedDict, 'yacs.config.CfgNode'),
]
if is_installed('numpy'):  # PyTorch does without it
    import numpy

    SAFE_GLOBALS += [numpy.ndarray, numpy.dtype]
    # Numbers and names, no objects.
    SAFE_GLOBALS += {type(numpy.dtype(code)) for code in '?bBhHiIlLqQefdU'}
    # numpy 2 moved its functions; files of either are read with either.
    SAFE_GLOBALS += [
        (value.__reduce__()[0], f'numpy.{core}.multiarray.{function}')
        for core in ('core', '_core')
        for function, value in [('_reconstruct', numpy.array(0)), ('scalar', numpy.float64(0))]
    ]


# mmengine's addresses: those that name a file, and names in model zoos, which mmengine turns into a
# file by itself and reads in its own way.
FILE_SCHEMES = ('', 'http://', 'https://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://')
ZOO_SCHEMES = tuple(
    f'{zoo}://' for zoo in ('modelzoo', 'torchvision', 'open-mmlab', 'openmmlab', 'mmcls', 'pavi')
)


def use_safe_loading(known: Optional[Dict[str, dict]] = None) -> None:
    """Make mmengine read every checkpoint, for resuming and testing too, as pure data.

    Its own loader falls back to running what a file says when the safe way refuses it.

    Args:
        known (dict, optional): what has been read already, by paths; given away once.
    """

    # The log names a loader by what follows `load_from_`.
    def load_from_plain_data(path, map_location=None):
        return (known or {}).pop(path, None) or read_checkpoint(path, map_location)

    def load_from_zoo(path, map_location=None):
        raise CheckpointError(
            f"Checkpoint '{path}' is a name in a model zoo, which cannot be read "
            'as plain data: download the file and give its path.'
        )

    from mmengine.runner import CheckpointLoader

    CheckpointLoader.register_scheme(FILE_SCHEMES, loader=load_from_plain_data, force=True)
    CheckpointLoader.register_scheme(ZOO_SCHEMES, loader=load_from_zoo, force=True)


def read_checkpoint(path: str, map_location='cpu') -> dict:
    """Read a checkpoint file or URL as pure data, in PyTorch's format or safetensors.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is not a checkpoint, is cut short, or holds objects other than
            tensors, plain values and a training log; nothing of it was run.
    """
    try:
        with get_local_path(path) as local, open(local, 'rb') as file:
            # Safetensors begin with the length of a JSON head, and the head.
            if file.peek(9)[4:9] == b'\0\0\0\0{':
                return read_safetensors(local)
            return read_plain(file, map_location)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"Checkpoint '{path}' does not exist: give the path of a .pth file."
        ) from None
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"Checkpoint '{path}' could not be read: {error}.") from None


def read_plain(file, map_location) -> dict:
    """Unpickle an open file as plain data.

    Raises:
        CheckpointError: it holds anything else; the message is a clause that says what.
    """
    try:
        return load_plain(file, map_location, SAFE_GLOBALS)
    except ForeignObject as error:
        if error.name.startswith('numpy.') and not is_installed('numpy'):
            raise CheckpointError('it needs the package numpy, which is not installed') from None
        raise CheckpointError(
            f'it holds {error.name}, which is no plain data and was not run'
        ) from None
    except Exception:  # broken bytes fail in any way; torch's own advice is to run them
        raise CheckpointError(
            'it is a TorchScript archive, a program that was not run'
            if is_torchscript(file)
            else 'it is cut short or no file of plain weights'
        ) from None


def is_torchscript(file) -> bool:
    """Check whether an open file is an archive of TorchScript."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith('/constants.pkl') for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def require_safetensors() -> None:
    if not is_installed('safetensors'):
        raise CheckpointError(
            'a safetensors file needs the package safetensors, which is not '
            'installed (pip install safetensors).'
        )


def read_safetensors(path: str) -> dict:
    """Read a safetensors file as a checkpoint; ``meta`` is what tools/publish_model.py wrote."""
    require_safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework='pt') as file:
            meta = json.loads((file.metadata() or {}).get('meta', '{}'))
            return dict(state_dict={key: file.get_tensor(key) for key in file.keys()}, meta=meta)
    except (SafetensorError, ValueError):
        raise CheckpointError('it is cut short or no file of plain weights') from None


def weights_in(checkpoint: Mapping, name: str) -> Dict[str, Tensor]:
    """Return the tensors of a checkpoint.

    Takes a plain state dict, the authors' ImageNet files (``model``), checkpoints of whole
    detectors and segmentors (``state_dict``) and those of timm's train.py, of which, as timm does,
    the averaged weights (``state_dict_ema``) if there are any.

    Raises:
        CheckpointError: there are no tensors.
    """
    whole = checkpoint if isinstance(checkpoint, Mapping) else {}
    places = whole.get('state_dict_ema'), whole.get('state_dict'), whole.get('model'), whole
    found = next(place for place in places if isinstance(place, Mapping))
    weights: Any = OrderedDict(
        (str(key).removeprefix('module.'), value)
        for key, value in found.items()
        if isinstance(value, Tensor)
    )
    if not weights:
        raise CheckpointError(
            f"Checkpoint '{name}' holds no weights: expected a dict of "
            "tensors, or one under 'state_dict' or 'model'."
        )
    # Versions, by which modules read what older ones wrote.
    weights._metadata = getattr(found, '_metadata', OrderedDict())
    return weights


def is_known_extra(key: str) -> bool:
    """Check whether the authors' files hold a key besides a backbone's weights."""
    return key.startswith(tuple(CLASSIFIER_NAMES)) or key.endswith(BUFFER_KEYS)


def load_backbone(backbone: nn.Module, path: str, prefix: str = 'backbone.') -> None:
    """Load the weights in a file into a backbone; see :func:`fit_backbone`.

    Args:
        backbone (nn.Module): a CrossFormer.
        path (str): of a file that :func:`weights_in` takes.
        prefix (str): of the backbone's keys in a file of a whole model.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, or the weights do not fit.
    """
    fit_backbone(backbone, weights_in(read_checkpoint(path), path), path, prefix)


def fit_backbone(
    backbone: nn.Module, weights: Mapping[str, Tensor], path: str, prefix: str = 'backbone.'
) -> None:
    """Load weights into a backbone, all of them or none.

    Parameters that the file cannot have are kept as they are and named in the log: the norms of
    ``out_norm=True``. Stages that a backbone with fewer ``out_indices`` has not built are left out,
    and what :func:`is_known_extra` knows.

    Args:
        backbone (nn.Module): a CrossFormer.
        weights (Mapping): the backbone's, or those of a whole model.
        path (str): of their file, for messages.
        prefix (str): of the backbone's keys among those of a whole model.

    Raises:
        CheckpointError: they are not this architecture's; the message lists what is missing,
            unexpected or of another shape.
    """
    own = backbone.state_dict()
    prefix = prefix.rstrip('.') + '.'  # 'backbone' is as good as 'backbone.', as in mmengine
    part = {
        key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)
    }
    weights = {
        key: value
        for key, value in (part or weights).items()
        if key in own or not (is_known_extra(key) or backbone.is_left_out(key))
    }
    fresh = {key for key in own if key not in weights and backbone.is_extra(key)}
    missing, unexpected = own.keys() - weights.keys() - fresh, weights.keys() - own.keys()
    problems = differences(missing, unexpected, weights, own)
    if problems:
        raise CheckpointError(
            f"Checkpoint '{path}' does not fit this backbone: "
            f"{'; '.join(problems)}. Choose the arch that the file was trained "
            'with.'
        )
    backbone.load_state_dict({**own, **weights})
    left = f' ({len(fresh)} output norm parameters start fresh)' if fresh else ''
    print_log(f"Loaded backbone weights from '{path}'{left}", 'current')


def model_weights(model: nn.Module, checkpoint: Mapping, name: str) -> Dict[str, Tensor]:
    """Return the weights of a checkpoint with the names of a whole model.

    Takes what :func:`weights_in` takes. The authors' ImageNet files name a classifier's parts in
    their own way. What their files hold besides is dropped by name.

    Raises:
        CheckpointError: there are no tensors.
    """
    own, weights = model.state_dict(), weights_in(checkpoint, name)
    classifier = f"{CLASSIFIER_NAMES['norm.']}weight" in own
    if classifier and any(key.startswith('patch_embed.') for key in weights):
        weights = OrderedDict((name_in_classifier(key), value) for key, value in weights.items())
    for key in weights.keys() - own.keys():
        if key.startswith('backbone.') and is_known_extra(key.removeprefix('backbone.')):
            del weights[key]
    return weights


def name_in_classifier(key: str) -> str:
    """Return the name in a classifier here of a key of the authors' ImageNet files."""
    for theirs, ours in CLASSIFIER_NAMES.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return f'backbone.{key}'


def fit_checkpoint(
    model: nn.Module, checkpoint: dict, name: str, required: Optional[str] = ''
) -> None:
    """Load a checkpoint into a whole model strictly: no silently random weights.

    Afterwards ``checkpoint['state_dict']`` holds just the weights that fit, for mmengine to load.
    What the authors' files hold besides is dropped by name.

    Args:
        required: prefix of the keys that must fit: ``''`` is all of them, None is none. Where
            others do not fit, the log lists them.

    Raises:
        CheckpointError: the file holds no weights, nothing of this model, or what is required does
            not fit; the message lists what is missing, unexpected or of another shape.
    """
    own, weights = model.state_dict(), model_weights(model, checkpoint, name)
    shapes = {key for key in weights if key in own and weights[key].shape != own[key].shape}
    fitting: Any = OrderedDict((key, weights[key]) for key in weights if key not in shapes)
    fitting._metadata = getattr(weights, '_metadata', OrderedDict())
    try:
        # PyTorch says what is left: modules may rename what older versions of them wrote.
        missing, unexpected = model.load_state_dict(fitting, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"Checkpoint '{name}' does not fit this model: {' '.join(str(error).split())}."
        ) from None
    missing = set(missing) - shapes
    if fitting.keys() <= set(unexpected):
        imagenet = any(key.startswith('patch_embed.') for key in weights)
        raise CheckpointError(
            f"Checkpoint '{name}' holds nothing of this model"
            + (
                ', but weights of a backbone alone: give it as model.backbone.init_cfg.checkpoint '
                'of a training.'
                if imagenet
                else '.'
            )
        )
    problems = (*missing, *unexpected, *shapes)
    if required is not None and any(key.startswith(required) for key in problems):
        said = '; '.join(differences(missing, unexpected, weights, own))
        raise CheckpointError(f"Checkpoint '{name}' does not fit this model: {said}.")
    for difference in differences(missing, unexpected, weights, own, shown=None):
        warn(f"Checkpoint '{name}' does not fit this model: {difference}")
    for key in unexpected:
        fitting.pop(key, None)
    checkpoint['state_dict'] = fitting


def differences(
    missing: Iterable[str],
    unexpected: Iterable[str],
    weights: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    shown: Optional[int] = 3,
) -> List[str]:
    """Return a phrase for each kind of keys, with the first ``shown`` of them (None: all)."""
    shapes = [
        f'{key} ({tuple(value.shape)} in the file, {tuple(own[key].shape)} here)'
        for key, value in weights.items()
        if key in own and value.shape != own[key].shape
    ]
    kinds = {'missing': missing, 'unexpected': unexpected, 'of another shape': shapes}
    phrases = []
    for what, keys in kinds.items():
        keys = sorted(keys)
        more = f' and {len(keys) - shown} more' if shown and len(keys) > shown else ''
        if keys:
            phrases.append(f"{what} {', '.join(keys[:shown])}{more}")
    return phrases
