"""The commands of README.md and docs/ run, as they stand, on little data and with small models.

What a command writes is there for those after it. test_docs.py checks those that are not run here.
"""

import re
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from crossformer_mm import CrossFormer
from crossformer_mm.compat import EXPORT, missing_torch
from crossformer_mm.engine.config import load_config

from ..authors import earlier, imagenet_file
from ..helpers import COMMANDS, ROOT, build_model, run_python, run_tool, shorten, write_pictures

EXAMPLES = ROOT / 'docs' / 'custom_projects.md'
# Checkouts of other libraries, whose own tools docs/other_libraries.md calls.
OTHERS = ('pytorch-image-models', 'mmrotate', 'mmpose')
TINY = dict(embed_dims=16, depths=(2, 2, 1, 1), num_heads=(1, 1, 2, 2))
CHANNELS = [16, 32, 64, 128]

# What would take long is made short by further options, the rest by small configs.
SHORTER = {
    'tools/export.py': '--fixed-shape 64 64',  # any size: test_export_file.py
    'tools/make_shapes.py': '--train 8 --val 8',
    'benchmarks/backbone.py': '--sizes 32x32 --models crossformer_s --modes infer --repeats 2',
    # the configs' own alone
    'tools/sweep_groups.py': '--group-size 7,7,7,7 --interval 8,4,2,1 --lda interval --max-images 2',
    'tools/train.py configs/demo/upernet_shapes.py': '--cfg-options train_cfg.max_iters=2 '
    'train_cfg.val_interval=2 train_dataloader.batch_size=2',
}
# The tests of each run it; my_pose.py is of the reader's own library, as in test_own_library.py.
NOT_RUN = re.compile(
    r"(\w+=('[^']*'|\S*) )*(make|pip|git|\.venv/bin/python|python -m|"
    r'python benchmarks/(gpu|pretraining|real_data/run)\.py|python tools/\w+\.py my_pose\.py) '
)
EVERY = {
    command: page
    for page, command in COMMANDS
    # of several machines and of Slurm: test_scripts.py and test_ranks.py run the same scripts
    if page != 'distributed' and not NOT_RUN.match(command)
}


def small(cfg: Config) -> Config:
    """A config with a tiny model, two epochs or iterations, and images as they are here."""
    shorten(cfg, length=2)
    shrink_heads(cfg.model)
    cfg.model.backbone.arch = TINY
    if cfg.default_scope == 'mmpretrain':
        cfg.model.neck.in_channels = cfg.model.head.in_channels = CHANNELS[-1]
    elif 'neck' in cfg.model:
        cfg.model.neck.in_channels = CHANNELS[-len(cfg.model.neck.in_channels) :]
    else:
        cfg.model.decode_head.update(in_channels=CHANNELS, channels=16)
        cfg.model.auxiliary_head.update(in_channels=CHANNELS[2], channels=16)
    return cfg


def shrink_heads(part) -> None:
    """The channels of a neck and what follows it."""
    for name, value in part.items() if isinstance(part, dict) else ():
        for one in value if isinstance(value, list) else [value]:
            if name != 'backbone':
                shrink_heads(one)
        if 'channels' in name and value in (256, 1024):
            part[name] = 16
        elif name == 'in_channels' and value == [256] * 4:
            part[name] = [16] * 4


@pytest.fixture(scope='module')
def place(zoo_data, tmp_path_factory) -> Path:
    """A checkout with data and images, whose configs are small."""
    folder = tmp_path_factory.mktemp('checkout')
    for name in ('tools', 'benchmarks', 'crossformer_mm', 'tests'):
        (folder / name).symlink_to(ROOT / name)
    (folder / 'docs').mkdir()
    (folder / 'data' / 'ade').mkdir(parents=True)
    (folder / 'data' / 'coco').symlink_to(zoo_data / 'coco')
    (folder / 'data' / 'ade' / 'ADEChallengeData2016').symlink_to(zoo_data / 'ade')
    for name in set(re.findall(r'configs/\w+/\w+\.py', ' '.join(EVERY))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cfg = Config.fromfile(ROOT / name)
        (cfg if '/demo/' in name else small(cfg)).dump(folder / name)
    text = EXAMPLES.read_text(encoding='utf-8')
    for name in ('my_shapes.py', 'my_maps.py'):  # the text says their names before them
        config = re.search(rf'`{name}`.*?```python\n(.*?)```', text, flags=re.DOTALL)[1]
        (folder / name).write_text(config)
        small(load_config(str(folder / name))).dump(folder / name)
    torch.save(imagenet_file(CrossFormer(TINY), earlier), folder / 'crossformer-s.pth')
    write_pictures(folder, 'photo.jpg', 'photos/1.jpg', 'photos/2.jpg')
    (folder / 'data/imagenet/meta').mkdir(parents=True)
    for split in ('train', 'val'):
        write_pictures(folder / 'data/imagenet' / split, '1.JPEG', '2.JPEG')
        (folder / f'data/imagenet/meta/{split}.txt').write_text('1.JPEG 0\n2.JPEG 999\n')
    return folder


def make_checkpoints(place: Path, words: list) -> None:
    """The files of weights that a command names and no command before it has made."""
    config = words[1] if words[1].endswith('.py') else 'configs/mask_rcnn/cf_s_1x.py'
    for file in re.findall(r'[\w/.-]+\.pth', ' '.join(words)):
        if (place / file).exists() or words[0] == 'tools/publish_model.py' and file == words[2]:
            continue
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        if f'model.backbone.init_cfg.checkpoint={file}' in words:  # of a pretraining
            (config,) = place.glob(f'configs/*/{Path(file).parent.name}.py')
        cfg = Config.fromfile(place / config)
        if 'model.backbone.arch.depths=(2,2,4,2)' in words:
            cfg.model.backbone.arch.depths = (2, 2, 4, 2)
        weights, meta = build_model(cfg).state_dict(), dict(cfg=cfg.pretty_text)
        torch.save(dict(state_dict=weights, meta=meta), place / file)


@pytest.fixture
def settings_here(monkeypatch, place):
    """Each setting of a sweep in this process, for speed: test_sweep_groups.py has real ones."""
    started = subprocess.run

    def run(command, *args, **kwargs):
        if '--task' not in command:
            return started(command, *args, **kwargs)
        tool, *words = command[3:]  # after python -W ignore
        return subprocess.CompletedProcess(command, run_tool(Path(tool).name, words, folder=place))

    monkeypatch.setattr(subprocess, 'run', run)


@pytest.mark.parametrize('command', EVERY, ids=lambda command: f'{EVERY[command]}: {command}')
def test_command_runs(command, place, capfd, request):
    words = shlex.split(command, comments=True)
    if words[0] == 'python':
        words = words[1:]
    tool = words[0]
    if tool.split('/')[0] in OTHERS:
        pytest.skip('a tool of another library: test_other_libraries.py runs it')
    if tool == 'tensorboard':
        assert list((place / words[2]).glob('*/vis_data/events*'))
        return
    if tool in ('tools/export.py', 'tools/run_onnx.py'):
        if missing_torch(EXPORT):
            pytest.skip(f'export: {missing_torch(EXPORT)}')
        if not find_spec('onnxruntime'):
            pytest.skip('tools/export.py needs the packages of the extra export')
    make_checkpoints(place, words)
    words += SHORTER.get(' '.join(words[:2]), SHORTER.get(tool, '')).split()
    if tool.endswith('.sh'):  # one process stands for eight; test_ranks.py has several
        tool = tool.replace('dist_', '').replace('.sh', '.py')
        words = [tool, *(word for word in words[1:] if word != '8')]
    if tool == 'tools/sweep_groups.py':
        request.getfixturevalue('settings_here')
    if tool == '-c' or tool.startswith('benchmarks/'):
        done = run_python(*words, folder=place)
        status, said = done.returncode, done.stdout + done.stderr
    else:
        status = run_tool(Path(tool).name, words[1:], folder=place)
        said = ''.join(capfd.readouterr())
    if '--amp' in words and not torch.cuda.is_available():
        assert status != 0 and '--amp needs a GPU, and PyTorch sees none' in said
        return
    assert status == 0, said[-3000:]
    for option, value in zip(words, words[1:]):
        if option in ('--out', '--html', '--show-dir', '--hub'):
            assert (place / value).is_file() or any((place / value).iterdir())
