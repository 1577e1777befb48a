"""The page of tools/explain.py in a browser shows what the model computes."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from crossformer_mm import CrossFormer
from crossformer_mm.errors import UserError
from crossformer_mm.explain.capture import Capture, Scene, attention_map, capture
from crossformer_mm.explain.page import SCRIPTS, write_page
from crossformer_mm.grouping import stage_rules

from ..helpers import ROOT, add_noise
from . import chromium

HEIGHT, WIDTH = 90, 133  # maps of 23 x 34, 12 x 17, 6 x 9, 3 x 5 positions: ragged groups
ARCH = dict(embed_dims=32, depths=(2, 2, 1, 1), num_heads=(2, 4, 4, 4))
GROUPS = dict(group_size=(3, 3, 3, 7), interval=(4, 2, 2, 1))
KINDS = 'short', 'interval', 'block'
EXACT = 0.003  # of a weight; logits are rounded by 0.001 on average


NAME = '</script><b>photo</b>.png'


class Opened(NamedTuple):
    browser: chromium.Chromium
    backbone: nn.Module
    captured: Capture
    path: Path


@pytest.fixture(scope='module')
def make(tmp_path_factory):
    """Writes the page of a small backbone; returns what Opened has."""

    def build(limit=10_000_000, **options):
        torch.manual_seed(0)
        backbone = add_noise(CrossFormer(ARCH, **{**GROUPS, **options}).eval())
        picture = np.random.default_rng(0).random((HEIGHT, WIDTH, 3))
        captured = capture(backbone, torch.from_numpy(picture).float().permute(2, 0, 1)[None] * 4)
        scene = Scene(backbone, picture, captured, (60, 40), None)
        path = tmp_path_factory.mktemp('page') / 'page.html'
        names = dict(model='small', image=NAME, caption=['<i>toy</i>', '玩具'])
        written = write_page(path, scene, names, limit)
        return backbone, captured, path, written

    return build


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    program = chromium.find()
    if program is None:
        pytest.skip('no Chromium is installed to open the page in')
    started = chromium.Chromium(program, tmp_path_factory.mktemp('profile'))
    yield started
    started.close()


@pytest.fixture(scope='module')
def opened(make, browser):
    backbone, captured, path, _ = make()
    browser.size(1280, 900)
    browser.open(path)
    yield Opened(browser, backbone, captured, path)
    assert not browser.problems


@pytest.fixture
def page(opened):
    """Tests share the page and begin alike."""
    opened.browser.mouse('Moved', 1, 1)
    select(opened, stage=1, block=1, row=3, column=4, head=None, view='attention', held=False)
    ask(opened, 'image', 'focus()')
    return opened


def ask(page, element, expression):
    """The value of a property or a call of an element."""
    return page.browser.evaluate(f"document.getElementById('{element}').{expression}")


def select(page, **change):
    page.browser.evaluate(f'explain.select({json.dumps(change)})')
    page.browser.settle()


def state(page):
    return page.browser.evaluate('explain.state()')


def position(page):
    now = state(page)
    return now['row'], now['column']


def text(page, element):
    return ask(page, element, 'textContent')


def place_of(page, row, column):
    """A point of a position of the stage that is shown, in pixels of the window."""
    box = page.browser.evaluate(
        "(() => { const image = document.getElementById('image'); image.scrollIntoView({block: "
        "'center'}); const {left, top, width} = image.getBoundingClientRect(); "
        'return [left, top, width]; })()'
    )
    side = box[2] / WIDTH * (4 * 2 ** state(page)['stage'])
    # Not the middle: of the last row and column that may lie outside of the image.
    return box[0] + (column + 0.12) * side, box[1] + (row + 0.12) * side


def expected(page, stage, block, kind, position, head):
    """(H, W) weights by the functions that make the pictures; NaN outside of the group."""
    layer = page.backbone.layers[stage]
    attended = page.captured.blocks[stage][block]
    _, height, width, _ = attended.x.shape
    lda = layer.lda if kind == 'short' else kind
    both = stage_rules(height, width, layer.group_size, layer.interval, lda)
    rows, columns = both[int(kind != 'short')]
    attended = attended._replace(rows=rows, columns=columns)
    return attention_map(attended, layer.blocks[block].attn, position, head)


def shown(page, shape):
    """(H, W) weights as the page has them."""
    got = page.browser.evaluate('explain.attention()')
    weights = np.full(shape, np.nan)
    shares = np.reshape(got['weights'], (len(got['rows']), len(got['columns'])))
    weights[np.ix_(got['rows'], got['columns'])] = shares
    return weights


def check_shown(page):
    """Compare what is shown now, in numbers and in the text above the image, with Python."""
    now = state(page)
    shown_at = position(page)
    weights = expected(page, now['stage'], now['block'], now['kind'], shown_at, now['head'])
    np.testing.assert_allclose(shown(page, weights.shape), weights, rtol=0, atol=EXACT)
    said = text(page, 'readout')
    assert f"{np.isfinite(weights).sum()} positions" in said
    assert ('mean of all heads' if now['head'] is None else f"head {now['head']}") in said
    there, best = positions_in(said)
    assert there == shown_at
    assert weights[best] == pytest.approx(np.nanmax(weights), abs=EXACT)
    assert shares_in(said)[0] == pytest.approx(weights[best], abs=EXACT)
    return weights


def check_bias(page, size):
    """Compare the bias that is shown of groups of some size; return it."""
    now = state(page)
    pos = page.backbone.layers[now['stage']].blocks[now['block']].attn.pos
    with torch.no_grad():
        table = pos(size, size).numpy()
    table = table.mean(0) if now['head'] is None else table[now['head']]
    got = np.reshape(page.browser.evaluate('explain.bias()'), table.shape)
    np.testing.assert_allclose(got, table, rtol=0, atol=1e-4)
    return table


def positions_in(said: str) -> list:
    """The positions, row and column, that a sentence of the page names."""
    found = re.findall(r'row (\d+), column (\d+)', said.lower())
    return [(int(row), int(column)) for row, column in found]


def shares_in(said: str) -> list:
    return [float(share) / 100 for share in re.findall(r'([\d.e-]+)\s%', said)]


@pytest.mark.parametrize(
    'stage, block, kind, head, there',
    [
        (0, 0, 'short', None, (0, 0)),
        (0, 1, 'interval', 0, (22, 33)),  # the last row and column, in smaller groups
        (0, 1, 'block', 0, (13, 20)),
        (0, 0, 'interval', None, (11, 2)),  # groups that this block has not in the model
        (1, 1, 'interval', 3, (11, 16)),
        (1, 1, 'block', None, (7, 7)),
        (2, 0, 'short', 2, (5, 8)),
        (3, 0, 'block', 1, (2, 4)),  # a map of 3 x 5 is not larger than a group of 7
    ],
)
def test_pointing_shows_the_attention_that_python_computes(page, stage, block, kind, head, there):
    select(page, stage=stage, block=block, kind=kind, head=head)
    page.browser.mouse('Moved', *place_of(page, *there))
    assert position(page) == there
    check_shown(page)


def test_kinds_of_groups_differ_here(page):
    maps = [expected(page, 0, 1, kind, (13, 20), 0) for kind in KINDS]
    assert len({np.isfinite(found).tobytes() for found in maps}) == 3


def test_keys_move_the_position_and_choose_the_stage(page):
    steps = [
        ('ArrowDown', False, (4, 4)),
        ('ArrowRight', False, (4, 5)),
        ('ArrowUp', True, (2, 5)),  # by the interval of the groups
        ('ArrowLeft', True, (2, 3)),
        ('ArrowUp', True, (0, 3)),
        ('ArrowUp', False, (0, 3)),  # the map ends
        ('Home', False, (6, 8)),
    ]
    for key, shift, there in steps:
        page.browser.press(key, shift)
        assert position(page) == there, key
        check_shown(page)
    page.browser.press('1')
    assert (state(page)['stage'], position(page)) == (0, (13, 17))
    check_shown(page)


def test_a_held_position_lets_others_be_read(page):
    page.browser.click(*place_of(page, 5, 6))
    weights = check_shown(page)
    assert state(page)['held'] and positions_in(text(page, 'readout'))[0] == (5, 6)
    inside = tuple(np.argwhere(np.isfinite(weights))[3])
    page.browser.mouse('Moved', *place_of(page, *inside))
    said = text(page, 'probe')
    assert positions_in(said) == [inside]
    assert shares_in(said) == pytest.approx([weights[inside]], abs=EXACT)
    page.browser.mouse('Moved', *place_of(page, 6, 6))
    said = text(page, 'probe')
    assert positions_in(said) == [(6, 6)] and 'no weight' in said and not shares_in(said)
    assert position(page) == (5, 6)
    page.browser.click(*place_of(page, 6, 6))
    assert not state(page)['held'] and position(page) == (6, 6)


def test_controls_choose_what_is_shown(page):
    def click(expression):
        page.browser.evaluate(f'{expression}.click()')
        page.browser.evaluate('explain.select({})')

    select(page, stage=2)
    click("document.querySelector('#stages input[value=\"1\"]')")
    click("document.querySelector('#kinds input[value=block]')")
    click("document.querySelectorAll('#heads button')[2]")
    now = state(page)
    assert (now['stage'], now['kind'], now['head']) == (1, 'block', 1)
    check_shown(page)
    in_another_kind = text(page, 'note')
    page.browser.evaluate(
        "const box = document.getElementById('block'); box.value = 0; "
        "box.dispatchEvent(new Event('change'));"
    )
    page.browser.evaluate('explain.select({})')
    assert (state(page)['block'], state(page)['kind']) == (0, 'short')
    assert text(page, 'note') != in_another_kind  # says that groups are those of the model
    check_shown(page)


def middles(page):
    """(H, W, 3) the colours of the canvas in the middle of each position."""
    _, height, width, _ = page.captured.blocks[state(page)['stage']][0].x.shape
    stride = 4 * 2 ** state(page)['stage']
    pixels = page.browser.evaluate(
        "(() => { const canvas = document.getElementById('image'), out = []; "
        "const context = canvas.getContext('2d'), scale = canvas.width / "
        f'{WIDTH}; for (let r = 0; r < {height}; r++) for (let c = 0; c < {width}; c++) '
        f'{{ const x = Math.floor((c + 0.5) * {stride} * scale), '
        f'y = Math.floor((r + 0.5) * {stride} * scale); '
        'out.push(Array.from(context.getImageData(x, y, 1, 1).data.slice(0, 3))); } return out; })()'
    )
    # The last row and column lie half outside of the image.
    return np.array(pixels).reshape(height, width, 3)[:-1, :-1]


@pytest.mark.parametrize('kind', KINDS)
def test_groups_are_drawn_where_they_lie(page, kind):
    select(page, stage=0, block=1, kind=kind, view='groups', row=13, column=20)
    red, green, blue = np.moveaxis(middles(page), -1, 0)
    yellow = (red > 180) & (green > 175) & (blue < 100)
    weights = expected(page, 0, 1, kind, (13, 20), None)
    np.testing.assert_array_equal(yellow, np.isfinite(weights)[:-1, :-1])


def test_bright_positions_are_those_of_large_weight(page):
    select(page, stage=1, block=1, row=4, column=6, head=1)
    weights = expected(page, 1, 1, 'interval', (4, 6), 1)[:-1, :-1]
    brightness = middles(page).sum(-1)
    order = np.argsort(np.where(np.isfinite(weights), weights, -1).ravel())[::-1][:4]
    assert (np.diff(brightness.ravel()[order]) <= 3).all()
    assert brightness.ravel()[order[0]] > 550


def test_heads_are_maps_of_square_positions_on_one_scale(page):
    select(page, stage=0, block=1, row=13, column=20)
    heads = page.browser.evaluate(
        "Array.from(document.querySelectorAll('#heads canvas')).map((canvas) => [canvas.width, "
        "canvas.height, canvas.clientWidth, canvas.clientHeight, Array.from(canvas.getContext('2d')"
        '.getImageData(0, 0, canvas.width, canvas.height).data)])'
    )
    maps = [
        expected(page, 0, 1, 'interval', (13, 20), head) for head in (None, *range(len(heads) - 1))
    ]
    scale = np.nanmax(maps)
    for (width, height, shown_width, shown_height, pixels), weights in zip(heads, maps):
        assert shown_width / shown_height == pytest.approx(width / height, rel=0.05)
        brightness = np.reshape(pixels, (-1, 4))[:, :3].sum(1)
        # The largest weight of all heads has the brightest colour, 0xfcffa4.
        assert (brightness.max() > 660) == (np.nanmax(weights) > 0.99 * scale)


def test_positions_outside_the_group_are_grey_and_never_black(page):
    select(page, stage=1, block=1, row=4, column=6)
    colours = middles(page)
    inside = np.isfinite(expected(page, 1, 1, 'interval', (4, 6), None))[:-1, :-1]
    assert (np.ptp(colours[~inside], axis=-1) == 0).all() and colours[~inside].min() >= 128


@pytest.mark.parametrize('stage, block, head', [(0, 1, 0), (1, 0, None), (1, 1, 3)])
def test_bias_is_that_of_the_network_for_any_group(page, stage, block, head):
    select(page, stage=stage, block=block, head=head, size=3)
    ask(page, 'size', 'focus()')
    for size in (4, 5):
        page.browser.press('ArrowRight')
        assert text(page, 'size-shown') == f'{size} × {size}'
        table = check_bias(page, size)
    ask(page, 'surface', 'focus()')
    select(page, offset=[0, 0])
    for key in ('ArrowDown', 'ArrowRight', 'ArrowRight'):
        page.browser.press(key, shift=True)
    said = re.match(r'A key 1 row above and 2 columns left: ([+−])([\d.]+),', text(page, 'offset'))
    value = float(said[2]) * (1 if said[1] == '+' else -1)
    assert value == pytest.approx(table[size - 1 + 1, size - 1 + 2], abs=6e-4)


def test_the_surface_turns(page):
    before = ask(page, 'surface', 'toDataURL()')
    ask(page, 'surface', 'focus()')
    page.browser.press('ArrowLeft')
    after = ask(page, 'surface', 'toDataURL()')
    assert state(page)['yaw'] == pytest.approx(-0.48) and before != after


def test_features_are_those_of_the_stage(page):
    select(page, stage=1, view='features', feature='magnitude', row=7, column=9)
    strength = page.captured.features[1].square().mean(0).sqrt().numpy()
    here = float(text(page, 'legend-unit').split('here ')[1])
    assert here == pytest.approx(strength[7, 9], abs=float(np.ptp(strength)) / 255 + 0.005)
    assert float(text(page, 'legend-low')) == pytest.approx(strength.min(), rel=0.01)
    assert float(text(page, 'legend-high')) == pytest.approx(strength.max(), rel=0.01)


def test_the_page_is_whole_in_itself(page):
    loaded = page.browser.evaluate("performance.getEntriesByType('resource').map((r) => r.name)")
    assert all(name.startswith('data:') for name in loaded)
    content = page.path.read_text(encoding='utf-8')
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import|fetch\(', content)
    assert content.count('<b>photo') == 0  # names are text, whatever is in them
    assert NAME in text(page, 'about')
    assert text(page, 'caption') == '<i>toy</i>'
    assert page.browser.evaluate('document.title').endswith(NAME)


def test_the_page_is_in_english_and_in_chinese(page):
    def visible() -> str:
        return page.browser.evaluate('document.body.innerText')

    select(page, view='attention')
    assert not re.search('[\u4e00-\u9fff]', visible().replace('中文', ''))
    ask(page, 'language', 'click()')
    page.browser.settle()
    try:
        assert text(page, 'caption') == '玩具'
        for view in ('attention', 'groups', 'features'):
            for feature in ('colours', 'magnitude'):
                select(page, view=view, feature=feature, size=4, held=view == 'groups')
                left = re.findall('[A-Za-z]{3,}', visible())
                assert set(left) <= {
                    *('CrossFormer', 'English', 'photo', 'script', 'png', 'small', 'PCA', 'RGB'),
                    *('interval', 'block', 'logit', 'Shift', 'Home', 'Enter'),
                }, view
    finally:
        select(page, language='en', feature='colours', held=False)


def test_a_phone_has_room_for_it_and_a_finger_chooses(page):
    page.browser.size(360, 740, mobile=True)
    try:
        assert page.browser.evaluate('document.documentElement.scrollWidth') <= 360
        page.browser.touch(place_of(page, 8, 11))
        assert position(page) == (8, 11)
        check_shown(page)
        page.browser.touch(*(place_of(page, 4, column) for column in (2, 5, 9)))
        assert position(page) == (4, 9)
        check_shown(page)
        small = page.browser.evaluate(
            "Array.from(document.querySelectorAll('#look .choice label')).map((label) => "
            'label.getBoundingClientRect()).filter((box) => box.width < 32 || box.height < 32).length'
        )
        assert small == 0
    finally:
        page.browser.size(1280, 900)


@pytest.mark.parametrize(
    'options',
    [
        dict(position_bias='dynamic_residual', lda='block'),
        dict(position_bias='relative', lda='shifted'),
        dict(position_bias='none', qkv_bias=False, lda='none'),
    ],
)
def test_other_backbones(make, browser, options):
    backbone, captured, path, _ = make(**options)
    browser.size(1280, 900)
    browser.open(path, '#language=zh&stage=2&head=3&view=groups&row=5&column=999')  # of 17
    opened = Opened(browser, backbone, captured, path)
    now = state(opened)
    assert (now['stage'], now['head'], now['view'], now['row']) == (1, 3, 'groups', 5)
    assert now['column'] == 60 // 8 and now['language'] == 'zh'
    select(opened, language='en')
    for kind in browser.evaluate('Object.keys(document.querySelectorAll("#kinds input"))'):
        browser.evaluate(f'document.querySelectorAll("#kinds input")[{kind}].click()')
        select(opened, row=5, column=8, head=1)
        check_shown(opened)
    select(opened, size=5)
    check_bias(opened, 5)
    assert not browser.problems


def test_the_demo_among_the_docs_works_and_is_small(browser):
    path = ROOT / 'docs/explain_demo.html'
    assert path.stat().st_size < 3_000_000
    assert '--html docs/explain_demo.html' in (ROOT / 'docs/how_it_works.md').read_text('utf-8')
    browser.size(1280, 900)
    browser.open(path)
    assert 'Toy model' in browser.evaluate("document.getElementById('caption').textContent")
    found = browser.evaluate('explain.attention()')
    weights = np.reshape(found['weights'], (len(found['rows']), -1))
    rows = np.array(found['rows'])
    # The upper disk is in rows 4 to 8, the lower one in rows 9 to 15.
    assert weights[rows <= 8].sum() > 0.2 and weights[rows > 8].sum() > 0.2
    bottom = browser.evaluate("document.getElementById('image').getBoundingClientRect().bottom")
    answer = browser.evaluate("document.getElementById('readout').getBoundingClientRect().bottom")
    assert answer < bottom < 900
    assert not browser.problems


def test_the_demo_among_the_docs_has_the_code_of_today():
    """Comments may differ; otherwise, docs/how_it_works.md has the command that writes the demo."""

    def bare(code: str) -> str:
        return re.sub(r'/\*.*?\*/|(?<!\S)//[^\n]*|\s', '', code, flags=re.DOTALL)

    demo = bare((ROOT / 'docs/explain_demo.html').read_text(encoding='utf-8'))
    folder = ROOT / 'crossformer_mm/explain'
    for name in ('page.html', 'page.css', *SCRIPTS):
        code = (folder / name).read_text(encoding='utf-8')
        for part in re.split(r'<!-- \w+ -->|/\* (?:style|script) \*/', code):
            assert bare(part) in demo, name


def test_a_smaller_page_is_less_exact_and_says_so(make):
    _, _, _, exact = make()
    _, _, path, rough = make(limit=exact.bytes - 60_000)
    assert path.stat().st_size == rough.bytes <= exact.bytes - 60_000
    assert rough.worst > exact.worst and rough.usual > 2 * exact.usual
    assert exact.usual < 1.5 * exact.error == 0.0015
    known = re.search(r'id="facts">(.*?)</script>', path.read_text(encoding='utf-8'))
    assert json.loads(known[1])['worst'] == rough.worst
    with pytest.raises(UserError, match='the page takes more, however'):
        make(limit=100_000)
