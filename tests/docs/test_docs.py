"""Commands in README.md and docs/ work.

Every command is checked: its program and files exist, its arguments parse, the settings that it
replaces are in the config. Those of the worked examples run, on small data and models.
"""

import re
import runpy
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import List

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from crossformer_mm import CrossFormer
from crossformer_mm.compat import EXPORT, missing_torch
from crossformer_mm.engine.config import load_config

from ..helpers import (
    EXAMPLES,
    OTHERS,
    PAGES,
    ROOT,
    TRANSLATED,
    blocks,
    build_model,
    commands,
    load_script,
    run_tool,
)

EVERY = [
    pytest.param(command, id=f'{page.stem}: {command}')
    for page in PAGES
    for command in commands(page)
]


CONFIGS = [
    pytest.param(block, id=f'{page.stem} {i}')
    for page in PAGES
    for i, block in enumerate(b for b in blocks(page, 'python') if re.search('^_base_ = ', b, re.M))
]
# A config of the reader's own library. tests/tools/test_own_library.py runs its commands.
OWN_LIBRARY = 'my_pose.py'


@pytest.fixture
def examples(tmp_path) -> Path:
    """A folder with the configs of the worked examples, whose names the text says before them."""
    text = EXAMPLES.read_text(encoding='utf-8')
    for name in ('my_shapes.py', 'my_maps.py'):
        config = re.search(rf'`{name}`.*?```python\n(.*?)```', text, flags=re.DOTALL)[1]
        (tmp_path / name).write_text(config)
    return tmp_path


def arguments_of(monkeypatch, tool: str, words: List[str]):
    """Parse a tool's arguments; the test ends where the tool refuses them."""
    monkeypatch.setattr(sys, 'argv', [tool, *words])
    return runpy.run_path(str(ROOT / tool))['parse_args']()


PROJECT = (ROOT / 'pyproject.toml').read_text()


def check_pip(words: List[str]) -> None:
    """pip installs this checkout, with extras and files of requirements that are there, or what
    an index has, which this package is not."""
    if words[0] == 'freeze':
        return
    extras = re.findall(r'^(\w+) = \[', PROJECT, re.MULTILINE)
    assert words.pop(0) == 'install'
    while words:
        word = words.pop(0)
        if word == '-r':
            assert (ROOT / words.pop(0)).is_file()
        elif word[0] == '.':
            assert word == '.' or re.fullmatch(r'\.\[(\w+)\]', word)[1] in extras
        else:
            name = re.split('[<>=]', word)[0]
            assert name in ('--no-build-isolation', '--no-deps', '--no-cache-dir') or re.fullmatch(
                r'(?!crossformer)[a-z]\w*(-\w+)*', name
            )


def test_demo_ends_with_commands_that_predict(monkeypatch):
    predict = load_script(ROOT / 'tools/demo.py').prediction
    monkeypatch.chdir(ROOT)
    for name in ('mask_rcnn', 'upernet'):
        program, tool, *rest = shlex.split(predict(name, f'work_dirs/demo/{name}/iter_400.pth'))
        args = arguments_of(monkeypatch, tool, rest)
        assert program == 'python' and (ROOT / args.config).is_file()


# What the words after a program must be; no entry: a tool of this repository or of another library.
PROGRAMS = {
    'make': lambda words: re.search(f'^{words[0]}:', (ROOT / 'Makefile').read_text(), re.MULTILINE),
    'pip': lambda words: check_pip(words) is None,
    'git': lambda words: f'Repository = "{words[1]}"' in PROJECT,
    'docker': lambda words: words[0] == 'run' or (ROOT / words[words.index('-f') + 1]).is_file(),
    'curl': lambda words: True,  # what it asks is asked in the tests of the service
    'tensorboard': lambda words: find_spec('tensorboard') and words[0] == '--logdir',
    '.venv/bin/python': lambda words: words[:2] == ['-m', 'pytest'] and (ROOT / words[2]).is_file(),
}


@pytest.mark.parametrize('command', EVERY)
def test_command_names_what_exists(command, examples, monkeypatch):
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
        if tool.split('/')[0] in OTHERS:
            return
        if tool == '-c':  # test_commands.py runs it
            compile(rest[0], command, 'exec')
            return
        if tool == 'tools/export.py' and missing_torch(EXPORT):
            pytest.skip(f'export: {missing_torch(EXPORT)}')
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
    if getattr(args, 'config', OWN_LIBRARY) == OWN_LIBRARY:
        return
    file = ROOT / args.config if (ROOT / args.config).is_file() else examples / args.config
    cfg = Config.fromfile(file)
    for key in getattr(args, 'cfg_options', None) or {}:
        inside, (*path, last) = cfg, key.split('.')
        for part in path:
            inside = inside[int(part) if isinstance(inside, list) else part]
        assert last in inside or inside.get('type') == 'CrossFormer', key
    cfg.merge_from_dict(getattr(args, 'cfg_options', None) or {})
    init_default_scope(cfg.default_scope)
    MODELS.build(cfg.model.backbone)


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


# The worked examples, as a reader runs them, but with little data and the same models in small.

TINY = dict(embed_dims=16, depths=(1, 2, 1, 1), num_heads=(1, 1, 2, 2))
SMALLER = {
    'my_shapes.py': f'''
model['backbone']['arch'] = dict(_delete_=True, **{TINY})
model['neck'] = dict(in_channels=[16, 32, 64, 128], out_channels=16)
model['rpn_head'] = dict(in_channels=16, feat_channels=16)
model['roi_head'].update(bbox_roi_extractor=dict(out_channels=16),
                         mask_roi_extractor=dict(out_channels=16))
model['roi_head']['bbox_head'].update(in_channels=16, fc_out_channels=16)
model['roi_head']['mask_head'].update(in_channels=16, conv_out_channels=16, num_convs=1)
''',
    'my_maps.py': f'''
model['backbone']['arch'] = dict(_delete_=True, **{TINY})
model['decode_head'].update(in_channels=[16, 32, 64, 128], channels=16)
model['auxiliary_head'].update(in_channels=64, channels=16)
''',
}
NO_WORKERS = ' '.join(
    f'{split}_dataloader.num_workers=0 {split}_dataloader.persistent_workers=False'
    for split in ('train', 'val', 'test')
)
SIZE = 'scale=(96,96)'
TEST_SIZE = f'test_dataloader.dataset.pipeline.1.{SIZE}'
TRAIN_SIZE = f'{NO_WORKERS} train_dataloader.dataset.pipeline.2.{SIZE} val_dataloader.dataset.pipeline.1.{SIZE}'
SHORTER = {
    ('make_shapes.py', 'data/shapes'): '--train 2 --val 2 --size 64',
    ('train.py', 'my_shapes.py'): f'--cfg-options {TRAIN_SIZE} train_cfg.val_interval=12 '
    'default_hooks.checkpoint.interval=12',
    ('test.py', 'my_shapes.py'): f'--cfg-options {NO_WORKERS} {TEST_SIZE}',
    ('predict.py', 'my_shapes.py'): f'--cfg-options {TEST_SIZE}',
    ('train.py', 'my_maps.py'): f'--cfg-options {TRAIN_SIZE} train_cfg.max_iters=2 '
    'train_dataloader.dataset.pipeline.3.crop_size=(64,64) model.data_preprocessor.size=(64,64) '
    'train_cfg.val_interval=2 default_hooks.checkpoint.interval=2',
    ('predict.py', 'my_maps.py'): f'--cfg-options {TEST_SIZE}',
}


def test_the_worked_examples_run(examples, capfd):
    for name, change in SMALLER.items():
        with (examples / name).open('a') as file:
            file.write(change)
    torch.manual_seed(0)
    torch.save(dict(model=CrossFormer(TINY).state_dict()), examples / 'crossformer-s.pth')
    ran = set()
    for command in commands(EXAMPLES):
        program, *words = shlex.split(command, comments=True)
        if program == 'tensorboard':
            assert list((examples / words[1]).glob('*/vis_data/events*'))
            continue
        if words[1] == OWN_LIBRARY:
            continue
        step = Path(words[0]).name, words[1]
        ran.add(step)
        status = run_tool(step[0], words[1:], SHORTER[step], folder=examples)
        assert status == 0, f'{command}\n{capfd.readouterr().err[-3000:]}'
        if step == ('train.py', 'my_maps.py'):  # 160000 of them, but for the time
            last = examples / 'work_dirs/my_maps/iter_2.pth'
            last.rename(last.with_name('iter_160000.pth'))
    assert ran == set(SHORTER)
    for written in ('pictures', 'predictions/pictures', 'predictions/labels'):
        assert len(list((examples / written).iterdir())) == 2, written
    assert (examples / 'predictions' / 'results.segm.json').is_file() is False  # the last: maps
