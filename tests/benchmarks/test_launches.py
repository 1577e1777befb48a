"""Launches of a forward and a backward pass on a GPU, counted without one."""

import pytest

from crossformer_mm import CrossFormer
from crossformer_mm.compat import missing_torch

from ..helpers import ROOT, load_script

pytest.importorskip('triton', reason='the fused kernels need the package triton')
if missing_torch('2.8'):
    pytest.skip('older releases divide a layer into other operators', allow_module_level=True)

BLOCKS, STAGES, KERNELS = 6, 3, 2  # KERNELS: of each embedding


@pytest.fixture(scope='module')
def launches():
    return load_script(ROOT / 'benchmarks/launches.py')


@pytest.fixture
def backbone():
    return CrossFormer(
        dict(embed_dims=32, depths=(1, 3, 2), num_heads=(1, 2, 4), drop_path_rate=0.2),
        patch_sizes=(4, 8),
        merge_sizes=((2, 4), (2, 4)),
        group_size=(7, 7, 7),
        interval=(4, 2, 1),
        out_indices=(0, 1, 2),
        attention_path='fused',
    )


def test_inference_launches_eleven_kernels_a_block(launches, backbone):
    counts = launches.count(backbone, amp=False, training=False, size=(128, 192))
    # norm, qkv, bias, attention, proj, sum; norm, fc1, GELU, fc2, sum
    block, embedding = 11, KERNELS + 2  # convolutions, joined, norm
    assert sum(counts.values()) == BLOCKS * block + STAGES * (embedding + 1)  # an output each
    assert counts['forward_kernel'] == BLOCKS


def test_autocast_adds_six_casts_a_block(launches, backbone):
    counts = launches.count(backbone, amp=True, training=False, size=(128, 192))
    # a linear layer's weight and bias together; those of all convolutions of an embedding
    assert counts['_foreach_copy_'] == 4 * BLOCKS + STAGES
    # the norms' outputs; an embedding's input and output
    assert counts['_to_copy'] == 2 * BLOCKS + STAGES * 2


def test_training_in_mixed_precision_launches_no_more_than_it_did(launches, backbone):
    counts = launches.count(backbone, amp=True, training=True, size=(128, 192))
    assert counts['forward_kernel'] == counts['backward_kernel'] == BLOCKS
    assert counts['attention'] == counts['attention_backward'] == BLOCKS
    branches = 2 * BLOCKS - 2  # of blocks that drop some
    assert counts['rand'] == counts['addcmul'] == counts['mul'] == branches
    assert sum(counts.values()) <= 407
