"""Files of a folder that model hubs take: weights, configs, a model card and checksums.

The card has the YAML header of Hugging Face's. ``config.json`` has the keys that timm reads.
"""

import ast
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Dict, List

import yaml
from mmengine.config import Config

from .architectures import TIMM_NAMES
from .backbone import groups_of
from .config_parts import data_sets_of, kind_of
from .errors import UserError
from .version import __version__

# Arguments that timm passes in its own way, and arguments that only training needs.
NOT_OF_TIMM = {'arch', 'in_channels', 'drop_rate', 'out_indices'}
TRAINING = {'type', 'init_cfg', 'frozen_stages', 'with_cp', 'attention_path'}
TASKS = dict(
    mmdet='object-detection', mmseg='image-segmentation', mmpretrain='image-classification'
)


def hub_files(
    name: str, weights: bytes, meta: dict, source: Path, licence: str
) -> Dict[str, bytes]:
    """Return the content of each file of a folder.

    Args:
        name (str): of the model.
        weights (bytes): a safetensors file.
        meta (dict): the checkpoint's; its ``cfg`` is the text of the config.
        source (Path): the checkpoint, next to which its training's logs are.
        licence (str): of the weights, by its identifier.

    Raises:
        UserError: there is no config, or no CrossFormer in it.
    """
    if not isinstance(meta.get('cfg'), str):
        raise UserError(
            f"'{source}' has no config inside: a folder for a hub is made of a checkpoint of "
            'tools/train.py.'
        )
    cfg = read_config(meta['cfg'], str(source))
    if kind_of(cfg.get('model', {}).get('backbone', {})) != 'CrossFormer':
        raise UserError(f"'{source}' is not of a model with the backbone CrossFormer.")
    files = {
        'model.safetensors': weights,
        'config.py': cfg.pretty_text.encode(),
        'config.json': (json.dumps(json_config(cfg), indent=2) + '\n').encode(),
        'README.md': model_card(name, cfg, meta, source, licence).encode(),
    }
    sums = ''.join(f'{hashlib.sha256(data).hexdigest()}  {file}\n' for file, data in files.items())
    return {**files, 'SHA256SUMS': sums.encode()}


def read_config(text: str, name: str) -> Config:
    """Read a config's text, as MMEngine writes it, without executing it.

    What concerns one training only is left out: its folder, and the weights that it began with.

    Raises:
        UserError: it has anything but literals and ``dict``.
    """

    def value(node: Any) -> Any:
        if isinstance(node, ast.Call) and ast.unparse(node.func) == 'dict' and not node.args:
            return {keyword.arg: value(keyword.value) for keyword in node.keywords}
        if isinstance(node, ast.Dict):
            return {value(key): value(one) for key, one in zip(node.keys, node.values)}
        if isinstance(node, (ast.List, ast.Tuple)):
            values = [value(one) for one in node.elts]
            return values if isinstance(node, ast.List) else tuple(values)
        return ast.literal_eval(node)

    try:
        lines: List[Any] = ast.parse(text).body
        values = {line.targets[0].id: value(line.value) for line in lines}
    except (SyntaxError, ValueError, AttributeError):
        raise UserError(f"the config in '{name}' holds more than values and was not run.") from None
    values.update(load_from=None, resume=False)
    values.pop('work_dir', None)
    values.get('model', {}).get('backbone', {}).pop('init_cfg', None)
    return Config(values)


def json_config(cfg: Config) -> dict:
    """Return the backbone's arguments, and what timm reads of a model; without ``architecture`` if
    that is none of ``TIMM_NAMES``."""
    backbone = {key: one for key, one in cfg.model.backbone.items() if key not in TRAINING}
    arch = backbone.get('arch', 's')
    config = dict(crossformer_mm=__version__, backbone=backbone)
    if not isinstance(arch, str):
        return config
    classes = cfg.model.head.num_classes if cfg.get('default_scope') == 'mmpretrain' else 0
    images = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    test = next(iter(data_sets_of(cfg, 'test')), {})
    steps = {kind_of(step): step for step in test.get('pipeline', ())}
    size, crop = 224, steps.get('CenterCrop', {}).get('crop_size')
    pretrained = dict(num_classes=classes, classifier='head.fc', interpolation='bicubic')
    for key in ('mean', 'std'):
        if images.get(key):
            pretrained[key] = [one / 255 for one in images[key]]
    if isinstance(crop, int) and 'ResizeEdge' in steps:
        size, pretrained['crop_pct'] = crop, crop / steps['ResizeEdge'].scale
        pretrained['interpolation'] = steps['ResizeEdge'].get('interpolation', 'bilinear')
    pretrained['input_size'] = [backbone.get('in_channels', 3), size, size]
    arguments = {key: one for key, one in backbone.items() if key not in NOT_OF_TIMM}
    # Always written: the groups of a CrossFormer++ in timm are others than the backbone's defaults.
    groups = groups_of(backbone)
    return dict(
        architecture=TIMM_NAMES[arch],
        num_classes=classes,
        model_args={**groups, **arguments},
        pretrained_cfg=pretrained,
        **config,
    )


def read_metrics(cfg: Config, meta: dict, source: Path) -> Dict[str, float]:
    """Return what the training measured of these weights; empty if its log is not there."""
    log = run_folder(meta, source) / 'vis_data/scalars.json'
    by_epoch = cfg.get('default_hooks', {}).get('logger', {}).get('log_metric_by_epoch', True)
    found = {}
    for line in log.read_text(encoding='utf-8').splitlines() if log.is_file() else ():
        values = json.loads(line)
        if 'loss' not in values and values.get('step') == meta.get('epoch' if by_epoch else 'iter'):
            found = values
    # COCO's evaluation returns -1 where there is no object to measure.
    return {
        key: round(one, 4)
        for key, one in found.items()
        if key not in ('step', 'time', 'data_time') and one != -1
    }


def read_processor(meta: dict, source: Path) -> str:
    """Return the processor that the training's log names."""
    folder = run_folder(meta, source)
    log = folder / f'{folder.name}.log'
    text = log.read_text(encoding='utf-8', errors='replace') if log.is_file() else ''
    gpus = re.findall(r'^ +GPU ([\d,]+): (.+)$', text, re.MULTILINE)
    if gpus:
        return ', '.join(f"{len(numbers.split(','))} x {name}" for numbers, name in gpus)
    cpu = re.search(r'CUDA available: False.*?CPU capability usage: (\S+)', text, re.DOTALL)
    return f'a CPU ({cpu[1]})' if cpu else 'unknown'


def run_folder(meta: dict, source: Path) -> Path:
    """Return the folder of the logs of the training that wrote a checkpoint."""
    return source.parent / str(meta.get('experiment_name', ''))[-len('20261129_185938') :]


def model_card(name: str, cfg: Config, meta: dict, source: Path, licence: str) -> str:
    """Return the text of README.md."""
    task = TASKS.get(cfg.get('default_scope', ''), 'other')
    metrics = read_metrics(cfg, meta, source)
    val, train = (data_sets_of(cfg, split) for split in ('val', 'train'))
    classes = [str(one) for one in (meta.get('dataset_meta') or {}).get('classes', ())]
    header: Dict[str, Any] = dict(license=licence, library_name='crossformer_mm', pipeline_tag=task)
    header['tags'] = ['crossformer', cfg.get('default_scope', 'mmengine')]
    if metrics and val:
        data = dict(name=kind_of(val[0]), type=annotations_of(val[0]))
        rows = [dict(type=key, value=one) for key, one in metrics.items()]
        result = dict(task=dict(type=task), dataset=data, metrics=rows)
        header['model-index'] = [dict(name=name, results=[result])]
    table = ''.join(f'| {key} | {one} |\n' for key, one in metrics.items())
    backbone = json_config(cfg)['backbone']
    arguments = ''.join(f'    {key}={one!r},\n' for key, one in backbone.items())
    length = f"{meta['epoch']} epochs" if meta.get('epoch') else f"{meta.get('iter')} iterations"
    return CARD.format(
        header=yaml.safe_dump(header, sort_keys=False),
        name=name,
        kind=kind_of(cfg.model),
        length=length,
        processor=read_processor(meta, source),
        metrics=f'| metric | value |\n|---|---|\n{table}'
        if metrics
        else "The training's log has no validation of these weights.\n",
        train=describe(train),
        val=describe(val),
        classes=f"{len(classes)}: {', '.join(classes)}" if classes else 'unknown',
        licence=licence,
        arguments=arguments,
    )


def describe(datasets: list) -> str:
    """Return the type and the annotations of each data set."""
    return '; '.join(f'{kind_of(one)}, `{annotations_of(one)}`' for one in datasets) or 'unknown'


def annotations_of(dataset: dict) -> str:
    """Return where a data set's annotations are."""
    prefix = dataset.get('data_prefix') or {}
    inside = dataset.get('ann_file') or (
        prefix.get('img_path', '') if isinstance(prefix, dict) else prefix
    )
    return str(Path(dataset.get('data_root') or '', inside))


CARD = '''\
---
{header}---

# {name}

{kind} with a [CrossFormer](https://arxiv.org/abs/2108.00154) backbone, trained for {length}.

## Metrics

{metrics}
Processor of the training and of its validation: {processor}.

## Data

- Training: {train}
- Validation: {val}
- Classes: {classes}

## Intended use

Images like those of the training, and the classes above. Results on other images are unknown:
measure them on yours first.

## Use

In a checkout of crossformer_mm, with FOLDER for this folder:

```shell
python tools/predict.py FOLDER/config.py FOLDER/model.safetensors IMAGES --out predictions
```

The backbone alone, in this folder:

```python
from crossformer_mm import CrossFormer

backbone = CrossFormer(
{arguments}    init_cfg=dict(type='Pretrained', checkpoint='model.safetensors'),
)
backbone.init_weights()
```

`config.json` has these arguments, too. `sha256sum --check SHA256SUMS` checks the files.

## Licence

The licence of the weights: {licence}.
'''
