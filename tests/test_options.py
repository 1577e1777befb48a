"""Wrong options and images of the backbone are refused in one sentence."""

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from crossformer_mm import CrossFormer

from .conftest import SMALL


def arch(**changes):
    return dict(SMALL, **changes)


@pytest.mark.parametrize(
    'options, sentence',
    [
        (
            dict(arch='xxl'),
            'arch must be one of t, s, b, l, pp-s, pp-b, pp-l, pp-h or a dict with '
            "'embed_dims', 'depths' and 'num_heads' (and optionally 'drop_path_rate', "
            "'cooling'), got 'xxl'",
        ),
        (dict(arch=dict(embed_dims=32)), 'arch must be one of t, s'),
        (dict(arch=arch(heads=3)), 'arch must be one of t, s'),
        (dict(arch=7), 'arch must be one of t, s'),
        (dict(arch=arch(embed_dims=40)), 'embed_dims must be a positive multiple of 16, got 40'),
        (dict(arch=arch(embed_dims=0)), 'embed_dims must be'),
        (dict(arch=arch(embed_dims='32')), 'embed_dims must be'),
        (dict(arch=arch(depths=(1, 0, 1, 1))), 'depths must be whole numbers of at least 1'),
        (dict(arch=arch(depths=3)), 'depths must be whole numbers'),
        (dict(arch=arch(depths=())), 'depths must be whole numbers'),
        (dict(arch=arch(num_heads=(1, 2, 4))), 'num_heads must have one number for each of the 4'),
        (dict(arch=arch(num_heads=(1, 2, 5, 8))), 'num_heads[2] = 5 must divide the 128 channels'),
        (dict(arch=arch(drop_path_rate=1.5)), 'drop_path_rate must be at least 0 and less than 1'),
        (dict(in_channels=0), 'in_channels must be'),
        (dict(in_channels='rgb'), 'in_channels must be'),
        (dict(patch_sizes=()), 'patch_sizes must be kernel sizes'),
        (dict(patch_sizes=4), 'patch_sizes must be kernel sizes'),
        (dict(patch_sizes=(4, 7)), 'patch_sizes must be kernel sizes'),
        (dict(patch_sizes=(8, 4)), 'patch_sizes must be kernel sizes'),
        (
            dict(patch_sizes=(4, 6, 8, 10, 12, 14, 16)),
            'patch_sizes has more kernels than 32 channels',
        ),
        (
            dict(merge_sizes=((2, 4), (2, 4))),
            'merge_sizes must have one list of kernels for each of',
        ),
        (dict(merge_sizes=2), 'merge_sizes must have one list of kernels for each of'),
        (dict(merge_sizes=((2, 4), (2, 3), (2, 4))), 'merge_sizes[1] must be kernel sizes'),
        (dict(merge_sizes=((2, 4), (2, 4), 2)), 'merge_sizes[2] must be kernel sizes'),
        (dict(group_size=7), 'group_size must be whole numbers'),
        (dict(group_size=(7, 7, 0, 7)), 'group_size must be whole numbers'),
        (dict(group_size=(7, 7)), 'group_size must have one number for each of the 4 stages'),
        (dict(interval=(8, 4, 2.5, 1)), 'interval must be whole numbers'),
        (dict(interval=(8, 4, 2)), 'interval must have one number for each of the 4 stages'),
        (dict(lda='dilated'), "lda must be one of 'interval', 'block', 'shifted', 'none', got"),
        (
            dict(position_bias='fixed'),
            "position_bias must be one of 'dynamic', 'dynamic_residual', ",
        ),
        (dict(mlp_ratio=0), 'mlp_ratio must be'),
        (dict(mlp_ratio=0.01), 'mlp_ratio must be'),
        (dict(mlp_ratio='4'), 'mlp_ratio must be'),
        (dict(qk_scale='auto'), 'qk_scale must be'),
        (dict(drop_rate=-0.1), 'drop_rate must be at least 0 and less than 1'),
        (dict(attn_drop_rate=1), 'attn_drop_rate must be at least 0 and less than 1'),
        (dict(drop_path_rate=2), 'drop_path_rate must be at least 0 and less than 1'),
        (dict(drop_path_rate='0.1'), 'drop_path_rate must be'),
        (dict(out_indices=()), 'out_indices must be different stages from 0 to 3'),
        (dict(out_indices=3), 'out_indices must be'),
        (dict(out_indices=(0, 4)), 'out_indices must be'),
        (dict(out_indices=(-1,)), 'out_indices must be'),
        (dict(out_indices=(1, 1)), 'out_indices must be'),
        (dict(out_indices=(1.0,)), 'out_indices must be'),
        (dict(frozen_stages=5), 'frozen_stages must be from -1 (none) to 4'),
        (dict(frozen_stages=-2), 'frozen_stages must be'),
        (dict(frozen_stages=1.0), 'frozen_stages must be'),
        (dict(frozen_stages=3, out_indices=(0, 1)), 'frozen_stages must be from -1 (none) to 2'),
    ],
)
def test_wrong_option_is_named_in_one_sentence(options, sentence):
    with pytest.raises(ValueError) as error:
        CrossFormer(**{'arch': SMALL, **options})
    message = str(error.value)
    assert message.startswith('CrossFormer: ') and sentence in message
    assert '\n' not in message and message.endswith('.')


@pytest.mark.parametrize(
    'wrong, right',
    [
        ('with_pc', 'with_cp'),
        ('out_index', 'out_indices'),
        ('group_sizes', 'group_size'),
        ('frozen_stage', 'frozen_stages'),
        ('drop_path', 'drop_path_rate'),
        ('LDA', 'lda'),
    ],
)
def test_a_misspelt_option_of_the_backbone_names_the_nearest(wrong, right):
    with pytest.raises(
        TypeError,
        match=f"CrossFormer: there is no option '{wrong}', did you mean "
        rf"'{right}'\?",
    ):
        CrossFormer('s', **{wrong: 1})


def test_an_option_like_no_other_lists_them_all():
    with pytest.raises(TypeError, match='choose from arch, in_channels, .*attention_path'):
        CrossFormer('s', zzz=1)


def test_a_misspelt_option_in_a_config_names_the_nearest():
    init_default_scope('mmdet')
    with pytest.raises(TypeError, match="did you mean 'interval'"):
        MODELS.build(dict(type='CrossFormer', intervals=(1, 1, 1, 1)))


@pytest.mark.parametrize(
    'image, sentence',
    [
        (torch.zeros(3, 32, 32), '(B, 3, H, W)'),
        (torch.zeros(1, 1, 3, 32, 32), '(B, 3, H, W)'),
        (torch.zeros(1, 4, 32, 32), 'got shape (1, 4, 32, 32)'),
        (torch.zeros(1, 3, 0, 32), 'no empty side'),
        (torch.zeros(1, 3, 32, 0), 'no empty side'),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 'torch.uint8: normalise them first'),
    ],
)
def test_wrong_image_is_refused_in_one_sentence(small, image, sentence):
    with pytest.raises(ValueError) as error:
        small()(image)
    message = str(error.value)
    assert sentence in message and '\n' not in message and message.endswith('.')
