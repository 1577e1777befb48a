"""Train a detector or a segmentor.

    python tools/train.py configs/mask_rcnn/cf_s_1x.py --amp
"""
from common import (CheckWeights, argument_parser, check_dataset, check_file, fail, read_config, run,
                    sentences_for)
from mmengine.runner import Runner
import torch


def parse_args():
    parser = argument_parser('Train a detector or a segmentor')
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision (GPU)')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate by the actual total batch size')
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='go on from CHECKPOINT, or from the newest one in the work folder')
    parser.add_argument('--tensorboard-samples', type=int, metavar='N',
                        help='also log to TensorBoard, with the predictions on N validation images '
                        'at every validation')
    args = parser.parse_args()
    if args.tensorboard_samples is not None:
        if args.tensorboard_samples < 1:
            fail(f'--tensorboard-samples must be at least 1, got {args.tensorboard_samples}.')
        args.tensorboard = True
    return args


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
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if cfg.get('load_from'):
        check_file('--resume' if args.resume else 'load_from', cfg.load_from)
    pretrained = (cfg.model.get('backbone', {}).get('init_cfg') or {}).get('checkpoint')
    if pretrained:
        check_file('model.backbone.init_cfg.checkpoint', pretrained)
    check_dataset(cfg, 'train', 'val')
    if args.tensorboard_samples:
        if not cfg.get('val_dataloader'):
            fail(f"--tensorboard-samples: config '{args.config}' has no val_dataloader.")
        cfg.custom_hooks = [*cfg.get('custom_hooks', []),
                            dict(type='ValidationSamplesHook', count=args.tensorboard_samples)]
    with sentences_for(ValueError, FileNotFoundError):
        runner = Runner.from_cfg(cfg)
    runner.register_hook(CheckWeights(
        'Give the config that it was trained with.', resume=bool(cfg.resume),
        # A model may start from one with other heads, for other classes; of another backbone
        # nothing is of use.
        required='' if cfg.resume else 'backbone.'))
    runner.train()


if __name__ == '__main__':
    run(main)
