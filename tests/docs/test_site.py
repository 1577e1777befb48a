"""The pages that the documentation site is made of; `make docs` builds it, and a warning is an error."""

import re
from pathlib import Path

import pytest

from ..helpers import ROOT, load_script

NAV = (ROOT / 'mkdocs.yml').read_text(encoding='utf-8').split('\nnav:\n')[1].split('\n\n')[0]


@pytest.fixture(scope='module')
def pages(tmp_path_factory) -> Path:
    build = load_script(ROOT / 'docs/site/build.py')
    build.PAGES = tmp_path_factory.mktemp('pages')
    done = set()
    for file in [*(ROOT / name for name in build.TOP), *(ROOT / 'docs').glob('*.md')]:
        build.gather(file, done)  # ends the program where a link leads nowhere
    build.write_reference()
    return build.PAGES


def test_every_page_is_in_the_navigation_and_there(pages):
    listed = set(re.findall(r': (\S+\.md)$', NAV, re.MULTILINE))
    written = {
        *(path.name for path in (ROOT / 'docs').glob('*.md') if not path.name.endswith('.zh.md')),
        *('index.md', 'CONTRIBUTING.md', 'CHANGELOG.md'),
        *(f'api/{path.name}' for path in (pages / 'api').iterdir()),
    }
    assert listed == written
    assert all((pages / name).is_file() for name in listed)


def test_links_lead_to_pages_and_pictures_of_the_site(pages):
    for page in pages.rglob('*.md'):
        text = re.sub(r'^```.*?^```$', '', page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r'\]\(([^)#\s]+)', text):
            if '://' not in target:
                path = (page.parent / target).resolve()
                assert path.is_file() and pages.resolve() in path.parents, f'{page}: {target}'


def test_the_reference_names_modules_that_are_there(pages):
    for page in (pages / 'api').iterdir():
        modules = re.findall(r'^::: (crossformer_mm\.\S+)$', page.read_text(), re.MULTILINE)
        assert modules, page
        for name in modules:
            path = ROOT / re.sub(r'\.[A-Z]\w*$', '', name).replace('.', '/')
            assert path.with_suffix('.py').is_file() or (path / '__init__.py').is_file(), name


def test_a_config_is_a_page_with_its_code(pages):
    text = (pages / 'configs/mask_rcnn/cf_s_1x.md').read_text()
    assert (ROOT / 'configs/mask_rcnn/cf_s_1x.py').read_text() in text


def test_a_link_that_leads_nowhere_ends_the_build(tmp_path):
    build = load_script(ROOT / 'docs/site/build.py')
    build.ROOT = build.PAGES = tmp_path
    (tmp_path / 'page.md').write_text('[there](nowhere.md)')
    with pytest.raises(SystemExit, match="page.md links to 'nowhere.md', which does not exist"):
        build.gather(tmp_path / 'page.md', set())
