"""Heads have as many classes as the data set, or an error or a warning gives both numbers."""

import logging
from types import SimpleNamespace

import pytest
from mmengine.registry import DefaultScope
from torch import nn

from crossformer_mm.engine.num_classes import check_number_of_classes
from crossformer_mm.errors import ConfigError


class Head(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes


def compare(scope: str, heads: dict, **meta):
    """Compare heads of these numbers of classes with a data set of four; return the warning."""
    metainfo = dict(classes=tuple('abcd'), **meta)
    runner = SimpleNamespace(
        model=nn.ModuleDict({name: Head(count) for name, count in heads.items()}),
        train_dataloader=SimpleNamespace(dataset=SimpleNamespace(metainfo=metainfo)),
        logger=logging.getLogger('mmengine'),
        default_scope=DefaultScope.get_instance(f'classes of {scope}', scope_name=scope),
    )
    return check_number_of_classes(runner, 'train')


@pytest.mark.parametrize(
    'scope, heads',
    [
        ('mmdet', dict(rpn_head=1, bbox_head=4)),  # of FCOS as a region proposal network
        ('mmdet', dict(bbox_head=256, language_model=4)),  # of GLIP: words
        ('mmseg', dict(decode_head=4, auxiliary_head=2)),  # of STDC: borders
    ],
)
def test_heads_may_tell_something_else_apart(scope, heads):
    assert compare(scope, heads) is None


def test_heads_of_a_panoptic_model_share_the_classes():
    assert compare('mmdet', dict(bbox_head=3, semantic_head=1), thing_classes=tuple('abc')) is None


@pytest.mark.parametrize('scope, head', [('mmdet', 'bbox_head'), ('mmseg', 'decode_head')])
def test_a_head_with_too_few_classes_is_named(scope, head):
    expected = f'^model.{head}.num_classes = 3 is too small for the 4 classes of the data set'
    with pytest.raises(ConfigError, match=expected):
        compare(scope, {head: 3})


@pytest.mark.parametrize(
    'scope, heads',
    [
        ('mmdet', dict(bbox_head=80)),
        ('mmdet', dict(bbox_head=80, mask_head=81)),
        ('mmseg', dict(decode_head=150)),
        ('mmseg', dict(decode_head=150, auxiliary_head=151)),
        ('mmseg', dict(decode_head=4, auxiliary_head=151)),
        ('mmpretrain', dict(head=1000)),
    ],
)
def test_heads_with_too_many_classes_are_named_with_both_numbers(scope, heads):
    said = compare(scope, heads)
    for name, count in heads.items():
        assert (f'model.{name}.num_classes = {count}' in said) == (count != 4)
    assert 'more than the 4 classes of the data set, a to d' in said
