"""Evaluate a checkpoint of a detector, a segmentor or a classifier.

    python tools/test.py configs/upernet/cf_s_160k.py work_dirs/cf_s_160k/iter_160000.pth --tta
"""
from pathlib import Path

from mmengine.config import ConfigDict
from mmengine.registry import METRICS

from crossformer_mm.engine.command_line import (CheckWeights, argument_parser, check_dataset,
                                                check_file, check_writable, fail, innermost,
                                                read_config, run)
from crossformer_mm.engine.runner import CarefulRunner


def parse_args():
    parser = argument_parser('Evaluate a checkpoint of a detector, a segmentor or a classifier')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', help='keep the predictions: a .pkl file for a detector or a '
                        'classifier, a folder of label maps for a segmentor')
    parser.add_argument('--show-dir', help='folder for pictures of predictions beside ground truth')
    parser.add_argument('--tta', action='store_true',
                        help='test-time augmentation, as the config defines it')
    parser.add_argument('--allow-partial', action='store_true',
                        help='evaluate even if weights are missing, unexpected or of another shape')
    return parser.parse_args()


def use_test_time_augmentation(cfg, config_file):
    if not cfg.get('tta_model') or not cfg.get('tta_pipeline'):
        fail(f"--tta: config '{config_file}' defines no test-time augmentation "
             '(tta_model and tta_pipeline).')
    innermost(cfg.test_dataloader.dataset).pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def main():
    args = parse_args()
    cfg = read_config(args)
    check_file('checkpoint', args.checkpoint)
    cfg.load_from = args.checkpoint
    scope = cfg.default_scope
    maps = scope == 'mmseg'  # what a segmentor predicts is kept in a folder, the rest in a file
    if args.out and not maps and not args.out.endswith(('.pkl', '.pickle')):
        what = {'mmdet': 'detector', 'mmpretrain': 'classifier'}[scope]
        fail(f"--out: '{args.out}' must end in .pkl for a {what}.")
    if args.show_dir:
        # Absolute: the hook would put a relative one below the work folder.
        folder = str(Path(args.show_dir).absolute())
        hook = cfg.default_hooks.visualization
        hook.interval = 1  # mmsegmentation 1.2 would skip images
        if scope == 'mmpretrain':
            hook.update(enable=True, out_dir=folder)
        elif scope == 'mmdet':
            hook.update(draw=True, test_out_dir=folder)
        else:
            hook.draw = True
            cfg.visualizer.save_dir = folder
    if args.tta:
        use_test_time_augmentation(cfg, args.config)
    if args.out and maps:
        cfg.test_evaluator.output_dir = args.out
        cfg.test_evaluator.keep_results = True
    check_dataset(cfg, 'test')
    check_writable('--work-dir', cfg.work_dir)
    if args.show_dir:
        check_writable('--show-dir', args.show_dir)
    if args.out:
        check_writable('--out', args.out if maps else Path(args.out).parent)
    runner = CarefulRunner.from_cfg(cfg)
    if args.out and not maps:
        keep = METRICS.get({'mmdet': 'mmdet.DumpDetResults'}.get(scope, 'mmengine.DumpResults'))
        runner.test_evaluator.metrics.append(keep(out_file_path=args.out))
    runner.register_hook(CheckWeights(
        'Give the config that it was trained with, or evaluate a partly random model with '
        '--allow-partial.', required=None if args.allow_partial else ''))
    runner.test()


if __name__ == '__main__':
    run(main)
