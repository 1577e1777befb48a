"""Predict with a file of tools/export.py: NumPy, OpenCV and ONNX Runtime are all it needs.

    python tools/run_onnx.py model.onnx photos --out predictions

writes into the folder of --out what tools/predict.py writes:

    pictures/      each image with its results drawn on it
    images.json    names, sizes and ids of images and categories, and the skipped files
    results.bbox.json, results.segm.json
                   of a detector: boxes, and masks if it has any, in COCO's format of results;
                   masks need pycocotools
    labels/        of a segmentor: label maps as PNG, with the values that the dataset's own have
    results.classes.json
                   of a classifier: the five best classes of each image

Files that cannot be read or written are listed at the end; the exit status is then 1.

On a machine without this repository, copy this file and the folder crossformer_mm/without_torch
beside it. A program of your own needs that folder only:

    from without_torch.model import Model
    model = Model('model.onnx')
    found = model(model.decode(open('photo.jpg', 'rb').read()))    # a dict of arrays

Several threads may call one model at the same time.
"""

import argparse
import sys
from pathlib import Path

# The folder without_torch is beside this file where both were copied. Otherwise it is in the
# package, which cannot be imported without PyTorch: that of the repository, or the installed one
# with this file in .mim/tools.
sys.path += [str(Path(__file__).resolve().parent / up) for up in ('../crossformer_mm', '../..')]

from without_torch.errors import UserError  # noqa: E402
from without_torch.files import find_files  # noqa: E402
from without_torch.model import PROVIDERS, Model  # noqa: E402
from without_torch.options import add_result_options, check_result_options  # noqa: E402
from without_torch.predict import predict_files  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(
        description='Predict with a file of tools/export.py, without PyTorch'
    )
    parser.add_argument('model', help='ONNX file of a whole model, from tools/export.py')
    parser.add_argument(
        'images', nargs='+', help="images, folders of images, or globs such as 'photos/*.jpg'"
    )
    parser.add_argument(
        '--provider',
        choices=list(PROVIDERS),
        default='cpu',
        help='ONNX Runtime on cpu or cuda, or OpenVINO (default: cpu)',
    )
    parser.add_argument(
        '--threads', type=int, default=0, help='CPU threads (default: chosen by the runtime)'
    )
    add_result_options(parser)
    return parser.parse_args()


def peak_memory() -> str:
    try:
        import resource
    except ImportError:  # on Windows
        return 'peak memory is not known here'
    unit = 1 if sys.platform == 'darwin' else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return f'peak memory {peak:.2f} GiB'


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    check_result_options(args)
    if args.threads < 0:
        raise UserError(f'--threads must be at least 0, got {args.threads}.')
    files = find_files(args.images, out)
    model = Model(args.model, args.provider, args.threads)
    results, seconds = predict_files(model, files, out, args.ann_file, args.score_thr)
    predicted = len(results.images)
    print(f"{predicted} images predicted, see '{out}'; {len(results.skipped)} files skipped")
    if predicted:
        print(f'{predicted / seconds:.2f} images per second, {peak_memory()}')
    for one in results.skipped:
        print(f"error: '{one['file_name']}' was skipped: {one['reason']}.", file=sys.stderr)
    sys.exit(1 if results.skipped else 0)


if __name__ == '__main__':
    try:
        main()
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
