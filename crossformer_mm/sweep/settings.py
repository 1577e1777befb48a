"""Settings of long and short distance attention that one checkpoint is evaluated at."""

import itertools
from typing import Callable, List, Optional, Sequence

import torch

from ..architectures import GROUPS
from ..backbone import CrossFormer, groups_of
from ..errors import UserError


def settings_of(
    backbone: dict,
    sizes: Optional[Sequence[tuple]] = None,
    intervals: Optional[Sequence[tuple]] = None,
    definitions: Optional[Sequence[str]] = None,
) -> List[dict]:
    """List the config's own setting, then all other combinations of the given values.

    Args:
        backbone (dict): the config of a CrossFormer.
        sizes, intervals (sequence of tuples, optional): one number for each stage. Default: the
            config's. If nothing at all is given: a grid around the config.
        definitions (sequence of str, optional): of long distance attention. Default: the config's.

    Raises:
        UserError: a CrossFormer cannot be built with a setting.
    """
    options = {key: value for key, value in backbone.items() if key != 'type'}
    try:
        with torch.device('meta'):
            CrossFormer(**options)
            own = groups_of(options)
            own.update(group_size=tuple(own['group_size']), interval=tuple(own['interval']))
            if not (sizes or intervals or definitions):
                # The first stages have the largest maps and cost most.
                sizes = [own['group_size'], first_half(own['group_size'], lambda g: 2 * g)]
                intervals = [
                    own['interval'],
                    first_half(own['interval'], lambda i: 2 * i),
                    first_half(own['interval'], lambda i: max(i // 2, 1)),
                ]
            found = [own]
            for values in itertools.product(
                sizes or [own['group_size']],
                intervals or [own['interval']],
                definitions or [own['lda']],
            ):
                setting = dict(zip(GROUPS, values))
                if setting not in found:
                    CrossFormer(**{**options, **setting})
                    found.append(setting)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    return found


def first_half(numbers: tuple, change: Callable[[int], int]) -> tuple:
    """Change the numbers of the first half of the stages."""
    half = len(numbers) // 2
    return (*map(change, numbers[:half]), *numbers[half:])


def name_of(setting: dict) -> str:
    """Format a setting as 'G 7·7·7·7, I 8·4·2·1, interval'."""
    sizes, intervals = ('·'.join(map(str, setting[key])) for key in GROUPS[:2])
    return f"G {sizes}, I {intervals}, {setting['lda']}"


def caution(backbone: dict) -> Optional[str]:
    """Return a note on a position bias whose parameters have a size; None: it is dynamic."""
    bias = backbone.get('position_bias', 'dynamic')
    if bias.startswith('dynamic'):
        return None
    return (
        f"note: the model's position_bias is '{bias}'; only a dynamic one is made for groups "
        'of other sizes than in training.'
    )
