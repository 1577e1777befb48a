"""Pictures of a CrossFormer show what the backbone computes and what grouping.py defines."""

import re

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from crossformer_mm.errors import UserError
from crossformer_mm.explain.capture import (
    Scene,
    attention_map,
    attention_weights,
    capture,
    principal_colours,
)
from crossformer_mm.explain.figures import (
    HIGHLIGHT,
    PICTURES,
    bias_table,
    group_colours,
    group_numbers,
    kernel_shares,
)
from crossformer_mm.explain.image import load_image, normalize
from crossformer_mm.grouping import stage_rules

from ..helpers import ROOT, refusals

ARCH = dict(embed_dims=32, depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8))


def captured_of(backbone, sides=(90, 133)):
    return capture(backbone, torch.randn(1, 3, *sides))


@pytest.mark.parametrize('lda', ['interval', 'block'])
def test_recomputed_attention_is_what_the_blocks_return(small, lda):
    backbone = small(ARCH, lda=lda)
    captured, checked = captured_of(backbone), 0
    for stage, layer in enumerate(backbone.layers):
        for block in (captured.short[stage], captured.long[stage]):
            if block is None:
                continue
            attention = layer.blocks[block.block].attn
            _, height, width, channels = block.out.shape
            for token in (0, height * width // 2, height * width - 1):  # ragged groups at the end
                found = attention_weights(attention, block, token)
                assert (found.weights.sum(-1) - 1).abs().max() < 1e-5
                out = torch.einsum('hn,hnd->hd', found.weights, found.values).flatten()
                expected = block.out.reshape(-1, channels)[token]
                with torch.no_grad():
                    assert (attention.proj(out) - expected).abs().max() < 1e-4
                checked += 1
    assert checked == 3 * (4 + 2)
    assert [block and block.block for block in captured.long] == [None, 1, 1, None]


def test_attention_map_shows_one_head_or_their_mean_inside_the_group_alone(small):
    backbone = small(ARCH)
    block = captured_of(backbone).long[2]
    attention = backbone.layers[2].blocks[block.block].attn
    each = [attention_map(block, attention, (2, 3), head) for head in range(4)]
    mean = attention_map(block, attention, (2, 3), None)
    assert np.nansum(each[1]) == pytest.approx(1, abs=1e-5)
    assert np.allclose(np.mean(each, axis=0), mean, equal_nan=True)
    inside = np.zeros(mean.shape, bool)
    # 6 x 9 positions are no more than 7 on one side: short distance, in groups of 6 x 6
    inside[:6, :6] = True
    assert (~np.isnan(mean) == inside).all()


@pytest.mark.parametrize('kind', ['short', 'interval', 'block'])
@pytest.mark.parametrize('position', [(0, 0), (9, 20), (17, 29)])
def test_colours_are_those_of_the_groups(kind, position):
    height, width, size, interval = 18, 30, 4, 3
    lda = 'interval' if kind == 'short' else kind
    rules = stage_rules(height, width, size, interval, lda)[int(kind != 'short')]
    tile = size * interval

    def group(row, column):  # the definitions of the papers, position by position
        if kind == 'short':
            return row // size, column // size
        apart = row % interval, column % interval
        return apart if kind == 'interval' else (row // tile, column // tile, *apart)

    colours = group_colours(height, width, rules, position)
    numbers = group_numbers(height, width, rules)
    groups = {}
    for row, column in np.ndindex(height, width):
        groups.setdefault(group(row, column), set()).add((row, column))
        same = group(row, column) == group(*position)
        assert (tuple(colours[row, column, :3]) == HIGHLIGHT[0]) == same
        assert (numbers[row, column] == numbers[position]) == same
    for members in groups.values():
        assert len({tuple(colours[member]) for member in members}) == 1
    assert len({tuple(colour) for colour in colours.reshape(-1, 4)}) == 5  # four groups, the rest


def test_bias_tables_are_the_outputs_of_the_network_offset_by_offset(small):
    backbone = small(ARCH)
    scene = Scene(backbone, np.zeros((90, 133, 3)), captured_of(backbone), (60, 40), None)
    surface = bias_table(scene, 1, 7)
    pos = backbone.layers[1].blocks[1].attn.pos
    assert surface.shape == (2, 13, 13)
    with torch.no_grad():
        for offset in ((0, 0), (-6, 6), (3, -2)):
            value = pos.pos3(pos.pos2(pos.pos1(pos.pos_proj(torch.tensor(offset).float()))))
            assert np.allclose(surface[:, offset[0] + 6, offset[1] + 6], value, atol=1e-5)


def test_shares_of_kernels():
    convs = [torch.nn.Conv2d(3, channels, kernel) for channels, kernel in ((4, 2), (2, 4))]
    embedding = torch.zeros(2, 2, 6)
    embedding[0, 0, 0], embedding[0, 0, 4] = 2, 4  # variances in the ratio 1 : 4
    embedding[..., 5] = 7  # a constant carries nothing
    shares = kernel_shares(convs, embedding)
    assert list(shares) == [2, 4]
    assert shares[2] == pytest.approx((2 / 3, 0.2)) and shares[4] == pytest.approx((1 / 3, 0.8))


def test_main_directions_as_colours():
    feature = torch.zeros(5, 3, 4)
    feature[2] = torch.arange(12.0).view(3, 4)
    shown = principal_colours(feature)
    assert shown.shape == (3, 4, 3) and shown.min() >= 0 and shown.max() <= 1
    assert (np.diff(shown[..., 0].ravel()) > 0)[1:-1].all()  # the only direction is red
    assert principal_colours(torch.randn(5, 1, 1)).shape == (1, 1, 3)


REFUSED = '''
CONFIG WEIGHTS IMAGE -> nothing to write: name a folder by --out, or a file by --html.
CONFIG WEIGHTS IMAGE --html OUT -> --html:
CONFIG WEIGHTS IMAGE --html /proc/none/page.html -> --html: '/proc/none' cannot be written:
CONFIG WEIGHTS IMAGE --out OUT --max-mb 3 -> --max-mb is of the page that --html writes.
CONFIG WEIGHTS IMAGE --out OUT --caption a -> --caption is of the page that --html writes.
CONFIG WEIGHTS IMAGE --html OUT/a --caption a b c -> --caption takes one or two texts, got 3.
CONFIG WEIGHTS IMAGE --html OUT/a --max-mb 0 -> --max-mb must be above 0, got 0.0.
CONFIG WEIGHTS IMAGE --html OUT/a --max-mb 0.01 --scale 60 60 -> --max-mb: the page takes more,
CONFIG WEIGHTS IMAGE --out OUT --position 70 0 -> --position must lie in the image, which is 70 wide and 50 high, got 70 0.
CONFIG WEIGHTS IMAGE --out OUT --head 2 -> --head must be from 0 to 1, got 2.
CONFIG WEIGHTS IMAGE --out OUT --scale 0 9 -> --scale must be two numbers of at least 1, got 0 9.
CONFIG WEIGHTS CONFIG --out OUT -> could not be read as an image.
CONFIG WEIGHTS none.png --out OUT -> image: file 'none.png' does not exist.
CONFIG IMAGE IMAGE --out OUT -> no file of plain weights
CONFIG WEIGHTS IMAGE --out OUT --cfg-options model.backbone.type=mmdet.ResNet -> has the backbone ResNet, no CrossFormer.
'''


class TestTool:
    @pytest.fixture
    def write(self, small, tmp_path):
        """Writes config, weights and image of a model for images of some channels."""

        def write(channels: int = 3, settings: str = '') -> tuple:
            files = [tmp_path / name for name in ('config.py', 'weights.pth', 'image.png')]
            arch = dict(embed_dims=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 2))
            torch.save(small(arch, in_channels=channels).state_dict(), files[1])
            files[0].write_text(f'''
_base_ = {str(ROOT / 'configs/retinanet/cf_s_1x.py')!r}
model = dict(backbone=dict(
    arch=dict(_delete_=True, **{arch!r}), out_indices=(0, 1, 2, 3), in_channels={channels}))
{settings}''')
            image = np.random.default_rng(0).integers(0, 256, (50, 70, channels), dtype=np.uint8)
            cv2.imwrite(str(files[2]), image)
            return *files, image

        return write

    @pytest.fixture
    def model(self, write):
        return write()[:3]

    @pytest.mark.parametrize('channels, kind', [(1, 'grayscale'), (4, 'unchanged')])
    def test_images_of_other_channels(self, write, output_of, tmp_path, channels, kind):
        """Images are loaded as the test pipeline and normalised as the preprocessor does."""
        settings = f'''
model['data_preprocessor'] = dict(
    _delete_=True, type='DetDataPreprocessor', mean=[9.], std=[5.])
test_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile', color_type={kind!r}),
    dict(type='Resize', scale=(70, 50), keep_ratio=True)]))
'''
        *model, image = write(channels, settings)
        page = tmp_path / 'page.html'
        output_of('explain.py', *model, '--html', page)
        assert page.stat().st_size > 1e4
        cfg = Config.fromfile(model[0])
        loading = cfg.test_dataloader.dataset.pipeline[0]
        found, scale = load_image(str(model[2]), loading, None, channels)
        assert scale == 1 and (found == image).all()
        given = normalize(found, cfg.model.data_preprocessor)
        wanted = torch.from_numpy(image.transpose(2, 0, 1).copy())
        assert torch.allclose(given[0], (wanted.float() - 9) / 5)

    def test_an_image_of_fewer_channels_than_the_model_takes(self, model):
        with pytest.raises(UserError, match=r'has 3 channels as the config.*the model takes 4\.'):
            load_image(str(model[2]), None, None, 4)

    def test_one_command_writes_all_pictures(self, model, output_of, tmp_path):
        options = '--scale 120 120 --position 69 0 --head 1'
        output_of('explain.py', *model, '--out', tmp_path / 'new/pictures', options)
        files = (tmp_path / 'new/pictures').glob('*.png')
        pictures = {path.stem: cv2.imread(str(path)) for path in files}
        assert set(pictures) == {name for name, *_ in PICTURES} | {'contact_sheet'}
        for picture in pictures.values():
            assert picture.std() > 10  # something is drawn

    def test_one_command_writes_a_page(self, model, output_of, tmp_path):
        page = tmp_path / 'new' / 'page.html'
        said = output_of('explain.py', *model, '--html', page, '--scale 120 120')
        content = page.read_text(encoding='utf-8')
        assert content.startswith('<!doctype html>') and 'id="block-1-1"' in content
        size = re.search(r'page.html: ([\d.]+) MB; its attention weights are off by', said)
        assert float(size[1]) == pytest.approx(page.stat().st_size / 1e6, abs=0.01)
        assert not list(page.parent.glob('*.png'))

    @pytest.mark.parametrize('command, said', refusals(REFUSED))
    def test_what_cannot_work_is_said_in_one_sentence(
        self, model, refusal_of, tmp_path, command, said
    ):
        (tmp_path / 'out').mkdir()
        names = dict(zip(('CONFIG', 'WEIGHTS', 'IMAGE'), map(str, model)), OUT=f'{tmp_path}/out')
        words = [re.sub('CONFIG|WEIGHTS|IMAGE|OUT', lambda m: names[m[0]], command)]
        assert said in refusal_of('explain.py', *words)
        assert not list((tmp_path / 'out').iterdir())


def test_pictures_of_the_page_on_how_it_works_are_there_and_small():
    page = (ROOT / 'docs/how_it_works.md').read_text(encoding='utf-8')
    shown = set(re.findall(r'\((pictures/.*?)\)', page))
    assert shown == {f'pictures/{name}.png' for name, *_ in PICTURES if name != 'position_bias'}
    for picture in shown:
        assert (ROOT / 'docs' / picture).stat().st_size < 400_000
