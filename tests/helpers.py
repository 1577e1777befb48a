"""Helpers of several test files: tools in this process or another, small models and data sets, marks
for older PyTorch, the pages."""

import functools
import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import List
from unittest import mock

import cv2
import numpy as np
import psutil
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.visualization import Visualizer

from crossformer_mm import CrossFormer
from crossformer_mm.compat import missing_torch, multiplies_bfloat16
from crossformer_mm.config_parts import innermost

ROOT = Path(__file__).resolve().parent.parent
DEMO_DETECTOR = 'configs/demo/mask_rcnn_shapes.py'
DEMO_SEGMENTOR = 'configs/demo/upernet_shapes.py'
CLASSIFIER = 'configs/imagenet/cf_t_300e.py'
CLASSES = ('disk', 'square', 'triangle', 'star')  # of the demo's detector
NO_VALIDATION = dict(val_cfg=None, val_dataloader=None, val_evaluator=None)

# Tools

PARTS = ('apis', 'datasets', 'evaluation', 'visualization')
LIBRARIES = [f'{library}.{part}' for part in PARTS for library in ('mmdet', 'mmseg')]
LIBRARIES.append('crossformer_mm')
PROCESSES = multiprocessing.get_context('forkserver')
PROCESSES.set_forkserver_preload(LIBRARIES)


def load_script(file: Path):
    """Load a script as a module."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leave_configs_unformatted() -> None:
    """Make MMEngine not format configs: five times in a training, it takes longer than a training."""
    from yapf.yapflib import yapf_api

    yapf_api.FormatCode = lambda text, **options: (text, True)


@functools.cache
def leave_libraries_uncollected() -> None:
    """Hide the libraries from the garbage collector: MMEngine calls it for each data set, for 0.3 s."""
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()


def run_as_main(file, *arguments) -> None:
    """Run a script in this process, for speed; what it ends in is raised.

    First what MMEngine keeps of runs is dropped. It is found by the second in which a run begins:
    another that begins in the same would write to its log, and look for models in its library.
    """
    for kind in (DefaultScope, MMLogger, MessageHub, Visualizer, *Visualizer.__subclasses__()):
        kind._instance_dict.clear()
    with mock.patch.object(sys, 'argv', [str(file), *map(str, arguments)]):
        runpy.run_path(str(file), run_name='__main__')


def words(arguments: tuple) -> List[str]:
    """Split the strings of a command at blanks, but not paths, and not those in a list."""
    split: List[str] = []
    for part in arguments:
        if isinstance(part, (list, tuple)):
            split += map(str, part)
        else:
            split += part.split() if isinstance(part, str) else [str(part)]
    return split


def run_tool(tool: str, *arguments, folder: Path = ROOT) -> int:
    """Run a command of tools/ in a folder, in this process for speed; return its exit status.

    ``arguments`` are words: a string is split at blanks, a list has words as they are.
    """
    leave_libraries_uncollected()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        try:
            run_as_main(ROOT / 'tools' / tool, *words(arguments))
        except SystemExit as stopped:
            return stopped.code or 0
    return 0


class ToolProcess:
    """A tool at work: its output goes to ``log``, its arguments are split as :func:`run_tool` does. It
    ends with the test at the latest (``pytest_runtest_teardown``)."""

    def __init__(self, log: Path, *command, environment=None):
        self.log = Path(log)
        self.log.write_text('')
        arguments = (str(log), environment or {}, *words(command))
        self.process = PROCESSES.Process(name='tool', target=run_in_process, args=arguments)
        self.process.start()

    @property
    def output(self) -> str:
        return self.log.read_text(errors='replace')

    def wait(self, timeout: float = 300) -> int:
        """Return the exit status; a process that does not end is killed, which is an error."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(self.output[-3000:])
        return self.process.exitcode

    def wait_until(self, condition, timeout: float = 300) -> None:
        """Return once ``condition()`` holds."""
        end = time.monotonic() + timeout
        while not condition():
            if self.process.exitcode is not None or time.monotonic() > end:
                self.kill()
                raise TimeoutError(self.output[-3000:])
            time.sleep(0.01)

    def kill(self) -> None:
        """End it as a power cut does: it gets no chance to tidy up."""
        self.process.kill()
        self.process.join()


def end_process(pid: int) -> None:
    """Kill a process and its children, if it has not ended."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            one.kill()


def run_in_process(log: str, environment: dict, tool: str, *arguments: str) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    leave_configs_unformatted()
    gc.freeze()
    sys.argv = [tool, *arguments]
    runpy.run_path(tool, run_name='__main__')


def run_python(*words, folder: Path = ROOT, **environment) -> subprocess.CompletedProcess:
    """Run Python on words in a folder, with variables that are set; keep its output."""
    command, settings = [sys.executable, *map(str, words)], dict(OMP_NUM_THREADS='1', **environment)
    return subprocess.run(
        command, cwd=folder, text=True, capture_output=True, env={**os.environ, **settings}
    )


def refusals(table: str) -> list:
    """Cases of a table with one in a line, ``COMMAND -> what it says``; names are short for files."""
    short = dict(
        DETECTOR=DEMO_DETECTOR, SEGMENTOR=DEMO_SEGMENTOR, IMAGENET=CLASSIFIER, ROOT=str(ROOT)
    )
    lines = [line for line in table.splitlines() if line and line[0] != '#']
    full = re.compile(rf"\b({'|'.join(short)})\b")
    return [
        pytest.param(*full.sub(lambda m: short[m[1]], line).split(' -> '), id=line)
        for line in lines
    ]


def free_port() -> str:
    with socket.socket() as one:
        one.bind(('127.0.0.1', 0))
        return str(one.getsockname()[1])


def start_two(log: Path, tool: str, *arguments) -> List[ToolProcess]:
    """Start a tool in two processes, as torchrun does, but without importing everything anew."""
    job = dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port())
    return [
        ToolProcess(
            log.with_name(f'{log.name}{rank}'), tool, *arguments, '--launcher pytorch',
            environment=dict(job, RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in (0, 1)
    ]  # fmt: skip


def run_two(log: Path, tool: str, *arguments) -> None:
    """Run a tool in two processes that succeed."""
    for process in start_two(log, tool, *arguments):
        assert process.wait() == 0, process.output[-3000:]


def read_json(path: Path):
    return json.loads(path.read_text(encoding='utf-8'))


def metrics(work: Path) -> dict:
    """Read the metrics that the newest test wrote."""
    return read_json(max(work.glob('*/*.json'), key=lambda path: path.stat().st_mtime))


# Models and images


assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)  # also of containers


class Marker:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def build_model(config) -> torch.nn.Module:
    """Build the model of a config, or of its file, in evaluation mode."""
    cfg = config if isinstance(config, Config) else Config.fromfile(ROOT / config)
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model).eval()


def random_model(config, file: Path, meta: dict) -> Path:
    """Save a config's model whose random predictions differ from image to image."""
    torch.manual_seed(0)
    model = build_model(config)
    heads = ('decode_head.conv_seg', 'roi_head.bbox_head.fc_cls', 'roi_head.mask_head.conv_logits')
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(heads):
                parameter.normal_(std=0.3)
    torch.save(dict(state_dict=model.state_dict(), meta=meta), file)
    return file


def add_noise(module: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Make every parameter matter: as initialised, biases are 0 and norms are 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return module


def model_of(config: str, *options: str):
    """A model in evaluation mode in which every parameter and statistic matters."""
    cfg = Config.fromfile(ROOT / config)
    cfg.merge_from_dict(dict(option.split('=') for option in options))
    cfg.merge_from_dict({'model.backbone.out_norm': False})
    torch.manual_seed(0)
    model = revert_sync_batchnorm(build_model(cfg))
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                noise = 0.02 * torch.randn_like(value)
                value.add_(noise.abs() if key.endswith('running_var') else noise)
    return model


def pretrained(checkpoint, arch='s', prefix: str = '', **options) -> CrossFormer:
    """A backbone in evaluation mode that has loaded a file, or failed to."""
    init_cfg = dict(type='Pretrained', checkpoint=str(checkpoint))
    if prefix:
        init_cfg.update(prefix=prefix)
    backbone = CrossFormer(arch, init_cfg=init_cfg, **options).eval()
    backbone.init_weights()
    return backbone


def outputs(model) -> list:
    """Tensors of what a model makes of an image, before any of it is thrown away."""
    from mmdet.structures import DetDataSample

    image = torch.rand(1, 3, 65, 97, generator=torch.Generator().manual_seed(0))
    shape = dict(img_shape=(65, 97), ori_shape=(65, 97), scale_factor=(1.0, 1.0))
    with torch.no_grad():
        made = model(image, [DetDataSample(metainfo=shape)], mode='tensor')
    return torch.utils._pytree.tree_flatten(made)[0]


def run_onnx(file, outputs=None, **inputs: torch.Tensor) -> List[torch.Tensor]:
    """Compute outputs, by default all, of a file, or its content, in ONNX Runtime."""
    onnxruntime = pytest.importorskip('onnxruntime')
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    return [torch.from_numpy(out) for out in session.run(outputs, arrays)]


def write_pictures(folder: Path, *names: str) -> list:
    """Write small pictures of one grey each; return what data sets hold of them."""
    infos = []
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name), np.full((4, 6, 3), 10 * number, np.uint8))
        infos.append(dict(img_path=str(folder / name)))
    return infos


class Photos(BaseDataset):
    METAINFO = dict(classes=())

    def __init__(self, infos: list, **options):
        self.infos = infos
        super().__init__(**options)

    def load_data_list(self) -> list:
        return list(self.infos)  # which the data set empties


# The smallest backbone: a block of short and one of long distance attention. And in a config.
ONE_STAGE = dict(
    arch=dict(embed_dims=16, depths=(2,), num_heads=(1,)),
    merge_sizes=(),
    group_size=(3,),
    interval=(2,),
    out_indices=(0,),
)
TINY_BACKBONE = '''backbone=dict(
        arch=dict(_delete_=True, embed_dims=16, depths=(2,), num_heads=(2,)), merge_sizes=(),
        group_size=(3,), interval=(2,), out_indices=(0,))'''
TINY_SEGMENTOR = f'''
_base_ = {str(ROOT / 'configs/upernet/cf_s_160k.py')!r}
model = dict(
    {TINY_BACKBONE},
    decode_head=dict(in_channels=[16], in_index=[0], channels=8, num_classes=5),
    auxiliary_head=None)
'''
TINY_RETINANET = f'''
_base_ = {str(ROOT / 'configs/retinanet/cf_s_1x.py')!r}
model = dict(
    {TINY_BACKBONE},
    neck=dict(in_channels=[16], out_channels=8, num_outs=2),
    bbox_head=dict(in_channels=8, feat_channels=8, stacked_convs=1, num_classes=4,
                   anchor_generator=dict(strides=[4, 8])),
    test_cfg=dict(nms_pre=200, score_thr=0.54, max_per_img=100))
'''
TINY_MASK_RCNN = f'''
_base_ = {str(ROOT / 'configs/mask_rcnn/cf_s_1x.py')!r}
model = dict(
    {TINY_BACKBONE},
    neck=dict(in_channels=[16], out_channels=8, num_outs=3),
    rpn_head=dict(in_channels=8, feat_channels=8, anchor_generator=dict(strides=[4, 8, 16])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=8, featmap_strides=[4, 8], finest_scale=16),
        mask_roi_extractor=dict(out_channels=8, featmap_strides=[4, 8], finest_scale=16),
        bbox_head=dict(in_channels=8, fc_out_channels=8, num_classes=4),
        mask_head=dict(in_channels=8, conv_out_channels=8, num_convs=1, num_classes=4)),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=50), rcnn=dict(max_per_img=20)))
'''


SIDES = (64, 96)


def shrink(part) -> None:
    """Adapt a pipeline or model to small images, so that it finds something."""
    for value in part.values() if isinstance(part, dict) else part:
        if isinstance(value, (dict, list, tuple)):
            shrink(value)
    if not isinstance(part, dict):
        return
    if isinstance(part.get('scale'), tuple):
        part['scale'] = SIDES[::-1]
    if 'scales' in part and part.get('type') == 'RandomChoiceResize':
        part['scales'] = [SIDES[::-1], (72, 48)]
    if 'crop_size' in part:
        part['crop_size'] = (64, 64)
    if part.get('type') == 'SegDataPreProcessor':
        part['size'] = (64, 64)
    if 'score_thr' in part:  # which untrained heads do not reach
        part.update(score_thr=0.0, max_per_img=5)
    if part.get('type') == 'RandomSampler':
        part['num'] = 16
    if 'nms_pre' in part:
        part['nms_pre'] = 100


def shorten(cfg: Config, length: int) -> None:
    """Adapt a config to small images, and to this number of epochs or iterations."""
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        shrink(innermost(loader.dataset).pipeline)
    shrink(cfg.model)
    shrink(cfg.get('tta_pipeline') or [])
    unit = 'max_epochs' if 'max_epochs' in cfg.train_cfg else 'max_iters'
    cfg.train_cfg.update({unit: length}, val_interval=2)


# Marks for what older PyTorch cannot do, each by the name of what it lacks


def needs_torch(release: str, what: str):
    """Skip a test before a release, for ``what`` came with it."""
    return pytest.mark.skipif(
        bool(missing_torch(release)), reason=f'{what} came with PyTorch {release}'
    )


def float16_on_cpu_lacks() -> str:
    """Name what this PyTorch cannot do in float16 on the CPU, or ''."""
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # for other types, autocast warns and does nothing
        try:
            with torch.autocast('cpu', torch.float16):
                torch.nn.functional.conv2d(*torch.ones(2, 1, 1, 1, 1, dtype=torch.float16))
            return ''
        except (RuntimeError, UserWarning) as error:
            return str(error)


needs_float16 = pytest.mark.skipif(
    bool(float16_on_cpu_lacks()), reason=f'float16 on the CPU: {float16_on_cpu_lacks()}'
)
needs_bfloat16 = pytest.mark.skipif(
    not (torch.cuda.is_available() or multiplies_bfloat16()),
    reason='tools refuse bfloat16 on this processor',
)
FLOAT16 = pytest.param(torch.float16, marks=needs_float16)


def interpreter_lacks() -> str:
    """Name what Triton's interpreter, which runs kernels where there is no GPU, lacks, or ''."""
    if torch.cuda.is_available() or not importlib.util.find_spec('triton'):
        return ''
    triton, numpy = (
        tuple(map(int, metadata.version(name).split('.')[:2])) for name in ('triton', 'numpy')
    )
    return 'NumPy 2.4 lacks a conversion it uses' if triton < (3, 7) and numpy >= (2, 4) else ''


needs_interpreter = pytest.mark.skipif(
    bool(interpreter_lacks()), reason=f"Triton's interpreter: {interpreter_lacks()}"
)

# Pages

README = ROOT / 'README.md'
TRANSLATED = [ROOT / 'README_zh-CN.md', *sorted((ROOT / 'docs').glob('*.zh.md'))]
PAGES = [  # of the Chinese ones test_pages.py asserts that their code is the same
    *(ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')),
    *sorted(set((ROOT / 'docs').glob('*.md')) - set(TRANSLATED)),
]


def blocks(page: Path, language: str) -> List[str]:
    """Blocks of code of a page."""
    text = page.read_text(encoding='utf-8')
    return re.findall(rf'^```{language}\n(.*?)^```', text, flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> List[str]:
    """Commands that a page shows."""
    lines = '\n'.join(blocks(page, '(?:shell|bash|sh|console)')).replace('\\\n', ' ').splitlines()
    shown = [line for line in lines if shlex.split(line, comments=True)]
    assert all(line == line.lstrip('$ ') for line in shown), 'commands stand without a prompt'
    return shown


COMMANDS = [(page.stem, command) for page in PAGES for command in commands(page)]
