"""Train a detector, a segmentor, a classifier, or another model of MMEngine's.

python tools/train.py configs/mask_rcnn/cf_s_1x.py --amp
"""

import logging
import sys
from pathlib import Path

from crossformer_mm.cli import argument_parser, read_config, run
from crossformer_mm.config_parts import kind_of
from crossformer_mm.engine.atomic_checkpoints import FULL
from crossformer_mm.engine.config import ensure_visualizer, import_package
from crossformer_mm.engine.mixed_precision import PRECISIONS, use_mixed_precision
from crossformer_mm.engine.newest_checkpoint import newest_checkpoint
from crossformer_mm.engine.preemption import NAMES, PreemptionHook
from crossformer_mm.engine.preflight import check_dataset, check_file, check_weight_files
from crossformer_mm.engine.runner import RobustRunnerMixin, build_runner
from crossformer_mm.errors import UserError
from crossformer_mm.files import check_writable

SKIPPED = 'skipped_images.txt'


def parse_args():
    parser = argument_parser('Train a detector, a segmentor or a classifier')
    parser.add_argument(
        '--amp',
        nargs='?',
        const='float16',
        choices=PRECISIONS,
        help='automatic mixed precision, in float16 (default; GPU) or bfloat16 (GPU or CPU)',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the actual total batch size',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from CHECKPOINT, or from the newest one in the work folder',
    )
    parser.add_argument(
        '--tensorboard-samples',
        type=int,
        metavar='N',
        help='also log to TensorBoard, with the predictions on N validation images '
        'at every validation',
    )
    parser.add_argument(
        '--skip-bad-images',
        action='store_true',
        help='skip images that cannot be used and list them in '
        f'WORK_DIR/{SKIPPED} (default: stop at the first)',
    )
    parser.add_argument(
        '--signals',
        nargs='+',
        default=[],
        metavar='NAME',
        choices=NAMES,
        help='signals, such as SIGUSR2, that end the training with a checkpoint and status 75, '
        'as SIGTERM and SIGUSR1 do',
    )
    parser.add_argument(
        '--allow-non-finite',
        action='store_true',
        help='train on with a loss or a gradient that is not finite (default: stop)',
    )
    # --amp without a type may stand before the config.
    args = parser.parse_args(
        [
            '--amp=float16' if word == '--amp' and following not in PRECISIONS else word
            for word, following in zip(sys.argv[1:], [*sys.argv[2:], None])
        ]
    )
    if args.tensorboard_samples is not None:
        if args.tensorboard_samples < 1:
            raise UserError(
                f'--tensorboard-samples must be at least 1, got {args.tensorboard_samples}.'
            )
        args.tensorboard = True
    return args


def check_weights(cfg, args) -> None:
    """Check that the files of weights exist; print a note if no weights are given."""
    if args.resume and args.resume != 'auto':
        check_file('--resume', args.resume)
        cfg.resume, cfg.load_from = True, args.resume
    pretrained, backbone = check_weight_files(cfg), cfg.model.get('backbone')
    if not pretrained and not args.resume:
        # CrossFormer itself warns.
        if isinstance(backbone, dict) and kind_of(backbone) != 'CrossFormer':
            print(
                'No pretrained checkpoint is given, the backbone starts from random weights: '
                'name a file with --cfg-options model.backbone.init_cfg.checkpoint=FILE.'
            )


def main():
    args = parse_args()
    cfg = read_config(args)
    if args.amp:
        use_mixed_precision(cfg, args.amp)
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise UserError(
                f"--auto-scale-lr: config '{args.config}' names no auto_scale_lr.base_batch_size."
            )
        cfg.auto_scale_lr.enable = True
    check_weights(cfg, args)
    check_dataset(cfg, 'train', 'val')
    if args.tensorboard_samples:
        if not cfg.get('val_dataloader'):
            raise UserError(f"--tensorboard-samples: config '{args.config}' has no val_dataloader.")
        ensure_visualizer(cfg)
        cfg.custom_hooks = [
            *(cfg.get('custom_hooks') or []),
            dict(type='ValidationSamplesHook', count=args.tensorboard_samples),
        ]
        import_package(cfg)
    check_writable('--work-dir', cfg.work_dir)
    runner = build_runner(cfg)
    if isinstance(runner, RobustRunnerMixin):
        runner.resume_newest = args.resume == 'auto'
        runner.hook_of(PreemptionHook).listen_to(args.signals)
        if args.allow_non_finite:
            runner.allow_non_finite()
        if args.skip_bad_images:
            runner.skip_bad_images(str(Path(cfg.work_dir) / SKIPPED), anew=not args.resume)
    elif args.resume or args.skip_bad_images or args.signals:
        raise UserError(
            '--resume, --signals and --skip-bad-images need a runner of MMEngine, config '
            f"'{args.config}' has runner_type {cfg.runner_type!r}."
        )
    logging.raiseExceptions = False  # a full disk ends the run below, not with each line of the log
    try:
        runner.train()
    except OSError as error:
        if error.errno not in FULL:
            raise
        newest, _ = newest_checkpoint(runner)
        raise UserError(
            f"'{error.filename or cfg.work_dir}' could not be written: {error.strerror}; "
            + (
                f"once it can, go on from '{newest}' with --resume."
                if newest
                else 'there is no checkpoint yet.'
            )
        ) from None


if __name__ == '__main__':
    run(main)
