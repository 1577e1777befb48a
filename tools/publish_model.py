"""Publish a checkpoint: keep weights and metadata, remove the training state.

    python tools/publish_model.py work_dirs/mask_rcnn/cf_s_1x/epoch_12.pth mask_rcnn_cf_s_1x.pth

writes mask_rcnn_cf_s_1x-1a2b3c4d.pth, with the first 8 digits of the file's sha256 in its name.

    python tools/publish_model.py work_dirs/mask_rcnn/cf_s_1x/epoch_12.pth --hub mask_rcnn_cf_s_1x

writes a folder that model hubs take: model.safetensors, config.py, config.json, a model card in
README.md, and SHA256SUMS.
"""

import argparse
import hashlib
import io
import json
import tempfile
from collections import OrderedDict
from pathlib import Path

import torch

from crossformer_mm.checkpoint import read_checkpoint, require_safetensors, weights_in
from crossformer_mm.cli import run
from crossformer_mm.engine.preflight import check_file
from crossformer_mm.errors import UserError
from crossformer_mm.files import check_writable, write_whole
from crossformer_mm.hub import hub_files

SUFFIXES = ('.pth', '.pt', '.safetensors')
# Keys of `meta` that inferencers and readers, current and of MMDetection 2, look for.
KEPT_META = (
    'dataset_meta',
    'cfg',
    'config',
    'CLASSES',
    'PALETTE',
    'epoch',
    'iter',
    'mmengine_version',
    'mmdet_version',
    'mmseg_version',
)


def parse_args():
    parser = argparse.ArgumentParser(
        description="Remove training state and append the file's hash to its name"
    )
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        'out', nargs='?', help='NAME.pth or NAME.safetensors: NAME-HASH with this suffix is written'
    )
    parser.add_argument(
        '--safetensors', action='store_true', help='write safetensors, whatever the suffix'
    )
    parser.add_argument(
        '--hub', metavar='DIR', help='write a folder with safetensors, configs and a model card'
    )
    parser.add_argument(
        '--license',
        metavar='ID',
        default='unknown',
        help='licence of the weights in the model card, such as apache-2.0 (default: unknown)',
    )
    args = parser.parse_args()
    if (args.out is None) == (args.hub is None):
        parser.error('give the file to write, or --hub DIR.')
    return args


def target(out: str, safetensors: bool) -> Path:
    """Return the path to write, without the hash, or raise a UserError if it cannot be written."""
    path = Path(out)
    if safetensors:
        stem = path.stem if path.suffix in SUFFIXES else path.name
        path = path.with_name(f'{stem}.safetensors')
    if path.suffix not in SUFFIXES:
        raise UserError(f"'{out}' must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    if not path.parent.is_dir():
        raise UserError(f"folder '{path.parent}' does not exist.")
    if path.suffix == '.safetensors':
        require_safetensors()
    return path


def write_folder(folder: Path, args: argparse.Namespace) -> None:
    """Write a folder for a hub: all of it, or nothing, with a UserError."""
    require_safetensors()
    if folder.exists():
        raise UserError(f"'{folder}' is there already; nothing was written.")
    check_writable('--hub', folder.parent)
    checkpoint = read_checkpoint(args.checkpoint)
    weights = serialized(published(checkpoint, args.checkpoint), safetensors=True)
    meta = checkpoint.get('meta') or {}
    files = hub_files(folder.name, weights, meta, Path(args.checkpoint), args.license)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        staged = Path(temporary, folder.name)
        staged.mkdir()
        for name, data in files.items():
            write_whole(staged / name, data)
        staged.rename(folder)
    print(folder)


def published(checkpoint, name: str) -> dict:
    """Return weights and metadata; copies, as a tensor may be a part of a larger one on disk."""
    weights = OrderedDict(
        (key, value.detach().clone(memory_format=torch.contiguous_format))
        for key, value in weights_in(checkpoint, name).items()
    )
    meta = checkpoint.get('meta')
    meta = meta if isinstance(meta, dict) else {}
    return dict(state_dict=weights, meta={key: meta[key] for key in KEPT_META if key in meta})


def serialized(content: dict, safetensors: bool) -> bytes:
    """Serialize a checkpoint; equal content gives equal bytes."""
    if safetensors:
        from safetensors.torch import save

        meta = json.dumps(content['meta'], default=lambda value: value.tolist())  # of numpy
        return save(content['state_dict'], metadata=dict(format='pt', meta=meta))
    buffer = io.BytesIO()  # a file would put its name inside
    torch.save(content, buffer)
    return buffer.getvalue()


def main():
    args = parse_args()
    check_file('checkpoint', args.checkpoint)
    if args.hub is not None:
        write_folder(Path(args.hub), args)
        return
    path = target(args.out, args.safetensors)
    content = published(read_checkpoint(args.checkpoint), args.checkpoint)
    data = serialized(content, path.suffix == '.safetensors')
    digits = hashlib.sha256(data).hexdigest()[:8]
    final = path.with_name(f'{path.stem}-{digits}{path.suffix}')
    if final.exists():
        raise UserError(f"'{final}' is there already; nothing was written.")
    write_whole(final, data)
    print(final)


if __name__ == '__main__':
    run(main)
