"""Evaluate a checkpoint of a detector, a segmentor, a classifier, or another model of MMEngine's.

    python tools/test.py configs/upernet/cf_s_160k.py \\
        work_dirs/upernet/cf_s_160k/iter_160000.pth --tta
"""

import inspect
from pathlib import Path

from mmengine.config import ConfigDict
from mmengine.registry import METRICS

from crossformer_mm.cli import argument_parser, read_config, run
from crossformer_mm.config_parts import data_sets_of
from crossformer_mm.engine.config import ensure_visualizer
from crossformer_mm.engine.preflight import check_dataset, check_file
from crossformer_mm.engine.runner import build_runner
from crossformer_mm.engine.weight_checks import CheckWeightsHook
from crossformer_mm.errors import UserError
from crossformer_mm.files import check_writable
from crossformer_mm.hooks import KeepLabelMapsHook, ShowPredictionsHook
from crossformer_mm.without_torch.options import SCORE_THR


def parse_args():
    parser = argument_parser('Evaluate a checkpoint of a detector, a segmentor or a classifier')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        help='keep the predictions: a .pkl file for a detector or a '
        'classifier, a folder of label maps for a segmentor',
    )
    parser.add_argument('--show-dir', help='folder for predictions drawn next to ground truth')
    parser.add_argument(
        '--tta', action='store_true', help='test-time augmentation, as the config defines it'
    )
    parser.add_argument(
        '--allow-partial',
        action='store_true',
        help='evaluate even if weights are missing, unexpected or of another shape',
    )
    return parser.parse_args()


def use_test_time_augmentation(cfg, config_file: str) -> None:
    """Test with the augmentation that a config defines, or raise a UserError if it defines none."""
    if not cfg.get('tta_model') or not cfg.get('tta_pipeline'):
        raise UserError(
            f"--tta: config '{config_file}' defines no test-time augmentation "
            '(tta_model and tta_pipeline).'
        )
    for dataset in data_sets_of(cfg, 'test'):
        dataset['pipeline'] = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def drawing_options(cfg) -> dict:
    """Remove the library's drawing hook from a config; return its options of a visualizer."""
    ensure_visualizer(cfg)
    hook = (cfg.get('default_hooks') or {}).pop('visualization', None) or {}
    return dict(pred_score_thr=hook.get('score_thr', SCORE_THR))


def main():
    args = parse_args()
    cfg = read_config(args)
    if not args.work_dir or (Path(args.work_dir) / 'last_checkpoint').exists():
        # The config that a training keeps stays as it is.
        cfg.work_dir = str(Path(cfg.work_dir) / 'test')
    check_file('checkpoint', args.checkpoint)
    cfg.load_from = args.checkpoint
    scope = cfg.default_scope
    maps = scope == 'mmseg'  # label maps go to a folder, other predictions to a file
    if args.out and not maps and not args.out.endswith(('.pkl', '.pickle')):
        what = {'mmdet': 'detector', 'mmpretrain': 'classifier'}.get(scope, f'model of {scope}')
        raise UserError(f"--out: '{args.out}' must end in .pkl for a {what}.")
    if args.show_dir:
        drawing = drawing_options(cfg)
    if args.tta:
        use_test_time_augmentation(cfg, args.config)
    check_dataset(cfg, 'test')
    check_writable('--work-dir', cfg.work_dir)
    if args.show_dir:
        check_writable('--show-dir', args.show_dir)
    if args.out:
        check_writable('--out', args.out if maps else Path(args.out).parent)
    runner = build_runner(cfg)
    if args.show_dir:
        if 'pred_score_thr' not in inspect.signature(runner.visualizer.add_datasample).parameters:
            drawing = {}
        runner.register_hook(ShowPredictionsHook(args.show_dir, **drawing))
    if args.out and maps:
        runner.register_hook(KeepLabelMapsHook(args.out))
    elif args.out:
        keep = METRICS.get({'mmdet': 'mmdet.DumpDetResults'}.get(scope, 'mmengine.DumpResults'))
        runner.test_evaluator.metrics.append(keep(out_file_path=args.out))
    if args.allow_partial:
        for hook in runner.hooks:
            if isinstance(hook, CheckWeightsHook):
                hook.allow_partial = True
    runner.test()


if __name__ == '__main__':
    run(main)
