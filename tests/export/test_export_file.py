"""Exports of any batch and size: crossformer_mm/export, and tools/export.py."""

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
from mmengine.registry import init_default_scope
from torch import nn

from crossformer_mm import CrossFormer
from crossformer_mm.compat import EXPORT, missing_torch

if missing_torch(EXPORT):
    pytest.skip(f'export: {missing_torch(EXPORT)}', allow_module_level=True)

from crossformer_mm import export  # noqa: E402
from crossformer_mm.export import AnySizePool, compare, export_any_size, export_file, exportable  # noqa: E402
from crossformer_mm.export.networks import Detector, Segmentor  # noqa: E402
from crossformer_mm.export.onnx_file import to_onnx  # noqa: E402

from ..helpers import (
    ONE_STAGE,
    ROOT,
    TINY_BACKBONE,
    TINY_MASK_RCNN,
    TINY_RETINANET,
    TINY_SEGMENTOR,
    add_noise,
    build_model,
    refusals,
    run_onnx,
)

needs_onnxscript = pytest.mark.skipif(not find_spec('onnxscript'), reason='onnxscript is missing')

# Odd sides, sides below every stride, batches; none is that of export_any_size.
SIZES = [(1, 97, 131), (2, 64, 96), (3, 17, 30), (1, 1, 5), (2, 40, 33)]


def assert_near(results, references):
    for result, reference in zip(results, references, strict=True):
        assert result.shape == reference.shape
        assert (result - reference).abs().max() <= 1e-4 * reference.abs().max()


@pytest.mark.parametrize(
    'options',
    [
        dict(lda='interval'),
        dict(lda='block'),
        dict(cooling=True, out_norm=True),
        dict(group_size=(14, 14, 7, 7), interval=(16, 8, 2, 1)),
        dict(qk_scale=0.5, qkv_bias=False),
        # groups of a tile that reaches far beyond the map have no member at all
        dict(lda='block', group_size=(2, 2, 2, 2), interval=(64, 8, 8, 8)),
        dict(lda='block', group_size=(9, 9, 9, 9), interval=(9, 9, 9, 9), position_bias='relative'),
        dict(lda='shifted', position_bias='dynamic_residual'),
        dict(lda='none', position_bias='absolute'),
    ],
)
def test_copy_for_export_is_the_same_function(small, options):
    backbone = small(**options)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    copy = exportable(backbone)
    with torch.no_grad():
        for batch, *sides in SIZES:
            image = torch.randn(batch, 3, *sides)
            assert_near(copy(image), backbone(image))
    assert type(backbone.layers[0].blocks[0].attn).__name__ == 'GroupAttention'
    assert all((value == before[key]).all() for key, value in backbone.state_dict().items())
    assert not copy.training


@pytest.mark.parametrize('out', [1, 3, (2, 6)])
def test_pooling_by_matrices_is_adaptive_pooling(out):
    pool = nn.AdaptiveAvgPool2d(out)
    other = exportable(nn.Sequential(pool))[0]
    assert type(other) is AnySizePool
    for sides in ((1, 1), (2, 5), (7, 6), (13, 20)):
        x = torch.randn(2, 3, *sides)
        assert_near([other(x)], [pool(x)])


@pytest.mark.parametrize(
    'options', [dict(lda='interval'), dict(lda='block'), dict(position_bias='relative')], ids=str
)
@needs_onnxscript
def test_one_export_serves_all_sizes(options):
    arch = dict(embed_dims=16, depths=(2,), num_heads=(2,))
    backbone = add_noise(CrossFormer(**{**ONE_STAGE, 'arch': arch}, **options).eval())
    backbone.requires_grad_(False)
    program = export_any_size(exportable(backbone, by_operators=True))
    proto = to_onnx(program, dict(image={0: 'batch', 2: 'height', 3: 'width'}), ['feature'], {})
    file = proto.SerializeToString()
    with torch.no_grad():
        for batch, *sides in SIZES:
            image = torch.randn(batch, 3, *sides)
            assert_near(run_onnx(file, image=image), backbone(image))


FPN = f'''
_base_ = {str(ROOT / 'configs/semantic_fpn/cf_s_80k.py')!r}
model = dict(
    {TINY_BACKBONE},
    neck=dict(in_channels=[16], out_channels=8, num_outs=2),
    decode_head=dict(in_channels=[8, 8], in_index=[0, 1], feature_strides=[4, 8], channels=8,
                     num_classes=5))
'''


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> Path:
        (tmp_path / 'config.py').write_text(text)
        return tmp_path / 'config.py'

    return write


def read_onnx(file: Path):
    """The inputs' sides and the metadata of a file."""
    import onnx

    proto = onnx.load(file)
    sides = [
        dim.dim_param or dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim
    ]
    return sides, {prop.key: prop.value for prop in proto.metadata_props}


@needs_onnxscript
def test_a_segmentor_as_onnx(output_of, config, tmp_path):
    file = config(TINY_SEGMENTOR)
    model = build_model(file)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'weights.pth')
    out = tmp_path / 'model.onnx'
    arguments = '--threads 1 --what head --shape 64 64 --out', out
    printed = output_of('export.py', file, tmp_path / 'weights.pth', *arguments)
    assert printed.count('relative difference') == 5 and 'Softmax 2' in printed
    assert f'{out.stat().st_size / 1e6:.1f} MB' in printed
    assert 'one image of 64 x 64, 1 thread: ONNX Runtime ' in printed
    assert [path.name for path in tmp_path.glob('*.onnx')] == ['model.onnx']  # and none aside

    image = torch.randn(2, 3, 50, 45)
    with torch.no_grad():
        expected = nn.functional.interpolate(model(image, mode='tensor'), (50, 45), mode='bilinear')
    assert_near(run_onnx(out, ['logits'], image=image), [expected])
    sides, described = read_onnx(out)
    assert sides == ['batch', 3, 'height', 'width']
    assert json.loads(described['mean']) == [123.675, 116.28, 103.53]
    assert described['input'].startswith('RGB images')


def test_a_label_map(config):
    init_default_scope('mmseg')
    module = Segmentor(build_model(config(FPN)), label_map=True)
    program = export_any_size(exportable(module, module.any_size, by_operators=True))
    with torch.no_grad():
        for batch, *sides in SIZES[:3]:
            image = torch.randn(batch, 3, *sides)
            labels = program.module()(image)
            assert labels['label_map'].shape == (batch, *sides)
            assert compare.difference(module, [image], labels) < 1e-5
            wrong = dict(label_map=(labels['label_map'] + 1) % 5)
            assert compare.difference(module, [image], wrong) > 1e-3


def test_a_one_stage_detector_as_a_torch_program(output_of, config, monkeypatch, tmp_path):
    file, out = config(TINY_RETINANET), tmp_path / 'model.pt2'
    read = cache(export_file.read_torch)  # which takes seconds
    monkeypatch.setattr(export_file, 'read_torch', read)
    printed = output_of('export.py', file, '--format torch-export --shape 64 64 --out', out)
    assert printed.count('relative difference') == 5 and out.stat().st_size > 1e5
    scores = read(out)(torch.randn(3, 3, 50, 45))
    assert list(scores) == ['cls_score_0', 'cls_score_1', 'bbox_pred_0', 'bbox_pred_1']
    assert scores['cls_score_0'].shape == (3, 9 * 4, 13, 12)


def test_a_two_stage_detector_gives_proposals_raw_and_the_neck(config):
    model = build_model(config(TINY_MASK_RCNN))
    module, image = Detector(model), torch.randn(1, 3, 50, 45)
    with torch.no_grad():
        outputs, features = module(image), model.extract_feat(image)
        scores, boxes = model.rpn_head(features)
    kinds = ('rpn_cls_score', 'rpn_bbox_pred', 'neck')
    assert list(outputs) == [f'{kind}_{level}' for kind in kinds for level in range(3)]
    assert_near(outputs.values(), [*scores, *boxes, *features])
    assert_near(exportable(module)(image).values(), outputs.values())


@pytest.mark.parametrize(
    'arguments, sentence',
    refusals("""
--out x.pt2 -> --out: 'x.pt2' must end in .onnx for --format onnx.
--out nowhere/x.onnx -> --out: folder 'nowhere' does not exist.
none.pth --format torch-export --out x.pt2 -> checkpoint: file 'none.pth' does not exist.
--out x.onnx --shape 0 9 -> --shape must be two numbers of at least 1, got 0 9.
--format torch-export --out x.pt2 --label-map --what backbone -> --label-map is for --what head of
--format torch-export --out x.pt2 --cfg-options model.backbone.lda=tiles -> 'none', got 'tiles'
"""),
)
def test_what_cannot_work_is_said_in_one_sentence(refusal_of, config, arguments, sentence):
    assert sentence in refusal_of('export.py', config(TINY_SEGMENTOR), arguments)


@pytest.mark.parametrize(
    'step, sentence',
    refusals("""
0.type=LoadImageFromNDArray -> must begin with LoadImageFromFile
0.type=LoadImageFromNpyFile -> must begin with LoadImageFromFile
0.type=LoadAnnotations -> must begin with LoadImageFromFile
1.type=LoadImageFromFile -> load annotations and pack, found LoadImageFromFile
0.color_type=unchanged -> got 'unchanged'
0.color_type=grayscale -> got 'grayscale'
0.imdecode_backend=pillow -> imdecode_backend must be 'cv2', by which
0.imdecode_backend=tifffile -> imdecode_backend must be 'cv2', by which
0.to_float32=True --input-type uint8 -> --input-type uint8: the test pipeline
0.to_float32=True --resize-inside -> images in 8 bits and no crop
"""),
)
@needs_onnxscript
def test_images_that_run_onnx_would_load_otherwise_are_refused(refusal_of, config, step, sentence):
    options = f'--out x.onnx --cfg-options test_dataloader.dataset.pipeline.{step}'
    assert sentence in refusal_of('export.py', config(TINY_SEGMENTOR), options)


@needs_onnxscript
def test_a_class_of_the_user_that_loads_images_is_refused(refusal_of, config):
    from mmcv.transforms import LoadImageFromFile
    from mmseg.registry import TRANSFORMS

    class Inverted(LoadImageFromFile):
        pass

    with mock.patch.dict(TRANSFORMS.module_dict, LoadImageFromFile=Inverted):
        said = refusal_of('export.py', config(TINY_SEGMENTOR), '--out x.onnx')
    assert 'must begin with the LoadImageFromFile of MMCV, found that of tests.' in said


@needs_onnxscript
@pytest.mark.parametrize('channels', [1, 4])
def test_images_of_other_channels_are_for_heads_and_backbones(
    output_of, refusal_of, config, tmp_path, channels
):
    options = f'--cfg-options model.backbone.in_channels={channels}'
    said = refusal_of('export.py', config(TINY_SEGMENTOR), '--out x.onnx', options)
    assert f'has in_channels={channels}; --what head or --what backbone' in said
    out, sizes = tmp_path / 'x.onnx', '--what backbone --shape 64 64 --fixed-shape 64 64'
    output_of('export.py', config(TINY_SEGMENTOR), '--out', out, sizes, options)
    sides, described = read_onnx(out)
    assert sides == [1, channels, 64, 64]
    assert described['input'].startswith(f'images (batch, {channels}, height, width), normalised')


def test_weights_that_a_file_cannot_hold_are_refused(refusal_of, config, monkeypatch, tmp_path):
    monkeypatch.setattr(export.build, 'MAX_BYTES', 1000)
    said = refusal_of('export.py', config(TINY_SEGMENTOR), '--out', tmp_path / 'x.onnx')
    assert "the model's weights take 0.0 GB" in said and 'at most 0.0 GB' in said
    assert not list(tmp_path.glob('*.onnx'))


def test_a_file_that_differs_is_not_left(output_of, refusal_of, config, monkeypatch, tmp_path):
    options = '--what backbone --format torch-export --out'
    arguments = config(TINY_SEGMENTOR), options, tmp_path / 'x.pt2'

    class Other(nn.Module):
        def forward(self, image):
            return dict(feature_0=image + 1)

    program = torch.export.export(Other(), (torch.randn(1, 3, 97, 131),))
    monkeypatch.setattr(export_file, 'export_any_size', lambda module, **_: program)
    monkeypatch.setattr(compare, 'difference', lambda *_: float('nan'))
    said = refusal_of('export.py', *arguments)
    assert all(part in said for part in (f"'{tmp_path / 'x.pt2'}'", 'nan', '97 x 131'))
    # What is not recognised, such as a size that the file refuses, keeps its traceback.
    monkeypatch.setattr(compare, 'difference', lambda *_: 0.0)
    said = output_of('export.py', *arguments, expect=1)
    assert 'AssertionError' in said or 'RuntimeError' in said
    assert not list(tmp_path.glob('*x*.pt2*'))
