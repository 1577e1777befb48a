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
from email.message import Message
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path
from typing import Dict

import pytest

from crossformer_mm import __version__

from ..helpers import ROOT, blocks
from .builds import PIP, build_wheel, copy_of_the_project

LIST = ('list', '--format', 'json')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    """Without the kernel, which takes long to compile."""
    return build_wheel(tmp_path_factory.mktemp('wheel'), CROSSFORMER_MM_NO_EXTENSION='1')


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
    for pattern in (
        'tests/**/*.py',
        'configs/**/*.py',
        'tools/*',
        'docs/*.md',
        'requirements/*.txt',
        'crossformer_mm/**/*.py',
        'crossformer_mm/**/*.cpp',
        'crossformer_mm/**/*.h',
        '*.toml',
        '*.md',
        'Makefile',
    ):
        missing = {
            path.relative_to(ROOT).as_posix()
            for path in ROOT.glob(pattern)
            if path.is_file() and '.mim' not in path.parts
        } - inside
        assert not missing
    assert not any('.mim' in name or name.endswith('.so') for name in inside)


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith('.dist-info/METADATA')]
        return Parser().parsestr(archive.read(name).decode())


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


OLD = {
    'torch': '2.1.2',
    'torchvision': '0.16.2',
    'triton': '2.1.0',
    'numpy': '1.26.4',
    'opencv-python': '4.10.0.84',
    'einops': '0.8.0',
    'ftfy': '6.0',
    'regex': '2024.1.1',
}
FAMILIES = {
    'openmmlab': {
        'mmengine': '0.10.7',
        'mmcv': '2.1.0',
        'mmdet': '3.3.0',
        'mmsegmentation': '1.2.2',
    },
    'onedl': {
        'onedl-mmengine': '0.10.12',
        'onedl-mmcv': '2.3.6',
        'onedl-mmdetection': '3.5.1',
        'onedl-mmsegmentation': '1.4.2',
    },
}


def write_stub(folder: Path, name: str, version: str, *requires: str) -> None:
    """A wheel with a name, a version and requirements, and nothing in it."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f'{stem}.dist-info'
    with zipfile.ZipFile(folder / f'{stem}-py3-none-any.whl', 'w') as file:
        file.writestr(
            f'{info}/METADATA',
            f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n'
            + ''.join(f'Requires-Dist: {package}\n' for package in requires),
        )
        file.writestr(
            f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n'
        )
        file.writestr(f'{info}/RECORD', '')


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
    """Packages of a user of a family, and a pip for them: ``family, pip``."""
    folder = tmp_path_factory.mktemp(request.param) / 'venv'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder], check=True)
    python = folder / ('Scripts' if os.name == 'nt' else 'bin') / 'python'
    # Not what pip is told here, by the machine, about indexes.
    environment = {name: value for name, value in os.environ.items() if not name.startswith('PIP_')}
    environment.update(
        PIP_CONFIG_FILE=os.devnull, PIP_NO_INDEX='1', CROSSFORMER_MM_NO_EXTENSION='1'
    )

    def pip(*arguments) -> str:
        return subprocess.run(
            [*PIP, '--python', python, *arguments],
            check=True,
            text=True,
            stdout=subprocess.PIPE,
            env=environment,
        ).stdout

    # What builds is that of this environment.
    (site,) = folder.rglob('site-packages')
    for top in {Path(str(file)).parts[0] for file in distribution('setuptools').files}:
        there = Path(distribution('setuptools').locate_file(top))
        if there.is_dir():
            shutil.copytree(there, site / top)
    packages = {**OLD, **FAMILIES[request.param]}.items()
    pip(
        'install',
        '--no-deps',
        '--find-links',
        stubs['old'],
        *(f'{name}=={version}' for name, version in packages),
    )
    assert packages <= {(there['name'], there['version']) for there in json.loads(pip(*LIST))}
    return request.param, pip


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
    family, pip = users_environment
    what = {'wheel': wheel, 'sdist': sdist}.get(kind) or copy_of_the_project(tmp_path / 'source')
    what = f"{what}{extra.replace('family', family)}"
    pip(
        'install',
        '--no-build-isolation',
        '--find-links',
        stubs['new'],
        *(['--editable'] if kind == 'editable' else []),
        what,
    )
    there = {package['name']: package['version'] for package in json.loads(pip(*LIST))}
    assert there.pop('crossformer-mm') == __version__
    assert {name: there[name] for name in (*OLD, *FAMILIES[family])} == {**OLD, **FAMILIES[family]}
    pip('uninstall', '--yes', 'crossformer-mm')


# What the pages tell a reader to type for this package: in a checkout, or with the file of one.
INSTALLED = sorted(
    {
        (page.name, command)
        for page in [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]
        for command in re.findall(r'pip install [^`#\n]*', page.read_text(encoding='utf-8'))
        if re.search(r"[ '\"]\.[\['\"/\s]|\.$|crossformer", command)
    }
)


@pytest.fixture(scope='module')
def checkout(tmp_path_factory, sdist, wheel) -> Path:
    """A checkout with what was built of it where a reader has it."""
    source = copy_of_the_project(tmp_path_factory.mktemp('checkout') / 'source')
    (source / 'dist').mkdir()
    for archive in (sdist, wheel):
        shutil.copy(archive, source / 'dist')
    return source


def would_install(checkout: Path, *words) -> str:
    """Install in a checkout without an index and return pip's output."""
    done = subprocess.run(
        [*PIP, 'install', '--dry-run', '--ignore-installed', '--no-index', *words],
        cwd=checkout,
        env={**os.environ, 'CROSSFORMER_MM_NO_EXTENSION': '1'},
        text=True,
        capture_output=True,
    )
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize('command', sorted({command.strip() for _, command in INSTALLED}))
def test_install_lines_of_the_pages_work_in_a_checkout(checkout, command):
    words = [word for word in shlex.split(command)[2:] if word != '--no-build-isolation']
    said = would_install(checkout, '--no-build-isolation', '--no-deps', *words)
    assert f'Would install crossformer-mm-{__version__}' in said.replace('_', '-')


# The ways to install that the README has, each a heading and its commands.
WAYS = [
    way.splitlines()
    for block in blocks(ROOT / 'README.md', 'shell')
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
        said = would_install(checkout, '--no-build-isolation', '--find-links', index, *words)
        new |= set(
            re.findall(r'(\S+?)-[\d.]+(?=\s)', said.split('Would install ')[1].replace('_', '-'))
        )
        requirements += [word for word in words if word.endswith('.txt')]
    assert 'crossformer-mm' in new
    number = way[0][2]
    assert requirements == (
        ['requirements/torch.txt', 'requirements/run.txt'] if number in '23' else []
    )
    assert ({'torch', 'torchvision', 'onedl-mmcv', 'onedl-mmdetection'} <= new) == (number in '23')
    assert (new == {'torch', 'einops', 'crossformer-mm'}) == (number == '4')


def test_extras_of_the_pages_are_those_of_a_wheel_and_an_sdist(wheel, sdist):
    """pip says nothing of an extra that is not there where it looks for no requirements."""
    with tarfile.open(sdist) as archive:
        name = f'{sdist.name[: -len(".tar.gz")]}/PKG-INFO'
        info = Parser().parsestr(archive.extractfile(name).read().decode())
    named = {
        extra
        for _, command in INSTALLED
        for extras in re.findall(r'\[([\w,-]+)\]', command)
        for extra in extras.split(',')
    }
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
