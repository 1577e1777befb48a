"""Shared fixtures: small backbones, fixed seeds, tools that are run in the process of the test."""

import multiprocessing
import os

import pytest
import torch
from mmengine.runner import CheckpointLoader

# Without a GPU, Triton's kernels run in its interpreter; Triton reads this when imported first.
if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'

from crossformer_mm import CrossFormer  # noqa: E402

from .helpers import (  # noqa: E402
    CLASSES,
    DEMO_DETECTOR,
    DEMO_SEGMENTOR,
    add_noise,
    end_process,
    leave_configs_unformatted,
    random_model,
    run_tool,
)
from .trainings import write_zoo_data  # noqa: E402

leave_configs_unformatted()

# Every kind of block (short, long, before and after a merging) in 1.5 M parameters.
SMALL = dict(embed_dims=32, depths=(1, 2, 4, 2), num_heads=(1, 2, 4, 8))

# On maps this small threads gain nothing, and on a busy machine they wait for each other.
torch.set_num_threads(1)


# Files that take a minute or more, the longest first: `--dist loadfile` gives each to one process,
# and a long one that begins last leaves the other processes idle.
LONG = ('commands', 'fused', 'zoo_runs', 'run_onnx', 'export_file', 'compile', 'wheels')
LONG += ('installing', 'train_and_test', 'model_zoo', 'backbone', 'pretraining', 'ranks', 'killed')
LONG += ('page', 'restarts', 'gpu_benchmark', 'resuming', 'paths', 'epoch_loop', 'preemption')
LONG += ('soak', 'golden', 'sweep_groups', 'loaded_images', 'output')


def pytest_collection_modifyitems(items):
    places = {f'test_{name}': place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


def pytest_runtest_teardown():
    """End the tools that a test which failed has left at work."""
    for process in multiprocessing.active_children():
        if process.name == 'tool':
            end_process(process.pid)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def small():
    """Builds a small CrossFormer in evaluation mode, in which every parameter matters."""

    def build(arch=SMALL, **options) -> CrossFormer:
        torch.manual_seed(0)
        return add_noise(CrossFormer(arch, **options).eval())

    return build


@pytest.fixture
def probe():
    """A scalar of features to which every entry contributes differently.

    The one that the gradients in the golden files are of.
    """

    def loss(features) -> torch.Tensor:
        return sum(
            (f.flatten() * torch.linspace(-1, 1, f.numel(), dtype=f.dtype)).sum() / f.numel() ** 0.5
            for f in features
        )

    return loss


@pytest.fixture
def output_of(capfd):
    """Runs a command of tools/, which must end with the status ``expect``; returns its output."""

    def run(tool: str, *arguments, expect: int = 0, **options) -> str:
        status = run_tool(tool, *arguments, **options)
        said = ''.join(capfd.readouterr())
        assert status == expect, said[-3000:]
        return said

    return run


@pytest.fixture
def refusal_of(capfd):
    """Runs a command of tools/, which must refuse its arguments; returns the sentence."""

    def run(tool: str, *arguments, **options) -> str:
        status = run_tool(tool, *arguments, **options)
        said = capfd.readouterr()
        assert status == 2, said.out[-3000:]
        last = said.err.strip().splitlines()[-1]
        assert 'error: ' in last
        return last.split('error: ', 1)[1]

    return run


@pytest.fixture(scope='session')
def random_detector(tmp_path_factory):
    """A checkpoint of the demo's detector with random weights."""
    file = tmp_path_factory.mktemp('detector') / 'detector.pth'
    return random_model(DEMO_DETECTOR, file, dict(dataset_meta=dict(CLASSES=CLASSES)))


@pytest.fixture(scope='session')
def random_segmentor(tmp_path_factory):
    """A checkpoint of the demo's segmentor with random weights."""
    return random_model(DEMO_SEGMENTOR, tmp_path_factory.mktemp('maps') / 'segmentor.pth', {})


@pytest.fixture(scope='session')
def zoo_data(tmp_path_factory):
    return write_zoo_data(tmp_path_factory.mktemp('zoo_data'))


@pytest.fixture
def own_loaders():
    """Tools settle for good how MMEngine reads; other tests want it as it was."""
    schemes = dict(CheckpointLoader._schemes)
    yield
    CheckpointLoader._schemes = schemes
