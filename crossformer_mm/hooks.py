"""Hooks that log attention paths and magnitudes, and draw or keep predictions."""

import re
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Dict, List, Sequence

import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.visualization import Visualizer
from torch import Tensor, nn

from .attention import GroupAttention
from .backbone import CrossFormer, CrossFormerStage
from .errors import UserError
from .grouping import AxisRule, group_map
from .pictures import names_in, picture_in
from .without_torch.files import write_labels


@HOOKS.register_module()
class AttentionPathHook(Hook):
    """Log the path of attention when training starts, with the reason if it is the plain one.

    On a GPU the fused kernels are compiled and tested then. Part of ``CarefulRunner``.
    """

    priority = 'VERY_LOW'  # after hooks that change the model

    def before_train(self, runner) -> None:
        model, wrapper = runner.model, runner.optim_wrapper
        # The type of mixed precision is known only inside this context.
        inside = wrapper.optim_context(model) if isinstance(wrapper, OptimWrapper) else None
        with inside or nullcontext():
            stages = [m for m in model.modules() if isinstance(m, CrossFormerStage)]
            lines = [line for stage in stages for line in stage.attention_paths()]
        for line in dict.fromkeys(lines):  # each once
            runner.logger.info(f'attention: {line}')


@HOOKS.register_module()
class MagnitudeHook(Hook):
    """Log the magnitudes of features and attention logits at each stage.

    Features of a CrossFormer grow from stage to stage and in the course of training, and with
    them the logits of the attention, which then attends to few positions; the cooling layer of
    CrossFormer++ (arXiv 2303.06908, section 3.4) answers this. For each stage are logged, of the
    first process' batch:

    - ``magnitude/stage{i}/feature_std`` and ``feature_max``: standard deviation and largest
      absolute value of its output;
    - ``magnitude/stage{i}/logit_std`` and ``logit_max``: the same of the attention logits, position
      bias included, in its last block. These are of a sample of queries, all their keys and all
      heads: the largest may be a little larger.

    They are written with the other curves (TensorBoard with ``tools/train.py --tensorboard``, the
    JSON file in the work folder), and to the log in one line. The hook changes no result of the
    model, and is not in it between logged iterations.

    Args:
        interval (int): iterations between two measurements.
        groups (int): groups that are sampled in each stage.
        queries (int): queries that are sampled in each group.

    Raises:
        ValueError: the model has no CrossFormer, or a number is not positive.
    """

    def __init__(self, interval: int = 50, groups: int = 8, queries: int = 16):
        for name, number in dict(interval=interval, groups=groups, queries=queries).items():
            if not isinstance(number, int) or number < 1:
                raise ValueError(
                    f'MagnitudeHook: {name} must be a whole number of at least 1, got {number!r}.'
                )
        self.interval, self.groups, self.queries = interval, groups, queries
        self.handles: List = []
        self.magnitudes: Dict[str, Tensor] = {}

    def before_train(self, runner) -> None:
        found = [module for module in runner.model.modules() if isinstance(module, CrossFormer)]
        if not found:
            raise ValueError(
                'MagnitudeHook: the model has no CrossFormer; leave the hook out of custom_hooks.'
            )
        self.backbone = found[0]

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        if not self.every_n_train_iters(runner, self.interval) or runner.rank != 0:
            return
        for index, stage in enumerate(self.backbone.layers):
            features = partial(self.keep_features, f'stage{index}/feature')
            logits = partial(self.keep_logits, f'stage{index}/logit')
            self.handles += [
                stage.register_forward_hook(features),
                stage.blocks[-1].attn.register_forward_hook(logits),
            ]

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if not self.magnitudes:
            return
        values = dict(zip(self.magnitudes, torch.stack(list(self.magnitudes.values())).tolist()))
        self.magnitudes = {}
        runner.visualizer.add_scalars(
            {f'magnitude/{name}': value for name, value in values.items()}, step=runner.iter + 1
        )
        said = [
            f'{what} '
            + ' '.join(f'{value:.3g}' for name, value in values.items() if name.endswith(key))
            for what, key in (
                ('standard deviation of features', 'feature_std'),
                ('largest feature', 'feature_max'),
                ('standard deviation of logits', 'logit_std'),
                ('largest logit', 'logit_max'),
            )
        ]
        runner.logger.info(f"Magnitudes by stage: {'; '.join(said)}")

    def keep(self, name: str, values: Tensor) -> None:
        values = values.detach().float()
        self.magnitudes[f'{name}_std'] = values.std(correction=0)
        self.magnitudes[f'{name}_max'] = values.abs().max()

    def keep_features(self, name: str, stage: nn.Module, inputs, output: Tensor) -> None:
        self.keep(name, output)

    def keep_logits(self, name: str, attention: GroupAttention, inputs, output) -> None:
        self.keep(name, sample_logits(attention, *inputs, self.groups, self.queries))


@torch.no_grad()
def sample_logits(
    attention: GroupAttention,
    x: Tensor,
    rows: AxisRule,
    columns: AxisRule,
    groups: int,
    queries: int,
) -> Tensor:
    """Compute the attention logits of some queries in some of the largest groups of a map.

    Args:
        attention (GroupAttention): the attention.
        x (Tensor): (B, H, W, C), its input.
        rows, columns (AxisRule): the groups.
        groups, queries (int): how many are sampled at most; evenly spaced.

    Returns:
        Tensor: (groups, heads, queries, keys), ``scale * q @ k`` plus the position bias.
    """
    batch, map_height, map_width, _ = x.shape
    largest = max(
        group_map(map_height, map_width, rows, columns, x.device),
        key=lambda members: members[0].numel(),
    )
    count, height, width = largest.shape
    chosen_groups = spread(batch * count, groups, x.device)
    chosen = spread(height * width, queries, x.device)
    images, members = chosen_groups // count, largest.flatten(1)[chosen_groups % count]
    tokens = x.flatten(1, 2)[images[:, None], members]  # (groups, members, C)

    q, k, _ = attention.project(tokens)
    bias = attention.position_bias(chosen, height, width, rows, columns)
    return attention.logits(q, k, chosen, bias)


def spread(length: int, count: int, device) -> Tensor:
    """Return at most ``count`` indices of ``range(length)``, evenly spaced."""
    return torch.linspace(0, length - 1, min(length, count), device=device).round().long()


@HOOKS.register_module()
class ValidationSamplesHook(Hook):
    """Draw the predictions on the same few images at every validation, next to the ground truth.

    The visualizer's backends, such as TensorBoard, get a tag for each image and a step for each
    validation. (The libraries' hooks draw the first image of some batches, other ones each time.)

    The tag is the name of the image's file, with its folders if the images lie in several.

    Args:
        count (int): how many images, evenly spaced over the data set; in a distributed
            job over the part of the first process.
    """

    def __init__(self, count: int):
        self.count = count
        self.tags: Dict[str, str] = {}  # of the images that were drawn, by path

    def before_run(self, runner) -> None:
        check_drawing(runner.visualizer)

    def before_val(self, runner) -> None:
        if runner.rank == 0 and not self.tags:
            self.names = names_in(runner.val_dataloader.dataset)

    def after_val_iter(
        self, runner, batch_idx: int, data_batch=None, outputs: Sequence = ()
    ) -> None:
        if runner.rank != 0:
            return
        loader = runner.val_dataloader
        chosen = set(spread(len(loader.sampler), self.count, 'cpu').tolist())
        for index, sample in enumerate(outputs, start=batch_idx * loader.batch_size):
            if index in chosen:
                tag = self.tags.setdefault(sample.img_path, self.new_tag(sample.img_path))
                draw(runner.visualizer, loader.dataset, sample, name=tag, step=runner.iter)

    def new_tag(self, path: str) -> str:
        """Return a tag for an image, of characters that TensorBoard and file systems keep."""
        tag = 'val_' + re.sub(r'[^-\w.]', '_', self.names[path][0])
        return tag if tag not in self.tags.values() else f'{tag}-{len(self.tags)}'


def check_drawing(visualizer: Visualizer) -> None:
    """Raise a UserError if a visualizer draws no predictions: MMEngine's own does not."""
    kind = type(visualizer)
    if not hasattr(kind, 'visualize_cls') and kind.add_datasample is Visualizer.add_datasample:
        raise UserError(
            f"{kind.__name__} draws no predictions: give the visualizer of the model's library in "
            'the visualizer of the config.'
        )


def draw(visualizer, dataset, sample, **options) -> None:
    """Draw a prediction next to its ground truth, by a visualizer of MMDetection, MMSegmentation or
    MMPretrain with its options, on the image of a data set."""
    # A classifier's visualizer has a method of its own.
    by = getattr(visualizer, 'visualize_cls', visualizer.add_datasample)
    image = picture_in(dataset, sample.img_path)
    by(image=image, data_sample=sample.cpu(), **options)


class ShowPredictionsHook(Hook):
    """Draw the predictions on all images that are tested, next to the ground truth.

    Each picture has the path that its image has below the folder that all images share. (The
    libraries' hooks take the file's name only, so that of images of one name in several folders
    one is left.) The second and later samples of one image, such as persons of MMPose's, have
    their number at the end of the name.

    Args:
        folder (str): to write.
        **options: of the visualizer, such as ``pred_score_thr`` of MMDetection's.
    """

    def __init__(self, folder: str, **options):
        self.folder, self.options = Path(folder), options
        self.drawn: Counter = Counter()  # samples of images, by path

    def before_run(self, runner) -> None:
        check_drawing(runner.visualizer)

    def before_test(self, runner) -> None:
        self.dataset = runner.test_dataloader.dataset
        self.names = names_in(self.dataset)

    def after_test_iter(
        self, runner, batch_idx: int, data_batch=None, outputs: Sequence = ()
    ) -> None:
        for sample in outputs:
            name, _ = self.names[sample.img_path]
            if Path(name).suffix.lower() not in ('.jpg', '.jpeg', '.png'):
                name += '.png'
            self.drawn[name] += 1
            if self.drawn[name] > 1:
                path = Path(name)
                name = str(path.with_name(f'{path.stem}_{self.drawn[name]}{path.suffix}'))
            file = str(self.folder / name)
            draw(runner.visualizer, self.dataset, sample, name=name, out_file=file, **self.options)


class KeepLabelMapsHook(Hook):
    """Keep the label maps of all images that are tested, as PNG with the data set's own values.
    Each has the path that its image has below the folder that all images share."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def before_test(self, runner) -> None:
        self.names = names_in(runner.test_dataloader.dataset)

    def after_test_iter(
        self, runner, batch_idx: int, data_batch=None, outputs: Sequence = ()
    ) -> None:
        for sample in outputs:
            labels = sample.pred_sem_seg.data.squeeze(0).cpu().numpy()
            labels = labels + int(bool(sample.get('reduce_zero_label')))
            reason = write_labels(self.folder / f'{self.names[sample.img_path][1]}.png', labels)
            if reason:
                raise UserError(f'--out: {reason}.')
