"""Configs, links, and commands that test_commands.py does not run, in README.md and docs/ work.

Of these commands programs and files exist, and their arguments parse.
"""

import re
import runpy
import shlex
import sys
from importlib.util import find_spec
from typing import List

import pytest
import torch
from mmengine.config import Config

from crossformer_mm import CrossFormer
from crossformer_mm.engine.config import load_config

from ..helpers import COMMANDS, PAGES, ROOT, TRANSLATED, blocks, build_model, load_script
from .test_commands import EVERY, OTHERS

NOT_RUN = [
    pytest.param(command, id=f'{page}: {command}')
    for page, command in COMMANDS
    if command not in EVERY
]
CONFIGS = [
    pytest.param(block, id=f'{page.stem} {i}')
    for page in PAGES
    for i, block in enumerate(b for b in blocks(page, 'python') if re.search('^_base_ = ', b, re.M))
]


def arguments_of(monkeypatch, tool: str, words: List[str]):
    """Parse a tool's arguments; the test ends where the tool refuses them."""
    monkeypatch.setattr(sys, 'argv', [tool, *words])
    return runpy.run_path(str(ROOT / tool))['parse_args']()


PROJECT = (ROOT / 'pyproject.toml').read_text()


def pip_takes(word: str) -> bool:
    """Check for an option, a file of requirements, this checkout with an extra that is there, or
    what an index has, which this package is not."""
    extras = '|'.join(re.findall(r'^(\w+) = \[', PROJECT, re.MULTILINE))
    options = '-r|--no-build-isolation|--no-deps|--no-cache-dir'
    known = rf'{options}|\.(\[({extras})\])?|(?!crossformer)[a-z]\w*(-\w+)*([<>=].*)?'
    return (ROOT / word).is_file() or bool(re.fullmatch(known, word))


def test_demo_ends_with_commands_that_predict(monkeypatch):
    predict = load_script(ROOT / 'tools/demo.py').prediction
    monkeypatch.chdir(ROOT)
    for name in ('mask_rcnn', 'upernet'):
        program, tool, *rest = shlex.split(predict(name, f'work_dirs/demo/{name}/iter_400.pth'))
        args = arguments_of(monkeypatch, tool, rest)
        assert program == 'python' and (ROOT / args.config).is_file()


# What the words after a program must be, where it is no tool of this repository.
PROGRAMS = {
    'make': lambda words: re.search(f'^{words[0]}:', (ROOT / 'Makefile').read_text(), re.MULTILINE),
    'pip': lambda words: (
        words[0] == 'freeze' or (words[0] == 'install' and all(map(pip_takes, words[1:])))
    ),
    'git': lambda words: f'Repository = "{words[1]}"' in PROJECT,
    '.venv/bin/python': lambda words: words[:2] == ['-m', 'pytest'] and (ROOT / words[2]).is_file(),
}


@pytest.mark.parametrize('command', NOT_RUN)
def test_command_names_what_exists(command, monkeypatch):
    words = shlex.split(command, comments=True)
    if words[0] == 'sbatch':  # Slurm's; its last argument is the command
        words = shlex.split(words[-1])
    while re.match('[A-Z_]+=', words[0]):
        words.pop(0)
    program, *rest = words
    if program in PROGRAMS:
        assert PROGRAMS[program](rest)
        return
    if program == 'python':
        tool, rest = rest[0], rest[1:]
        if tool == '-m':
            assert find_spec(f'{rest[0]}.__main__')
            return
    else:  # dist_train.sh CONFIG GPUS ..., dist_test.sh CONFIG CHECKPOINT GPUS ...,
        # slurm_train.sh PARTITION NAME CONFIG FOLDER ..., slurm_test.sh ... CONFIG CHECKPOINT ...
        start, task = re.fullmatch(r'tools/(dist|slurm)_(train|test)\.sh', program).groups()
        assert (ROOT / program).is_file()
        tool = f'tools/{task}.py'
        if start == 'dist':
            assert rest.pop(1 if task == 'train' else 2).isdigit()
        else:
            rest = rest[2:]
            if task == 'train':
                rest.insert(1, '--work-dir')
    if tool.startswith('benchmarks/'):
        source = (ROOT / tool).read_text()
        assert all(f"'{word}'" in source for word in rest if word.startswith('--'))
        return
    args = arguments_of(monkeypatch, tool, rest)
    # Settings of a config are checked where a tool runs.
    assert args.config == 'my_pose.py' or ((ROOT / args.config).is_file() and not args.cfg_options)


@pytest.mark.parametrize('block', CONFIGS)
def test_config_builds_a_model(block, tmp_path):
    (tmp_path / 'mine.py').write_text(block)
    for library in set(re.findall(r"'(\w+)::", block)) & set(OTHERS):
        pytest.importorskip(library, reason=f'{library} is not installed')
    load = load_config if 'crossformer_mm::' in block else Config.fromfile
    cfg = load(tmp_path / 'mine.py')
    with torch.device('meta'):
        model = build_model(cfg)
    assert isinstance(model.backbone, CrossFormer)
    if 'optim_wrapper' in cfg:  # a whole config: MMDetection's SGD does not work
        assert cfg.optim_wrapper.optimizer.type == 'AdamW'


def test_links_lead_somewhere():
    for page in [*PAGES, *TRANSLATED]:
        text = page.read_text(encoding='utf-8')
        for target in re.findall(r'\]\(([^)]+)\)', text):
            if '://' in target:
                continue
            name, _, title = target.partition('#')
            assert (page.parent / name).exists(), f'{page.name}: {target}'
            if title and not name.endswith('.html'):
                there = (page.parent / name).read_text(encoding='utf-8') if name else text
                headings = re.findall('^#+ (.*)', there.lower(), re.MULTILINE)
                anchors = [re.sub(r'[^\w -]', '', one).replace(' ', '-') for one in headings]
                assert title in anchors, f'{page.name}: {target}'
