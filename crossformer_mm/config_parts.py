"""Parts of a config: names of classes, data sets inside wrappers, metrics."""

from typing import Iterator, List


def kind_of(part: dict) -> str:
    """Return the name of the class that a part of a config builds, given by name or as a class."""
    kind = part.get('type')
    return kind.rpartition('.')[2] if isinstance(kind, str) else getattr(kind, '__name__', '')


def data_sets(dataset: dict) -> Iterator[dict]:
    """Yield the configs of the data sets inside wrappers such as RepeatDataset, ConcatDataset."""
    if 'dataset' in dataset:
        yield from data_sets(dataset['dataset'])
    elif 'datasets' in dataset:
        for one in dataset['datasets']:
            yield from data_sets(one)
    else:
        yield dataset


def data_sets_of(cfg, split: str) -> List[dict]:
    """List the configs of a split's data sets; there are none without a data loader."""
    loader = cfg.get(f'{split}_dataloader')
    return list(data_sets(loader['dataset'])) if loader else []


def innermost(dataset: dict) -> dict:
    """Return the config of the first data set inside wrappers."""
    return next(data_sets(dataset))


def metrics_of(cfg, split: str) -> List[dict]:
    """List the configs of a split's metrics, given as one or several."""
    evaluator = cfg.get(f'{split}_evaluator') or []
    if isinstance(evaluator, dict) and 'metrics' in evaluator:
        evaluator = evaluator['metrics']
    return list(evaluator) if isinstance(evaluator, (list, tuple)) else [evaluator]
