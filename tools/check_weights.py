"""Check a file of weights: which model of configs/ it is of, and whether it is complete.

    python tools/check_weights.py mask-rcnn-cf-s-coco-1x.pth

prints one line with the config that the weights fit, their number and the file's SHA-256. A file
that is cut short, or fits no config, ends with an error that names what is missing. Where the name
ends in a hash, as tools/publish_model.py writes it, the content must have it.
"""

import argparse
import hashlib
import re
from pathlib import Path

import torch
from mmengine.registry import MODELS, init_default_scope

from crossformer_mm.checkpoint import differences, model_weights, read_checkpoint, weights_in
from crossformer_mm.cli import run
from crossformer_mm.engine.config import load_config
from crossformer_mm.engine.preflight import check_file
from crossformer_mm.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
# Folders of configs by a prefix of keys. The files of backbones have none of them.
FOLDERS = {
    'roi_head.': ('mask_rcnn', 'cascade_mask_rcnn'),
    'bbox_head.': ('retinanet',),
    'decode_head.': ('upernet', 'semantic_fpn'),
    '': ('imagenet',),
}


def misfits(config: Path, checkpoint: dict, name: str) -> tuple:
    """Return the number of keys that do not fit a config's model, and a description of them."""
    cfg = load_config(str(config))
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    own, weights = model.state_dict(), model_weights(model, checkpoint, name)
    missing, unexpected = own.keys() - weights.keys(), weights.keys() - own.keys()
    shapes = {key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape}
    described = '; '.join(differences(missing, unexpected, weights, own))
    return len(missing | unexpected | shapes), described


def main():
    parser = argparse.ArgumentParser(description='Tell which model a file has the weights of')
    parser.add_argument('checkpoint', help='.pth or .safetensors file')
    file = Path(parser.parse_args().checkpoint)
    check_file('checkpoint', str(file))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    named = re.search('-([0-9a-f]{8})$', file.stem)
    if named and not digest.startswith(named[1]):
        raise UserError(
            f"'{file}' is damaged: its SHA-256 begins with {digest[:8]}, not as its name says."
        )
    checkpoint = read_checkpoint(str(file))
    weights = weights_in(checkpoint, str(file))
    keys = tuple(weights)
    folders = next(
        folders
        for prefix, folders in FOLDERS.items()
        if any(key.startswith(prefix) for key in keys)
    )
    closest = None
    for config in sorted(
        path for name in folders for path in (ROOT / 'configs' / name).glob('c*.py')
    ):
        count, described = misfits(config, checkpoint, str(file))
        name = config.relative_to(ROOT).as_posix()
        if not count:
            millions = sum(value.numel() for value in weights.values()) / 1e6
            size = f'{len(keys)} tensors, {millions:.1f} M numbers'
            print(f"'{file}' is complete: {name}, {size}, SHA-256 {digest}")
            return
        if closest is None or count < closest[0]:
            closest = count, name, described
    raise UserError(f"'{file}' fits no config; the closest, {closest[1]}: {closest[2]}.")


if __name__ == '__main__':
    run(main)
