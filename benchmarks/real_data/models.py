"""Backbones of half the published widths, all else as published: CrossFormer and others."""

WIDTHS = [48, 96, 192, 384]
COMMON = dict(depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
CROSSFORMER = dict(
    type='CrossFormer', arch=dict(embed_dims=48, drop_path_rate=0.1, **COMMON), out_norm=True
)


def crossformer(**changes) -> tuple:
    return {**CROSSFORMER, **changes}, WIDTHS


# Of each: the backbone, and the channels of its stages. Their costs are equal: for that the third
# stage of CrossFormer++ has 22 blocks instead of 18, and ConvNeXt and ResNet are slightly wider.
MODELS = {
    'CrossFormer': crossformer(),
    'CrossFormer, block': crossformer(lda='block'),
    'CrossFormer++': (
        dict(
            type='CrossFormer',
            arch=dict(
                embed_dims=32,
                depths=(2, 2, 22, 2),
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
            arch=dict(depths=[3, 3, 9, 3], channels=[52, 104, 208, 416]),
            drop_path_rate=0.1,
            gap_before_final_norm=False,
        ),
        [52, 104, 208, 416],
    ),
    'ResNet': (
        dict(type='ResNet', depth=50, base_channels=35, stem_channels=35, norm_eval=False),
        [140, 280, 560, 1120],
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
