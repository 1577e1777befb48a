"""Backbones of half the published widths, all else as published: CrossFormer and others."""

WIDTHS = [48, 96, 192, 384]
COMMON = dict(depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
CROSSFORMER = dict(
    type='CrossFormer', arch=dict(embed_dims=48, drop_path_rate=0.1, **COMMON), out_norm=True
)


def crossformer(**changes) -> tuple:
    return {**CROSSFORMER, **changes}, WIDTHS


# Of each: the backbone, and the channels of its stages.
MODELS = {
    'CrossFormer': crossformer(),
    'CrossFormer, block': crossformer(lda='block'),
    'CrossFormer++': (
        dict(
            type='CrossFormer',
            arch=dict(
                embed_dims=32,
                depths=(2, 2, 18, 2),
                num_heads=(2, 4, 8, 16),
                drop_path_rate=0.1,
                cooling=True,
            ),
            out_norm=True,
        ),
        [32, 64, 128, 256],
    ),
    'Swin': (
        dict(type='SwinTransformer', embed_dims=48, window_size=7, drop_path_rate=0.1, **COMMON),
        WIDTHS,
    ),
    'ConvNeXt': (
        dict(
            type='mmpretrain.ConvNeXt',
            arch=dict(depths=[3, 3, 9, 3], channels=WIDTHS),
            drop_path_rate=0.1,
            gap_before_final_norm=False,
        ),
        WIDTHS,
    ),
    'ResNet': (
        dict(type='ResNet', depth=50, base_channels=34, stem_channels=34, norm_eval=False),
        [136, 272, 544, 1088],
    ),
}
ABLATION = {
    'one kernel': crossformer(patch_sizes=(4,), merge_sizes=((2,), (2,), (2,))),
    'shifted windows': crossformer(lda='shifted'),
    'short distance alone': crossformer(lda='none'),
    'relative position bias': crossformer(position_bias='relative'),
    'no position bias': crossformer(position_bias='none'),
    'cooling': crossformer(cooling=True),
}
