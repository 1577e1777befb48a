"""Architectures of CrossFormer: their numbers, and what timm and model hubs call them."""

from typing import Union

# CrossFormer (arXiv 2108.00154, table 1) and, as pp-*, CrossFormer++ (arXiv 2303.06908, table 1).
# Depths, heads and channels are those of the released weights.
ARCHITECTURES = {
    name: dict(
        embed_dims=dims,
        depths=depths,
        num_heads=tuple(dims // 32 * 2**stage for stage in range(4)),
        drop_path_rate=drop_path_rate,
        cooling=name.startswith('pp-'),
    )
    for name, dims, depths, drop_path_rate in [
        ('t', 64, (1, 1, 8, 6), 0.1),
        ('s', 96, (2, 2, 6, 2), 0.2),
        ('b', 96, (2, 2, 18, 2), 0.3),
        ('l', 128, (2, 2, 18, 2), 0.5),
        ('pp-s', 64, (2, 2, 18, 2), 0.2),
        ('pp-b', 96, (2, 2, 18, 2), 0.3),
        ('pp-l', 128, (2, 2, 18, 2), 0.5),
        ('pp-h', 128, (6, 6, 18, 2), 0.5),
    ]
}
TIMM_NAMES = {
    't': 'crossformer_tiny',
    's': 'crossformer_small',
    'b': 'crossformer_base',
    'l': 'crossformer_large',
    'pp-s': 'crossformer_pp_small',
    'pp-b': 'crossformer_pp_base',
    'pp-l': 'crossformer_pp_large',
    'pp-h': 'crossformer_pp_huge',
}
GROUPS = ('group_size', 'interval', 'lda')  # the backbone's options of how positions are grouped
# Groups of the CrossFormer++ classifiers; the published detectors and segmentors have others.
PP_GROUPS = dict(lda='block', group_size=(4, 4, 14, 7), interval=(4, 2, 1, 1))


def resolve_arch(arch: Union[str, dict]) -> dict:
    """Return the numbers of an architecture, given by its name or by a dict.

    Raises:
        ValueError: no such name, or keys are missing or unknown.
    """
    numbers = ARCHITECTURES.get(arch) if isinstance(arch, str) else arch
    needed, optional = {'embed_dims', 'depths', 'num_heads'}, {'drop_path_rate', 'cooling'}
    if not isinstance(numbers, dict) or not needed <= numbers.keys() <= needed | optional:
        raise ValueError(
            f"CrossFormer: arch must be one of {', '.join(ARCHITECTURES)} or a dict with "
            "'embed_dims', 'depths' and 'num_heads' (and optionally 'drop_path_rate', "
            f"'cooling'), got {arch!r}."
        )
    return dict(drop_path_rate=0.0, cooling=False) | numbers
