"""Checks of the backbone's options: the first that cannot work raises an error that names it."""

import difflib
import functools
import inspect
from typing import Callable, Sequence

from .grouping import LDA_DEFINITIONS
from .kernels import PATHS
from .position_bias import POSITION_BIASES


def suggest_options(init: Callable) -> Callable:
    """Make a constructor's TypeError for an unknown option suggest the nearest one."""
    known = inspect.signature(init).parameters

    @functools.wraps(init)
    def checked(self, *args, **options):
        for name in options.keys() - known.keys():
            near = difflib.get_close_matches(name.lower(), known, n=1)
            asked = (
                f"did you mean '{near[0]}'"
                if near
                else f"choose from {', '.join(name for name in known if name != 'self')}"
            )
            raise TypeError(f"CrossFormer: there is no option '{name}', {asked}?")
        init(self, *args, **options)

    return checked


def check(valid: bool, message: str) -> None:
    """Raise a ValueError with a message unless an option is valid."""
    if not valid:
        raise ValueError(f'CrossFormer: {message}.')


def are_positive(numbers) -> bool:
    """Check for a sequence of one or more whole numbers of at least 1."""
    return (
        isinstance(numbers, Sequence)
        and not isinstance(numbers, str)
        and len(numbers) > 0
        and all(isinstance(n, int) and n >= 1 for n in numbers)
    )


def check_stages(arch: dict, group_size, interval) -> None:
    """Check the architecture and what has one number for each of its stages."""
    dims, depths, heads = arch['embed_dims'], arch['depths'], arch['num_heads']
    check(
        isinstance(dims, int) and dims >= 16 and dims % 16 == 0,
        f'embed_dims must be a positive multiple of 16, got {dims!r}',
    )
    for name, numbers in dict(
        depths=depths, num_heads=heads, group_size=group_size, interval=interval
    ).items():
        check(are_positive(numbers), f'{name} must be whole numbers of at least 1, got {numbers!r}')
        check(
            len(numbers) == len(depths),
            f'{name} must have one number for each of the {len(depths)} stages of depths, '
            f'got {numbers!r}',
        )
    for stage, count in enumerate(heads):
        channels = dims * 2**stage
        check(
            channels % count == 0,
            f'num_heads[{stage}] = {count} must divide the {channels} channels of its stage',
        )


def check_embeddings(arch: dict, in_channels, patch_sizes, merge_sizes) -> None:
    """Check the channels of the image and the kernels of the cross-scale embeddings."""
    dims, mergings = arch['embed_dims'], len(arch['depths']) - 1
    check(
        isinstance(in_channels, int) and in_channels >= 1,
        f'in_channels must be a whole number of at least 1, got {in_channels!r}',
    )
    check(
        isinstance(merge_sizes, Sequence) and len(merge_sizes) == mergings,
        f'merge_sizes must have one list of kernels for each of the {mergings} mergings, '
        f'got {merge_sizes!r}',
    )
    for name, kernels in [
        ('patch_sizes', patch_sizes),
        *((f'merge_sizes[{i}]', sizes) for i, sizes in enumerate(merge_sizes)),
    ]:
        check(
            are_positive(kernels)
            and all(k >= kernels[0] and (k - kernels[0]) % 2 == 0 for k in kernels),
            f'{name} must be kernel sizes, each the first (the stride) plus an even number, '
            f'got {kernels!r}',
        )
        check(
            2 ** (len(kernels) - 1) <= dims,
            f'{name} has more kernels than {dims} channels can be halved for, got {kernels!r}',
        )


def check_choices(lda, position_bias, attention_path) -> None:
    """Check the options that are one of some names."""
    for name, choice, choices in [
        ('lda', lda, LDA_DEFINITIONS),
        ('position_bias', position_bias, POSITION_BIASES),
        ('attention_path', attention_path, (None, *PATHS)),
    ]:
        check(
            choice in choices,
            f"{name} must be one of {', '.join(map(repr, choices))}, got {choice!r}",
        )


def check_numbers(embed_dims: int, mlp_ratio, qk_scale) -> None:
    """Check the factors of the MLPs' width and of the attention logits."""
    check(
        isinstance(mlp_ratio, (int, float)) and embed_dims * mlp_ratio >= 1,
        f'mlp_ratio must be a positive number that leaves the MLPs a channel, got {mlp_ratio!r}',
    )
    check(
        isinstance(qk_scale, (int, float, type(None))),
        f'qk_scale must be a number or None, got {qk_scale!r}',
    )


def check_outputs(stages: int, out_indices, frozen_stages) -> None:
    """Check which of the architecture's stages are returned and frozen."""
    check(
        isinstance(out_indices, Sequence)
        and len(out_indices) > 0
        and all(isinstance(index, int) and index in range(stages) for index in out_indices)
        and len(set(out_indices)) == len(out_indices),
        f'out_indices must be different stages from 0 to {stages - 1}, got {out_indices!r}',
    )
    check(
        isinstance(frozen_stages, int) and frozen_stages in range(-1, max(out_indices) + 2),
        f'frozen_stages must be from -1 (none) to {max(out_indices) + 1}, the number of stages '
        f'that out_indices needs, got {frozen_stages!r}',
    )


def check_rates(**rates) -> None:
    """Check rates of dropout and stochastic depth, by their options' names."""
    for name, rate in rates.items():
        check(
            isinstance(rate, (int, float)) and 0 <= rate < 1,
            f'{name} must be at least 0 and less than 1, got {rate!r}',
        )
