"""Train a detector, a segmentor or a classifier.

    python tools/train.py configs/mask_rcnn/cf_s_1x.py --amp
"""
import logging
from pathlib import Path

import torch

from crossformer_mm.checkpoint import read_checkpoint
from crossformer_mm.engine.command_line import (CheckWeights, argument_parser, check_dataset,
                                                check_file, check_writable, fail, read_config, run,
                                                sentences_for)
from crossformer_mm.engine.runner import CarefulRunner
from crossformer_mm.engine.whole_files import FULL, newest_checkpoint

SKIPPED = 'skipped_images.txt'


def parse_args():
    parser = argument_parser('Train a detector, a segmentor or a classifier')
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision (GPU)')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate by the actual total batch size')
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='go on from CHECKPOINT, or from the newest one in the work folder')
    parser.add_argument('--tensorboard-samples', type=int, metavar='N',
                        help='also log to TensorBoard, with the predictions on N validation images '
                        'at every validation')
    parser.add_argument('--skip-bad-images', action='store_true',
                        help='train on without images that cannot be used, and list them in '
                        f'WORK_DIR/{SKIPPED} (default: stop at the first)')
    args = parser.parse_args()
    if args.tensorboard_samples is not None:
        if args.tensorboard_samples < 1:
            fail(f'--tensorboard-samples must be at least 1, got {args.tensorboard_samples}.')
        args.tensorboard = True
    return args


def choose_checkpoint(cfg, given: str) -> None:
    """Let the configuration say where to go on; without a whole checkpoint, at the start."""
    checkpoint = newest_checkpoint(cfg.work_dir) if given == 'auto' else given
    if checkpoint is None:
        print(f"--resume: '{cfg.work_dir}' has no whole checkpoint, training starts anew.")
        return
    check_file('--resume', checkpoint)
    cfg.resume, cfg.load_from = True, checkpoint
    meta = read_checkpoint(checkpoint).get('meta') or {}
    if cfg.setdefault('randomness', {}).get('seed') is None:
        cfg.randomness.seed = meta.get('seed')  # of the data's order, which is settled early


def main():
    args = parse_args()
    cfg = read_config(args)
    if args.amp:
        if not torch.cuda.is_available():
            fail('--amp needs a GPU, and PyTorch sees none: leave it out to train in float32.')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            fail(f"--auto-scale-lr: config '{args.config}' names no auto_scale_lr.base_batch_size.")
        cfg.auto_scale_lr.enable = True
    if args.resume:
        with sentences_for(ValueError, FileNotFoundError):
            choose_checkpoint(cfg, args.resume)
    if cfg.get('load_from'):
        check_file('load_from', cfg.load_from)
    pretrained = (cfg.model.get('backbone', {}).get('init_cfg') or {}).get('checkpoint')
    if pretrained:
        check_file('model.backbone.init_cfg.checkpoint', pretrained)
    elif cfg.model.get('backbone', {}).get('type') != 'CrossFormer' and not cfg.get('load_from'):
        # CrossFormer says so itself.
        print('No pretrained checkpoint is given, the backbone starts from random weights: name a '
              'file with --cfg-options model.backbone.init_cfg.checkpoint=FILE.')
    check_dataset(cfg, 'train', 'val')
    if args.tensorboard_samples:
        if not cfg.get('val_dataloader'):
            fail(f"--tensorboard-samples: config '{args.config}' has no val_dataloader.")
        cfg.custom_hooks = [*cfg.get('custom_hooks', []),
                            dict(type='ValidationSamplesHook', count=args.tensorboard_samples)]
    check_writable('--work-dir', cfg.work_dir)
    runner = CarefulRunner.from_cfg(cfg)
    if args.skip_bad_images:
        runner.skip_bad_images(str(Path(cfg.work_dir) / SKIPPED), anew=not cfg.resume)
    runner.register_hook(CheckWeights(
        'Give the config that it was trained with.', resume=bool(cfg.resume),
        # A model may start from one with other heads, for other classes; of another backbone
        # nothing is of use.
        required='' if cfg.resume else 'backbone.'))
    logging.raiseExceptions = False  # a full disk ends the run below, not with each line of the log
    try:
        runner.train()
    except OSError as error:
        if error.errno not in FULL:
            raise
        newest = newest_checkpoint(cfg.work_dir)
        fail(f"'{error.filename or cfg.work_dir}' could not be written: {error.strerror}; "
             + (f"once it can, go on from '{newest}' with --resume." if newest else
                'there is no checkpoint yet.'))


if __name__ == '__main__':
    run(main)
