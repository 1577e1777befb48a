"""Installing replaces no package of a user, and every way that the pages show installs this one."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from importlib.metadata import distribution, distributions
from pathlib import Path
from typing import Dict

import pytest

from crossformer_mm import __version__

from ..helpers import README, ROOT, blocks
from .builds import build_wheel, copy_of_the_project, pip

NO_KERNEL = dict(CROSSFORMER_MM_NO_EXTENSION='1')  # which takes long to compile


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp('wheel'), **NO_KERNEL)


def test_wheel_without_the_kernel_is_for_every_machine(wheel):
    assert wheel.name.endswith('-py3-none-any.whl')


@pytest.fixture(scope='module')
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('sdist')
    source = copy_of_the_project(folder / 'source')
    program = f'from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})'
    subprocess.run([sys.executable, '-c', program], cwd=source, check=True, capture_output=True)
    (archive,) = folder.glob('crossformer_mm-*.tar.gz')
    return archive


def test_sdist_is_complete_and_has_no_links(sdist):
    with tarfile.open(sdist) as archive:
        assert all(member.isfile() or member.isdir() for member in archive.getmembers())
        inside = {name.split('/', 1)[-1] for name in archive.getnames()}
    patterns = 'tests/**/*.py configs/**/*.py tools/* docs/*.md requirements/*.txt *.toml *.md '
    patterns += 'Makefile crossformer_mm/**/*.py crossformer_mm/**/*.cpp crossformer_mm/**/*.h'
    for pattern in patterns.split():
        there = {
            path.relative_to(ROOT).as_posix()
            for path in ROOT.glob(pattern)
            if path.is_file() and '.mim' not in path.parts
        }
        assert there and there <= inside
    assert not any('.mim' in name or name.endswith('.so') for name in inside)


def metadata_of(wheel: Path) -> Message:
    (found,) = distributions(path=[str(wheel)])
    return found.metadata


def test_metadata_lets_pip_replace_nothing(wheel):
    metadata = metadata_of(wheel)
    assert metadata['Version'] == __version__
    assert metadata['Requires-Python'] == '>=3.9'
    required = metadata.get_all('Requires-Dist')
    assert [line for line in required if 'extra ==' not in line] == ['einops>=0.6']
    extras = {}
    for line in required:
        match = re.fullmatch(r'([\w-]+)(\S*); extra == ["\'](.+)["\']', line)
        if match:
            extras.setdefault(match[3], {})[match[1]] = ','.join(sorted(match[2].split(',')))
    assert extras['openmmlab']['mmcv'] == '<2.2.0,>=2.1.0'
    # Of these every release is compiled against, or asks for, one other release of the rest.
    assert not {'torch', 'torchvision', 'triton', 'numpy', 'opencv-python'} & {
        name for needed in extras.values() for name in needed
    }
    assert not any(
        name.startswith('onedl-') != extra.startswith('onedl')
        for extra, needed in extras.items()
        for name in needed
        if 'mm' in name
    )


def versions(text: str) -> Dict[str, str]:
    return dict(requirement.split('==') for requirement in text.split())


OLD = versions(
    'torch==2.1.2 torchvision==0.16.2 triton==2.1.0 numpy==1.26.4 opencv-python==4.10.0.84 '
    'einops==0.8.0 ftfy==6.0 regex==2024.1.1'
)
FAMILIES = {
    'openmmlab': versions('mmengine==0.10.7 mmcv==2.1.0 mmdet==3.3.0 mmsegmentation==1.2.2'),
    'onedl': versions(
        'onedl-mmengine==0.10.12 onedl-mmcv==2.3.6 onedl-mmdetection==3.5.1 '
        'onedl-mmsegmentation==1.4.2'
    ),
}


def write_stub(folder: Path, name: str, version: str, *requires: str) -> None:
    """A wheel with a name, a version and requirements, and nothing in it."""
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = [('Metadata-Version', '2.1'), ('Name', name), ('Version', version)]
    metadata += [('Requires-Dist', package) for package in requires]
    tags = [('Wheel-Version', '1.0'), ('Root-Is-Purelib', 'true'), ('Tag', 'py3-none-any')]
    with zipfile.ZipFile(folder / f'{stem}-py3-none-any.whl', 'w') as file:
        for part, entries in (('METADATA', metadata), ('WHEEL', tags), ('RECORD', [])):
            text = ''.join(f'{key}: {value}\n' for key, value in entries)
            file.writestr(f'{stem}.dist-info/{part}', text)


@pytest.fixture(scope='module')
def stubs(tmp_path_factory) -> Dict[str, Path]:
    """Wheels of what users have, and an index of the newest of the same."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ('old', 'new')}
    for name, version in {**OLD, **FAMILIES['openmmlab'], **FAMILIES['onedl']}.items():
        write_stub(folders['old'], name, version)
        write_stub(folders['new'], name, '99.0')
    write_stub(folders['new'], 'timm', '99.0', 'torch', 'torchvision')
    return folders


@pytest.fixture(scope='module')
def users_environment(request, stubs, tmp_path_factory):
    """Packages of a user of a family: ``family, pip for them, what is installed``."""
    folder = tmp_path_factory.mktemp(request.param) / 'venv'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder], check=True)
    python = folder / ('Scripts' if os.name == 'nt' else 'bin') / 'python'

    def their_pip(*arguments) -> str:
        return pip('--python', python, *arguments, **NO_KERNEL)

    def installed() -> dict:
        packages = json.loads(their_pip('list --format json'))
        return {package['name']: package['version'] for package in packages}

    # What builds is that of this environment.
    (site,) = folder.rglob('site-packages')
    for top in {Path(str(file)).parts[0] for file in distribution('setuptools').files}:
        there = Path(distribution('setuptools').locate_file(top))
        if there.is_dir():
            shutil.copytree(there, site / top)
    packages = {**OLD, **FAMILIES[request.param]}.items()
    wanted = [f'{name}=={version}' for name, version in packages]
    their_pip('install --no-deps --find-links', stubs['old'], wanted)
    assert packages <= installed().items()
    return request.param, their_pip, installed


# Every kind of archive, with an extra and without; the extra of every family.
@pytest.mark.parametrize(
    'users_environment, kind, extra',
    [
        ('onedl', 'wheel', '[family]'),
        ('openmmlab', 'wheel', ''),
        ('openmmlab', 'wheel', '[timm]'),
        ('openmmlab', 'sdist', '[family]'),
        ('openmmlab', 'editable', ''),
    ],
    indirect=['users_environment'],
)
def test_pip_replaces_nothing(users_environment, kind, extra, stubs, wheel, sdist, tmp_path):
    family, their_pip, installed = users_environment
    what = {'wheel': wheel, 'sdist': sdist}.get(kind) or copy_of_the_project(tmp_path / 'source')
    what = f"{what}{extra.replace('family', family)}"
    editable = '--editable' if kind == 'editable' else ''
    their_pip('install --no-build-isolation --find-links', stubs['new'], editable, [what])
    assert installed()['crossformer-mm'] == __version__
    assert {**OLD, **FAMILIES[family]}.items() <= installed().items()
    their_pip('uninstall --yes crossformer-mm')


# What the pages tell a reader to type for this package: in a checkout, or with the file of one.
INSTALLED = {
    command.strip()
    for page in [README, *(ROOT / 'docs').glob('*.md')]
    for command in re.findall(r'pip install [^`#\n]*', page.read_text(encoding='utf-8'))
    if re.search(r"[ '\"]\.[\['\"/\s]|\.$|crossformer", command)
}


@pytest.fixture(scope='module')
def checkout(tmp_path_factory, sdist, wheel) -> Path:
    """A checkout with what was built of it where a reader has it."""
    source = copy_of_the_project(tmp_path_factory.mktemp('checkout') / 'source')
    (source / 'dist').mkdir()
    for archive in (sdist, wheel):
        shutil.copy(archive, source / 'dist')
    return source


def would_install(checkout: Path, *words) -> str:
    """Install in a checkout, without doing it, and return pip's output."""
    options = '--dry-run --ignore-installed --no-build-isolation'
    return pip('install', options, *words, folder=checkout, **NO_KERNEL)


@pytest.mark.parametrize('command', sorted(INSTALLED))
def test_install_lines_of_the_pages_work_in_a_checkout(checkout, command):
    said = would_install(checkout, '--no-deps', shlex.split(command)[2:])
    assert f'Would install crossformer-mm-{__version__}' in said.replace('_', '-')


# The ways to install that the README has, each a heading and its commands.
WAYS = [
    way.splitlines()
    for block in blocks(README, 'shell')
    for way in re.split(r'\n(?=# )', block)
    if way.startswith('# 1. into an existing') or re.match(r'# [234]\. .*(new env|backbone)', way)
]


@pytest.fixture(scope='module')
def index(tmp_path_factory) -> Path:
    """Empty wheels of what the ways to install ask for."""
    folder = tmp_path_factory.mktemp('index')
    wanted = {'torch==9', 'einops==9'}
    for name in ('torch.txt', 'run.txt'):
        text = (ROOT / 'requirements' / name).read_text()
        wanted |= set(re.findall('^[a-z][^ ;\n]*', text, re.MULTILINE))
    for requirement in wanted:
        write_stub(folder, *requirement.split('=='))
    return folder


def test_the_readme_has_four_ways_to_install():
    assert [way[0][:4] for way in WAYS] == ['# 1.', '# 2.', '# 3.', '# 4.']


@pytest.mark.parametrize('way', WAYS, ids=lambda way: way[0][2:3])
def test_each_way_of_the_readme_installs_the_package(way, checkout, index):
    new, requirements, commands = set(), [], [shlex.split(line, comments=True) for line in way[1:]]
    if commands[0][0] == 'make':
        assert way[1:] == ['make setup && source .venv/bin/activate']
        said = subprocess.run(
            ['make', '-n', '-B', 'setup', f'PYTHON={sys.executable}'],
            cwd=checkout, check=True, text=True, capture_output=True,
        ).stdout  # fmt: skip
        commands = [['pip', 'install', '-r', file] for file in re.findall(r'-r (\S+)', said)]
        assert re.search(r'\.venv/bin/python -m pip install .*--no-deps -e \.', said)
        commands.append(['pip', 'install', '--no-deps', '.'])
    for program, install, *words in commands:
        assert (program, install) == ('pip', 'install')
        said = would_install(checkout, '--find-links', index, words).split('Would install ')[1]
        new |= set(re.findall(r'(\S+?)-[\d.]+(?=\s)', said.replace('_', '-')))
        requirements += [word for word in words if word.endswith('.txt')]
    assert 'crossformer-mm' in new
    number, lists = way[0][2], ['requirements/torch.txt', 'requirements/run.txt']
    assert requirements == (lists if number in '23' else [])
    assert ({'torch', 'torchvision', 'onedl-mmcv', 'onedl-mmdetection'} <= new) == (number in '23')
    assert (new == {'torch', 'einops', 'crossformer-mm'}) == (number == '4')


def test_extras_of_the_pages_are_those_of_a_wheel_and_an_sdist(wheel, sdist):
    """pip says nothing of an extra that is not there where it looks for no requirements."""
    with tarfile.open(sdist) as archive:
        name = f'{sdist.name[: -len(".tar.gz")]}/PKG-INFO'
        info = message_from_bytes(archive.extractfile(name).read())
    lists = re.findall(r'\[([\w,-]+)\]', ' '.join(INSTALLED))
    named = {extra for extras in lists for extra in extras.split(',')}
    assert {'openmmlab', 'export'} <= named
    for metadata in (metadata_of(wheel), info):
        assert named <= set(metadata.get_all('Provides-Extra'))


def test_no_page_installs_the_package_from_an_index():
    texts = {
        path: path.read_text(encoding='utf-8')
        for folder in ('.', 'docs', 'tools', 'crossformer_mm', 'crossformer_mm/engine')
        for path in (*(ROOT / folder).glob('*.md'), *(ROOT / folder).glob('*.py'))
    }
    assert {'README.md', 'install.md', 'installed.py'} <= {path.name for path in texts}
    for path, text in texts.items():
        assert not re.search(r"pip install[^`\n]*[ '\"]crossformer[-_]mm", text), path
