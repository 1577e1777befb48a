"""Evaluate a checkpoint of a detector, a segmentor or a classifier.

    python tools/test.py configs/upernet/cf_s_160k.py \\
        work_dirs/upernet/cf_s_160k/iter_160000.pth --tta
"""

from pathlib import Path

from mmengine.config import ConfigDict
from mmengine.registry import METRICS

from crossformer_mm.engine.command_line import (
    argument_parser,
    build_runner,
    check_dataset,
    check_file,
    check_writable,
    data_sets,
    fail,
    kind_of,
    let_draw,
    metrics_of,
    read_config,
    run,
)
from crossformer_mm.engine.weight_checks import CheckWeightsHook


def parse_args():
    parser = argument_parser('Evaluate a checkpoint of a detector, a segmentor or a classifier')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        help='keep the predictions: a .pkl file for a detector or a '
        'classifier, a folder of label maps for a segmentor',
    )
    parser.add_argument('--show-dir', help='folder for pictures of predictions beside ground truth')
    parser.add_argument(
        '--tta', action='store_true', help='test-time augmentation, as the config defines it'
    )
    parser.add_argument(
        '--allow-partial',
        action='store_true',
        help='evaluate even if weights are missing, unexpected or of another shape',
    )
    return parser.parse_args()


def use_test_time_augmentation(cfg, config_file):
    if not cfg.get('tta_model') or not cfg.get('tta_pipeline'):
        fail(
            f"--tta: config '{config_file}' defines no test-time augmentation "
            '(tta_model and tta_pipeline).'
        )
    for dataset in data_sets(cfg.test_dataloader.dataset):
        dataset['pipeline'] = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def show_predictions(cfg, folder: str) -> None:
    """Let the library's own hook draw all that is tested into a folder."""
    kind, switched = {
        'mmdet': ('DetVisualizationHook', dict(draw=True, test_out_dir=folder)),
        'mmseg': ('SegVisualizationHook', dict(draw=True)),
        'mmpretrain': ('VisualizationHook', dict(enable=True, out_dir=folder)),
    }[cfg.default_scope]
    hooks = cfg.get('default_hooks') or {}
    hook = dict(
        hooks.get('visualization') or dict(type=kind), interval=1, **switched
    )  # mmsegmentation 1.2 would skip images
    cfg.default_hooks = {**hooks, 'visualization': hook}
    visualizer = let_draw(cfg)
    if cfg.default_scope == 'mmseg':
        visualizer.save_dir = folder


def keep_label_maps(cfg, folder: str) -> None:
    """Let the metric that compares label maps keep them."""
    metrics = [metric for metric in metrics_of(cfg, 'test') if 'IoU' in kind_of(metric)]
    if not metrics:
        fail('--out: the config has no IoUMetric in test_evaluator, which keeps label maps.')
    metrics[0].update(output_dir=folder, keep_results=True)


def main():
    args = parse_args()
    cfg = read_config(args)
    if not args.work_dir or (Path(args.work_dir) / 'last_checkpoint').exists():
        # The config that a training keeps stays as it is.
        cfg.work_dir = str(Path(cfg.work_dir) / 'test')
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
        show_predictions(cfg, folder)
    if args.tta:
        use_test_time_augmentation(cfg, args.config)
    if args.out and maps:
        keep_label_maps(cfg, args.out)
    check_dataset(cfg, 'test')
    check_writable('--work-dir', cfg.work_dir)
    if args.show_dir:
        check_writable('--show-dir', args.show_dir)
    if args.out:
        check_writable('--out', args.out if maps else Path(args.out).parent)
    runner = build_runner(cfg)
    if args.out and not maps:
        keep = METRICS.get({'mmdet': 'mmdet.DumpDetResults'}.get(scope, 'mmengine.DumpResults'))
        runner.test_evaluator.metrics.append(keep(out_file_path=args.out))
    if args.allow_partial:
        for hook in runner.hooks:
            if isinstance(hook, CheckWeightsHook):
                hook.allow_partial = True
    runner.test()


if __name__ == '__main__':
    run(main)
