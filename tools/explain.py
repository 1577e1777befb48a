"""Visualise what a CrossFormer computes for an image.

    python tools/explain.py configs/mask_rcnn/cf_s_1x.py mask-rcnn-cf-s-coco-1x.pth photo.jpg \\
        --out pictures

writes
    groups.png          which positions attend to each other, in each stage
    attention.png       where one position attends, at short and at long distance
    features.png        the four features
    position_bias.png   the learnt bias of each offset between query and key
    embedding.png       which kernel of the cross-scale embedding carries how much
    contact_sheet.png   all of these
and replaces existing ones.

    python tools/explain.py configs/mask_rcnn/cf_s_1x.py mask-rcnn-cf-s-coco-1x.pth photo.jpg \\
        --html photo.html

writes one self-contained page: point at a position to see where it attends.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

from mmengine.registry import MODELS, init_default_scope

from crossformer_mm.checkpoint import load_backbone
from crossformer_mm.cli import add_cfg_options, run
from crossformer_mm.config_parts import data_sets_of, kind_of
from crossformer_mm.engine.config import DENSE, load_config
from crossformer_mm.engine.preflight import check_file
from crossformer_mm.errors import UserError
from crossformer_mm.explain.capture import Scene, capture
from crossformer_mm.explain.image import load_image, normalize
from crossformer_mm.files import check_writable
from crossformer_mm.pictures import as_picture

MAX_MB = 15  # of a page by default


def parse_args():
    parser = argparse.ArgumentParser(
        description='Make pictures of the groups, the attention, the position bias, the embedding '
        'and the features of a CrossFormer on an image'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file of the model, or of the backbone')
    parser.add_argument('image', help='image file')
    parser.add_argument('--out', metavar='DIR', help='folder for the pictures')
    parser.add_argument('--html', metavar='FILE', help='write an interactive HTML page')
    parser.add_argument(
        '--caption',
        nargs='+',
        metavar='TEXT',
        help='text below the title of the page; a second one is that of its Chinese version',
    )
    parser.add_argument(
        '--max-mb',
        type=float,
        metavar='MB',
        help='largest size of the page: values are rounded until they fit, and the page says how '
        f'exact they are (default: {MAX_MB})',
    )
    parser.add_argument(
        '--position',
        type=int,
        nargs=2,
        metavar=('X', 'Y'),
        help='pixel of the image whose attention is shown (default: the centre)',
    )
    parser.add_argument(
        '--head',
        type=int,
        metavar='N',
        help='show the attention of this head, counted from 0 (default: the mean of all)',
    )
    parser.add_argument(
        '--scale',
        type=int,
        nargs=2,
        metavar=('LONG', 'SHORT'),
        help="largest sides that the image is resized to (default: the config's when testing)",
    )
    add_cfg_options(parser)
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Raise a UserError for what is wrong whatever the config says."""
    if not args.out and not args.html:
        raise UserError('nothing to write: name a folder by --out, or a file by --html.')
    if args.out and find_spec('matplotlib') is None:
        raise UserError('--out needs the package matplotlib, which is not installed.')
    check_file('checkpoint', args.checkpoint)
    check_file('image', args.image)
    if args.scale and min(args.scale) < 1:
        raise UserError(
            f'--scale must be two numbers of at least 1, got {args.scale[0]} {args.scale[1]}.'
        )
    if args.out and Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"--out: '{args.out}' is not a folder.")
    if args.html and Path(args.html).is_dir():
        raise UserError(f"--html: '{args.html}' is a folder; name a file.")
    for option, given in (('--max-mb', args.max_mb), ('--caption', args.caption)):
        if given is not None and not args.html:
            raise UserError(f'{option} is of the page that --html writes.')
    if args.caption and len(args.caption) > 2:
        raise UserError(f'--caption takes one or two texts, got {len(args.caption)}.')
    if args.max_mb is not None and not args.max_mb > 0:
        raise UserError(f'--max-mb must be above 0, got {args.max_mb}.')


def make_scene(args: argparse.Namespace) -> Scene:
    """Build the config's backbone and run it on the image."""
    cfg = load_config(args.config, args.cfg_options, DENSE)
    init_default_scope(cfg.default_scope)
    kind = kind_of(cfg.model.backbone)
    if kind != 'CrossFormer':
        raise UserError(f"config '{args.config}' has the backbone {kind}, no CrossFormer.")
    try:
        backbone = MODELS.build(cfg.model.backbone).eval()
    except ValueError as error:
        raise UserError(str(error)) from None
    load_backbone(backbone, args.checkpoint)
    heads = max(layer.blocks[0].attn.num_heads for layer in backbone.layers)
    if args.head is not None and not 0 <= args.head < heads:
        raise UserError(f'--head must be from 0 to {heads - 1}, got {args.head}.')

    dataset = next(iter(data_sets_of(cfg, 'test')), {})
    pipeline = dataset.get('pipeline') or cfg.get('test_pipeline') or [None]
    resized = (step.get('scale') for step in pipeline[1:] if kind_of(step) == 'Resize')
    image, factor = load_image(
        args.image, pipeline[0], args.scale or next(resized, None), backbone.in_channels
    )
    height, width = (round(side / factor) for side in image.shape[:2])
    x, y = args.position or (width // 2, height // 2)
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(
            f'--position must lie in the image, which is {width} wide and {height} high, '
            f'got {x} {y}.'
        )
    position = (min(int(x * factor), image.shape[1] - 1), min(int(y * factor), image.shape[0] - 1))
    if args.html:
        check_writable('--html', Path(args.html).parent)
    captured = capture(backbone, normalize(image, cfg.model.get('data_preprocessor') or {}))
    return Scene(backbone, as_picture(image)[..., ::-1] / 255.0, captured, position, args.head)


def main():
    args = parse_args()
    check(args)
    scene = make_scene(args)
    if args.out:
        from crossformer_mm.explain.figures import write_pictures  # needs Matplotlib

        for path in write_pictures(scene, Path(args.out)):
            print(path, flush=True)
    if args.html:
        from crossformer_mm.explain.page import write_page

        names = dict(
            model=Path(args.config).stem, image=Path(args.image).name, caption=args.caption
        )
        written = write_page(Path(args.html), scene, names, int((args.max_mb or MAX_MB) * 1e6))
        print(
            f'{args.html}: {written.bytes / 1e6:.2f} MB; its attention weights are off by '
            f'{written.usual * 100:.2g}% of their value (root mean square), and by at most '
            f'{written.worst * 100:.2g} percentage points, where compared'
        )


if __name__ == '__main__':
    run(main)
