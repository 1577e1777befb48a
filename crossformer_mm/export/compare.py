"""Comparison of an exported file with PyTorch on random inputs."""

from typing import Callable, Dict, Iterable, List, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .models import WholeClassifier, WholeDetector, WholeSegmentor
from .networks import Outputs

# Batch, height, width: odd sides, sides smaller than the largest stride and than a group, multiples
# of 32. None is the one that was traced.
SIZES = ((1, 97, 131), (2, 64, 96), (3, 17, 30), (1, 224, 160), (2, 33, 200))
TOLERANCE = 1e-4  # of the largest value of an output
WHOLE = (WholeDetector, WholeSegmentor, WholeClassifier)


class Differs(UserError):
    """A file does not compute what PyTorch does; the message is a clause."""


def example(
    module: nn.Module, channels: int, input_type: Optional[str], batch: int, height: int, width: int
) -> List[Tensor]:
    """Make random inputs.

    Args:
        module: of :func:`.build.build`.
        channels: of normalised images.
        input_type: of the images of a whole model.
        batch, height, width: of the images; whole detectors take batches of 1 only.
    """
    if not isinstance(module, WHOLE):
        return [torch.randn(batch, channels, height, width)]
    if isinstance(module, WholeDetector):
        batch = 1
    dtype = getattr(torch, input_type or 'uint8')
    # Coarser than pixels: networks look for structures of several pixels.
    coarse = torch.randint(256, (batch, 3, height // 8 + 1, width // 8 + 1)).float()
    image = F.interpolate(coarse, (height, width), mode='bilinear').to(dtype)
    if takes_size(module):
        return [image, torch.tensor([height // 2 + 1, 2 * width])]
    return [image]


def takes_size(module: nn.Module) -> bool:
    """Check whether the size of the outputs is an input of a module."""
    return isinstance(module, WholeSegmentor) and module.resize.rule is None


def input_names(module: nn.Module, fixed: bool) -> Dict[str, Dict[int, str]]:
    """Name a module's inputs and their open dimensions; with ``fixed`` there are none."""
    image = {} if fixed else {2: 'height', 3: 'width'}
    if image and not isinstance(module, WholeDetector):
        image = {0: 'batch', **image}
    return dict(image=image, **({'size': {}} if takes_size(module) else {}))


def check(
    module: nn.Module,
    exported: Callable[..., Outputs],
    sizes: Iterable[Sequence[int]],
    inputs: Callable[..., List[Tensor]],
) -> None:
    """Compare a file with PyTorch, and print the difference for each size.

    Args:
        module: the module that was exported.
        exported: the file as a function.
        sizes: batch, height and width of the images.
        inputs: function of a size that makes inputs.

    Raises:
        Differs: they differ.
    """
    for size in sizes:
        given = inputs(*size)
        batch, _, *sides = given[0].shape
        print(f'   {batch} x {sides[0]} x {sides[1]}: ', end='', flush=True)
        results = exported(*given)
        differs = difference(module, given, results)
        found = f', {len(results["boxes"])} boxes' if 'boxes' in results else ''
        print(f'relative difference {differs:.1e}{found}', flush=True)
        if not differs <= TOLERANCE:  # NaN is not
            raise Differs(
                f'it differs from PyTorch by {differs:.1e} on a batch of {batch} of '
                f'{sides[0]} x {sides[1]}, allowed is {TOLERANCE:.0e}'
            )


def difference(module: nn.Module, given: Sequence[Tensor], results: Outputs) -> float:
    """Return the largest relative difference between a file's outputs and PyTorch's.

    For label maps it is that of the chosen logits from the largest ones; for detectors, that of
    :func:`compare_boxes`.
    """
    expected = module(*given)
    if isinstance(module, WholeDetector):
        return compare_boxes(results, expected)
    shapes, wanted = (
        {name: out.shape for name, out in outputs.items()} for outputs in (results, expected)
    )
    if shapes != wanted:
        raise Differs(f'it returns shapes {shapes} instead of {wanted}')
    labels = results.get('labels', results.get('label_map'))
    if labels is not None:
        logits = module.logits(*given)
        if logits.shape[1] == 1:
            logits = torch.cat([module.model.decode_head.threshold - logits.sigmoid()] * 2, 1)
            logits[:, 1] *= -1
        chosen = logits.gather(1, labels[:, None].long())
        results, expected = dict(largest=chosen), dict(largest=logits.amax(1, keepdim=True))
    return largest_difference(results, expected)


def largest_difference(results: Outputs, expected: Outputs) -> float:
    """Return the largest difference relative to the largest value of each output; or NaN."""
    differences = [
        (results[name] - out).abs().max() / out.abs().max().clamp(min=1e-6)
        for name, out in expected.items()
        if out.numel()
    ]
    return torch.stack(differences).max().item()


def compare_boxes(results: Outputs, expected: Outputs) -> float:
    """Return the largest difference between candidates' scores, and between boxes in both.

    If two boxes have almost the same score, rounding decides which one suppresses the other: up to
    a tenth of the boxes may have no partner.
    """
    name = 'candidate_scores'
    worst = largest_difference({name: results[name]}, {name: expected[name]})
    ours, theirs = results['boxes'], expected['boxes']
    if not len(ours) and not len(theirs):
        return worst
    scale = theirs.abs().max().clamp(min=1) if len(theirs) else 1.0
    apart = (ours[:, None] - theirs[None]).abs().amax(2) / scale
    apart = apart + (results['labels'][:, None] != expected['labels'][None]).float()
    apart = apart + (results['scores'][:, None] - expected['scores'][None]).abs()
    if 'masks' in expected:
        apart = apart + (results['masks'][:, None] - expected['masks'][None]).abs().amax((2, 3))
    near = apart.amin(1) if len(theirs) else torch.ones(len(ours))
    alone = int((near > TOLERANCE).sum()) + max(0, len(theirs) - len(ours))
    if alone > 0.1 * max(len(ours), len(theirs), 20):
        raise Differs(
            f'{alone} of {max(len(ours), len(theirs))} boxes are not among those of PyTorch'
        )
    return max([worst, *near[near <= TOLERANCE].tolist()])
