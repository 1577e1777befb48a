"""Wrong options and images of the backbone are refused in one sentence."""

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from crossformer_mm import CrossFormer

from .conftest import SMALL

WRONG = [  # option, values, what is said of each
    (
        'arch',
        ['xxl'],
        'arch must be one of t, s, b, l, pp-s, pp-b, pp-l, pp-h or a dict with '
        "'embed_dims', 'depths' and 'num_heads' (and optionally 'drop_path_rate', "
        "'cooling'), got 'xxl'",
    ),
    ('arch', [dict(embed_dims=32), dict(SMALL, heads=3), 7], 'arch must be one of t, s'),
    ('arch.embed_dims', [40, 0, '32'], 'embed_dims must be a positive multiple of 16, got '),
    ('arch.depths', [(1, 0, 1, 1), 3, ()], 'depths must be whole numbers of at least 1'),
    ('arch.num_heads', [(1, 2, 4)], 'num_heads must have one number for each of the 4'),
    ('arch.num_heads', [(1, 2, 5, 8)], 'num_heads[2] = 5 must divide the 128 channels'),
    ('arch.drop_path_rate', [1.5], 'drop_path_rate must be at least 0 and less than 1'),
    ('in_channels', [0, 'rgb'], 'in_channels must be'),
    ('patch_sizes', [(), 4, (4, 7), (8, 4)], 'patch_sizes must be kernel sizes'),
    ('patch_sizes', [(4, 6, 8, 10, 12, 14, 16)], 'patch_sizes has more kernels than 32 channels'),
    ('merge_sizes', [((2, 4), (2, 4)), 2], 'merge_sizes must have one list of kernels for each of'),
    ('merge_sizes', [((2, 4), (2, 3), (2, 4))], 'merge_sizes[1] must be kernel sizes'),
    ('merge_sizes', [((2, 4), (2, 4), 2)], 'merge_sizes[2] must be kernel sizes'),
    ('group_size', [7, (7, 7, 0, 7)], 'group_size must be whole numbers'),
    ('group_size', [(7, 7)], 'group_size must have one number for each of the 4 stages'),
    ('interval', [(8, 4, 2.5, 1)], 'interval must be whole numbers'),
    ('interval', [(8, 4, 2)], 'interval must have one number for each of the 4 stages'),
    ('lda', ['dilated'], "lda must be one of 'interval', 'block', 'shifted', 'none', got"),
    ('position_bias', ['fixed'], "position_bias must be one of 'dynamic', 'dynamic_residual', "),
    ('mlp_ratio', [0, 0.01, '4'], 'mlp_ratio must be'),
    ('qk_scale', ['auto'], 'qk_scale must be'),
    ('drop_rate', [-0.1], 'drop_rate must be at least 0 and less than 1'),
    ('attn_drop_rate', [1], 'attn_drop_rate must be at least 0 and less than 1'),
    ('drop_path_rate', [2, '0.1'], 'drop_path_rate must be at least 0 and less than 1'),
    (
        'out_indices',
        [(), 3, (0, 4), (-1,), (1, 1), (1.0,)],
        'out_indices must be different stages from 0 to 3',
    ),
    ('frozen_stages', [5, -2, 1.0], 'frozen_stages must be from -1 (none) to 4'),
]


def sentence_of(**options) -> str:
    """Return the message for options that are refused."""
    with pytest.raises(ValueError) as error:
        CrossFormer(**{'arch': SMALL, **options})
    message = str(error.value)
    assert message.startswith('CrossFormer: ')
    assert '\n' not in message and message.endswith('.')
    return message


@pytest.mark.parametrize(
    'option, value, sentence',
    [(option, value, sentence) for option, values, sentence in WRONG for value in values],
)
def test_wrong_option_is_named_in_one_sentence(option, value, sentence):
    options = {option: value}
    if option.startswith('arch.'):
        options = dict(arch={**SMALL, option.partition('.')[2]: value})
    assert sentence in sentence_of(**options)


def test_frozen_stages_are_no_more_than_there_are():
    assert 'from -1 (none) to 2' in sentence_of(frozen_stages=3, out_indices=(0, 1))


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
    said = rf"CrossFormer: there is no option '{wrong}', did you mean '{right}'\?"
    with pytest.raises(TypeError, match=said):
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
