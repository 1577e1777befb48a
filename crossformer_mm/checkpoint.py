"""Reading backbone weights, ours and the authors', without running what is in the file."""
import re
from collections import OrderedDict
from typing import Dict, List, Mapping

import numpy
import torch
from mmengine.fileio import get_local_path
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

# What the authors' ImageNet files hold besides the backbone: the classifier's
# final norm and linear layer, and buffers that their code recomputes anyway.
CLASSIFIER_KEYS = ('norm.', 'head.')
BUFFER_KEYS = ('attn.biases', 'attn.relative_position_index', 'attn_mask')


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one sentence that says why."""


def log_statistic(owner, name: str):
    """``getattr`` as far as a stored log needs it: a HistoryBuffer's own statistics."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise ValueError(f'GLOBAL builtins.getattr of {owner}.{name}')
    return getattr(owner, name)


# What may stand in a file next to tensors and plain values: the log in mmengine's
# own checkpoints, whose resuming needs it, and the configuration in the authors'
# files, read as a plain dict. Anything else makes reading fail.
SAFE_GLOBALS = [
    HistoryBuffer, numpy.ndarray, numpy.dtype, type(numpy.dtype('float64')),
    type(numpy.dtype('int64')), (log_statistic, 'builtins.getattr'),
    (OrderedDict, 'yacs.config.CfgNode'),
    # numpy 2 moved its functions; files of either are read with either.
    *((numpy.array(0).__reduce__()[0], f'numpy.{core}.multiarray._reconstruct')
      for core in ('core', '_core')),
    *((numpy.float64(0).__reduce__()[0], f'numpy.{core}.multiarray.scalar')
      for core in ('core', '_core')),
]


def use_safe_loading() -> None:
    """Let mmengine read every checkpoint, for resuming and testing too, as pure data.

    Its own loader falls back to running what a file says when the safe way
    refuses it.
    """

    # The log names a loader by what follows `load_from_`.
    def load_from_plain_data(path, map_location=None):
        return read_checkpoint(path, map_location)

    CheckpointLoader.register_scheme(
        prefixes=('', 'http://', 'https://'), loader=load_from_plain_data, force=True)


def read_checkpoint(path: str, map_location='cpu') -> dict:
    """Read a checkpoint file or URL as pure data.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is not a checkpoint, is cut short, or holds
            objects other than tensors, plain values and a training log; nothing
            of it was run.
    """
    try:
        with get_local_path(path) as local, open(local, 'rb') as file:
            return read_plain(file, map_location)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"Checkpoint '{path}' does not exist: give the path of a .pth file.") from None
    except OSError as error:
        raise CheckpointError(f"Checkpoint '{path}' could not be opened: {error}.") from None
    except CheckpointError as error:
        raise CheckpointError(f"Checkpoint '{path}' could not be read: {error}.") from None


def read_plain(file, map_location) -> dict:
    """Unpickle an open file, plain data alone; a CheckpointError says in a clause why not."""
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:  # broken bytes fail in any way; torch's own advice is to run them
        foreign = re.search(r'GLOBAL (\S+)', str(error))
        raise CheckpointError(
            f'it holds {foreign[1]}, which is no plain data and was not run' if foreign else
            'it is cut short or no file of plain weights') from None


def backbone_weights(checkpoint: Mapping, prefix: str = 'backbone.',
                     name: str = 'given') -> Dict[str, Tensor]:
    """The backbone's part of a checkpoint, its keys as the backbone names them.

    Takes a plain state dict, the authors' ImageNet files (``model``) and
    checkpoints of whole detectors and segmentors (``state_dict`` with
    ``backbone.*`` keys); drops the classifier and stored buffers by name.

    Raises:
        CheckpointError: there are no tensors under names that could be a backbone's.
    """
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    if not isinstance(checkpoint, Mapping) or not any(
            isinstance(value, Tensor) for value in checkpoint.values()):
        raise CheckpointError(f"Checkpoint '{name}' holds no weights: expected a dict of "
                              "tensors, or one under 'state_dict' or 'model'.")
    weights = {str(key).removeprefix('module.'): value for key, value in checkpoint.items()}
    prefix = prefix.rstrip('.') + '.'  # 'backbone' is as good as 'backbone.', as in mmengine
    if any(key.startswith(prefix) for key in weights):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()
                   if key.startswith(prefix)}
    return {key: value for key, value in weights.items()
            if not key.startswith(CLASSIFIER_KEYS) and not key.endswith(BUFFER_KEYS)}


def load_backbone(backbone: nn.Module, path: str, prefix: str = 'backbone.') -> None:
    """Load the weights in a file into a backbone, all of them or none.

    Parameters that the file cannot have are kept as they are and named in the
    log: the norms of ``out_norm=True``. Stages that a backbone with fewer
    ``out_indices`` has not built are left out.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, or the file's weights are not this
            architecture's; the sentence lists what is missing, unexpected or
            of another shape.
    """
    weights = backbone_weights(read_checkpoint(path), prefix, path)
    own = backbone.state_dict()
    weights = {key: value for key, value in weights.items()
               if key in own or not backbone.is_left_out(key)}
    fresh = [key for key in own if key not in weights and backbone.is_extra(key)]
    problems = compare(own.keys() - fresh, weights, own)
    if problems:
        raise CheckpointError(f"Checkpoint '{path}' does not fit this backbone: "
                              f"{'; '.join(problems)}. Choose the arch that the file was trained "
                              'with.')
    backbone.load_state_dict({**own, **weights})
    left = f' ({len(fresh)} output norm parameters start fresh)' if fresh else ''
    print_log(f"Loaded backbone weights from '{path}'{left}", 'current')


def compare(expected, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> List[str]:
    """One phrase for each way in which weights differ from what is expected."""

    def phrase(what: str, keys) -> List[str]:
        keys = sorted(keys)
        more = f' and {len(keys) - 3} more' if len(keys) > 3 else ''
        return [f"{what} {', '.join(keys[:3])}{more}"] if keys else []

    shapes = [f'{key} ({tuple(weights[key].shape)} in the file, {tuple(own[key].shape)} here)'
              for key in own if key in weights and weights[key].shape != own[key].shape]
    return (phrase('missing', set(expected) - weights.keys())
            + phrase('unexpected', weights.keys() - own.keys())
            + phrase('of another shape', shapes))
