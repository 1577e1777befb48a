"""Reading backbone weights, ours and the authors', without running what is in the file."""
import re
from collections import OrderedDict
from typing import Dict, List, Mapping

import torch
from mmengine.fileio import get_local_path
from mmengine.logging import print_log
from torch import Tensor, nn

# What the authors' ImageNet files hold besides the backbone: the classifier's
# final norm and linear layer, and buffers that their code recomputes anyway.
CLASSIFIER_KEYS = ('norm.', 'head.')
BUFFER_KEYS = ('attn.biases', 'attn.relative_position_index', 'attn_mask')


class StandIn:
    """Takes the place of an object that a checkpoint holds besides weights; it does nothing."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


# What training leaves in files next to the weights: mmengine's log (HistoryBuffer) and numpy's
# numbers, the authors' configuration. The file's mention of them is read as one of an empty
# object, so nothing of theirs is imported or called; any other object makes reading fail.
STAND_INS = [(OrderedDict, 'yacs.config.CfgNode'), *((StandIn, name) for name in (
    'mmengine.logging.history_buffer.HistoryBuffer', 'builtins.getattr', 'numpy.dtype',
    'numpy.ndarray', 'numpy._core.multiarray.scalar', 'numpy._core.multiarray._reconstruct',
    'numpy.core.multiarray.scalar', 'numpy.core.multiarray._reconstruct'))]


def read_checkpoint(path: str) -> dict:
    """Read a checkpoint file or URL onto the CPU as pure data.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a checkpoint, is cut short, or holds
            objects other than tensors and plain values; nothing of it was run.
    """
    try:
        with get_local_path(path) as local, open(local, 'rb') as file:
            return read_plain(file)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"Checkpoint '{path}' does not exist: give the path of a .pth file.") from None
    except OSError as error:
        raise ValueError(f"Checkpoint '{path}' could not be opened: {error}.") from None
    except ValueError as error:
        raise ValueError(f"Checkpoint '{path}' could not be read: {error}.") from None


def read_plain(file) -> dict:
    """Unpickle an open file, plain data alone; a ValueError says in a clause why it cannot be."""
    try:
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(file, map_location='cpu', weights_only=True)
    except Exception as error:  # broken bytes fail in any way; torch's own advice is to run them
        foreign = re.search(r'GLOBAL (\S+)', str(error))
        raise ValueError(
            f'it holds {foreign[1]}, which is no plain data and was not run' if foreign else
            'it is cut short or no file of plain weights') from None


def backbone_weights(checkpoint: Mapping, prefix: str = 'backbone.') -> Dict[str, Tensor]:
    """The backbone's part of a checkpoint, its keys as the backbone names them.

    Takes a plain state dict, the authors' ImageNet files (``model``) and
    checkpoints of whole detectors and segmentors (``state_dict`` with
    ``backbone.*`` keys); drops the classifier and stored buffers by name.

    Raises:
        ValueError: there are no tensors under names that could be a backbone's.
    """
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    if not isinstance(checkpoint, Mapping) or not any(
            isinstance(value, Tensor) for value in checkpoint.values()):
        raise ValueError('it holds no weights: expected a dict of tensors, or one under '
                         "'state_dict' or 'model'.")
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
        ValueError: not a checkpoint, or the file's weights are not this
            architecture's; the sentence lists what is missing, unexpected or
            of another shape.
    """
    try:
        weights = backbone_weights(read_checkpoint(path), prefix)
    except ValueError as error:
        message = str(error)
        raise ValueError(
            message if path in message else f"Checkpoint '{path}': {message}") from None
    own = backbone.state_dict()
    weights = {key: value for key, value in weights.items()
               if key in own or not backbone.is_left_out(key)}
    fresh = [key for key in own if key not in weights and backbone.is_extra(key)]
    problems = compare(own.keys() - fresh, weights, own)
    if problems:
        raise ValueError(f"Checkpoint '{path}' does not fit this backbone: " + '; '.join(problems) +
                         '. Choose the arch that the file was trained with.')
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
