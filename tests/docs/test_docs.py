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
    commands,
    load_script,
    run_tool,
)

EVERY = [
    pytest.param(command, id=f'{page.stem}: {command}')
    for page in PAGES
    for command in commands(page)
]


def configs_of(page: Path) -> List[str]:
    return [block for block in blocks(page, 'python') if re.search(r'^_base_ = ', block, re.M)]


def config_of(name: str) -> str:
    """The config of a worked example, to be saved under a name that the text says before it."""
    text = EXAMPLES.read_text(encoding='utf-8')
    return re.search(rf'`{name}`.*?```python\n(.*?)```', text, flags=re.DOTALL)[1]


# A config of the reader's own library. tests/tools/test_own_library.py runs its commands.
OWN_LIBRARY = 'my_pose.py'


@pytest.fixture
def examples(tmp_path) -> Path:
    """A folder with what a reader of the worked examples has saved."""
    for name in ('my_shapes.py', 'my_maps.py'):
        (tmp_path / name).write_text(config_of(name))
    return tmp_path


def arguments_of(monkeypatch, tool: str, words: List[str]):
    """Parse a tool's arguments; the test ends where the tool refuses them."""
    monkeypatch.setattr(sys, 'argv', [tool, *words])
    return runpy.run_path(str(ROOT / tool))['parse_args']()


def check_pip(words: List[str]) -> None:
    """pip installs this checkout, with extras and files of requirements that are there, or what
    an index has, which this package is not."""
    if words[0] == 'freeze':
        return
    extras = re.findall(r'^(\w+) = \[', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)
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


@pytest.mark.parametrize('command', EVERY)
def test_command_names_what_exists(command, examples, monkeypatch):
    words = shlex.split(command, comments=True)
    if words[0] == 'sbatch':  # Slurm's; its last argument is the command
        words = shlex.split(words[-1])
    while re.match('[A-Z_]+=', words[0]):
        words.pop(0)
    program, *rest = words
    if program == 'make':
        assert re.search(rf'^{rest[0]}:', (ROOT / 'Makefile').read_text(), re.MULTILINE)
        return
    if program == 'pip':
        check_pip(rest)
        return
    if program == 'git':
        assert f'Repository = "{rest[1]}"' in (ROOT / 'pyproject.toml').read_text()
        return
    if program == 'docker':
        assert rest[0] == 'run' or (ROOT / rest[rest.index('-f') + 1]).is_file()
        return
    if program == 'curl':  # what it asks is asked in the tests of the service
        return
    if program == 'tensorboard':
        assert find_spec('tensorboard') and rest[0] == '--logdir'
        return
    if program == '.venv/bin/python':
        assert rest[:2] == ['-m', 'pytest'] and (ROOT / rest[2]).is_file()
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


@pytest.mark.parametrize(
    'block',
    [
        pytest.param(block, id=f'{page.stem} {i}')
        for page in PAGES
        for i, block in enumerate(configs_of(page))
    ],
)
def test_config_builds_a_model(block, tmp_path):
    (tmp_path / 'mine.py').write_text(block)
    for library in set(re.findall(r"'(\w+)::", block)) & set(OTHERS):
        pytest.importorskip(library, reason=f'{library} is not installed')
    if 'crossformer_mm::' in block:
        cfg = load_config(tmp_path / 'mine.py')
    else:
        cfg = Config.fromfile(tmp_path / 'mine.py')
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert isinstance(model.backbone, CrossFormer)
    if 'optim_wrapper' in cfg:  # a whole config: MMDetection's SGD does not work
        assert cfg.optim_wrapper.optimizer.type == 'AdamW'


def anchor(heading: str) -> str:
    """Return the anchor of a heading."""
    return re.sub(r'[^\w -]', '', heading.lstrip('# ').lower()).replace(' ', '-')


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
                titles = {anchor(line) for line in there.splitlines() if line.startswith('#')}
                assert title in titles, f'{page.name}: {target}'


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
NO_WORKERS = [
    f'{split}_dataloader.{setting}'
    for split in ('train', 'val', 'test')
    for setting in ('num_workers=0', 'persistent_workers=False')
]
SIZE = 'scale=(96,96)'
SHORTER = {
    ('make_shapes.py', 'data/shapes'): '--train 2 --val 2 --size 64'.split(),
    ('train.py', 'my_shapes.py'): [
        *NO_WORKERS,
        f'train_dataloader.dataset.pipeline.2.{SIZE}',
        f'val_dataloader.dataset.pipeline.1.{SIZE}',
        'train_cfg.val_interval=12',
        'default_hooks.checkpoint.interval=12',
    ],
    ('test.py', 'my_shapes.py'): [*NO_WORKERS, f'test_dataloader.dataset.pipeline.1.{SIZE}'],
    ('predict.py', 'my_shapes.py'): [f'test_dataloader.dataset.pipeline.1.{SIZE}'],
    ('train.py', 'my_maps.py'): [
        *NO_WORKERS,
        f'train_dataloader.dataset.pipeline.2.{SIZE}',
        'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
        'model.data_preprocessor.size=(64,64)',
        f'val_dataloader.dataset.pipeline.1.{SIZE}',
        'train_cfg.max_iters=2',
        'train_cfg.val_interval=2',
        'default_hooks.checkpoint.interval=2',
    ],
    ('predict.py', 'my_maps.py'): [f'test_dataloader.dataset.pipeline.1.{SIZE}'],
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
        tool, words = Path(words[0]).name, words[1:]
        shorter = SHORTER[tool, words[0]]
        ran.add((tool, words[0]))
        if tool != 'make_shapes.py':
            shorter = ['--cfg-options', *shorter]
        status = run_tool(tool, [*words, *shorter], folder=examples)
        assert status == 0, f'{command}\n{capfd.readouterr().err[-3000:]}'
        if (tool, words[0]) == ('train.py', 'my_maps.py'):  # 160000 of them, but for the time
            (examples / 'work_dirs/my_maps/iter_2.pth').rename(
                examples / 'work_dirs/my_maps/iter_160000.pth'
            )
    assert ran == set(SHORTER)
    for written in ('pictures', 'predictions/pictures', 'predictions/labels'):
        assert len(list((examples / written).iterdir())) == 2, written
    assert (examples / 'predictions' / 'results.segm.json').is_file() is False  # the last: maps
