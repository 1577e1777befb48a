"""Shared fixtures: small backbones and fixed seeds."""

import os

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter; Triton reads this when imported first.
if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'

from crossformer_mm import CrossFormer  # noqa: E402

from .tool_process import leave_configs_unformatted  # noqa: E402

leave_configs_unformatted()

# Every kind of block (short, long, before and after a merging) in 1.5 M parameters.
SMALL = dict(embed_dims=32, depths=(1, 2, 4, 2), num_heads=(1, 2, 4, 8))

# On maps this small threads gain nothing, and on a busy machine they wait for each other.
torch.set_num_threads(1)


# Files that take a minute or more, the longest first: `--dist loadfile` gives each to one process,
# and a long one that begins last leaves the other processes idle.
LONG = ('commands', 'fused', 'zoo_runs', 'export', 'export_tool', 'packaging', 'tools', 'model_zoo')
LONG += ('backbone', 'pretraining', 'ranks', 'resume', 'explain_page', 'soak', 'dataset_checks')


def pytest_collection_modifyitems(items):
    places = {f'test_{name}': place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def small():
    """Builds a small CrossFormer in evaluation mode, in which every parameter matters.

    As initialised, biases are 0 and norms are 1, so that mixing them up would
    change nothing: hence the noise.
    """

    def build(arch=SMALL, **options) -> CrossFormer:
        torch.manual_seed(0)
        backbone = CrossFormer(arch, **options).eval()
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return backbone

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
