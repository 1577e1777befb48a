"""Importing the package names a missing or too old requirement in one message."""

import importlib.util
import re
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest

from crossformer_mm import installed
from crossformer_mm.installed import OLDEST, check_installed, installed_family, numbers

from .helpers import ROOT, run_python

COMMANDS = {
    'onedl-': "pip install --no-build-isolation 'onedl-mmengine>=0.10.12' 'onedl-mmcv>=2.3.6'",
    '': "pip install openmim && mim install mmengine 'mmcv>=2.1.0,<2.2.0'",
}


@pytest.fixture
def environment(monkeypatch):
    """Sets what is installed: versions of import packages, and names of distributions."""

    def set_to(versions: dict, distributions: tuple) -> None:
        def distribution(name):
            if name not in distributions:
                raise PackageNotFoundError(name)

        monkeypatch.setattr(installed, 'distribution', distribution)
        monkeypatch.setattr(importlib.util, 'find_spec', versions.get)
        monkeypatch.setattr(
            importlib, 'import_module', lambda name: SimpleNamespace(__version__=versions[name])
        )

    return set_to


def test_versions_are_compared_as_numbers():
    assert numbers('2.10.0a0+git1') > numbers('2.9.1') > numbers('2.1.2+cu121') >= (2, 1)
    assert numbers('2.13.0rc1') == (2, 13)


def test_all_is_there(environment):
    environment(dict(torch='2.1.2+cu121', mmengine='0.10.7', mmcv='2.1.0', einops='0.8.2'), ())
    check_installed()


@pytest.mark.parametrize('package', OLDEST)
@pytest.mark.parametrize('version', [None, '0.5.0'])
@pytest.mark.parametrize('family', ['onedl-', '', None])
def test_one_sentence_says_what_to_install(environment, package, version, family):
    versions = {**dict.fromkeys(OLDEST, '9.9.9'), package: version}
    there = {name: value for name, value in versions.items() if value}
    environment(there, () if family is None else (f'{family}mmengine',))
    with pytest.raises(ImportError) as error:
        check_installed()
    said = str(error.value)
    assert f'{package} {OLDEST[package]}' in said and (version or 'not installed') in said
    assert said.endswith('.') and '\n' not in said
    if package in ('mmengine', 'mmcv'):
        assert [command in said for command in COMMANDS.values()] == [
            family in (name, None) for name in COMMANDS
        ]
    else:
        assert ('pip install einops' if package == 'einops' else 'pytorch.org') in said


def test_what_to_install_are_the_extras():
    project = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    for command in COMMANDS.values():
        for requirement in re.findall("'(.+?)'", command):
            assert f'"{requirement}"' in project
    assert f'dependencies = ["einops>={OLDEST["einops"]}"]' in project
    for name, least in re.findall(r'"(?:onedl-)?(mmengine|mmcv)>=([\d.]+)', project):
        assert numbers(least) >= numbers(OLDEST[name])


def test_family_of_this_environment():
    family = installed_family()
    assert family in COMMANDS
    import mmcv

    assert numbers(mmcv.__version__) >= ((2, 3) if family else (2, 0))


def test_import_ends_in_the_sentence():
    program = (
        'import sys, importlib.util\nfind = importlib.util.find_spec\n'
        "importlib.util.find_spec = lambda name: None if name == 'mmcv' else find(name)\n"
        'import crossformer_mm'
    )
    last = run_python('-c', program).stderr.strip().splitlines()[-1]
    assert last.startswith('ImportError: crossformer_mm needs mmcv 2.0 or newer, which is not ')
    assert 'installed: pip install ' in last


def test_a_package_that_a_finder_blocks_is_not_installed(monkeypatch):
    def find_spec(name, path=None, target=None):
        if name == 'mmengine':
            raise ModuleNotFoundError(name)

    monkeypatch.delitem(sys.modules, 'mmengine')
    assert installed.is_installed('mmengine')
    monkeypatch.setattr(sys, 'meta_path', [SimpleNamespace(find_spec=find_spec), *sys.meta_path])
    assert not installed.is_installed('mmengine')


def test_package_and_tools_work_without_docstrings():
    """python -OO drops them, as frozen and minimal installations do."""
    program = (
        'import runpy, sys, crossformer_mm.engine.runner\n'
        'for tool in ("demo", "make_shapes"):\n'
        '    sys.argv = [tool, "--help"]\n'
        '    try: runpy.run_path(f"tools/{tool}.py", run_name="__main__")\n'
        '    except SystemExit as end: print(end.code)\n'
    )
    done = run_python('-OO', '-W', 'ignore', '-c', program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count('0') == 2
