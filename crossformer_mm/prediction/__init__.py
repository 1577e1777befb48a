"""Predictions on images and videos by the inferencers of MMDetection and MMSegmentation.

Their own loops keep all results to the end, stop at a bad file and read no videos.
"""

import functools
from contextlib import nullcontext
from pathlib import Path
from typing import Optional, Sequence

from mmengine.utils import ProgressBar

from ..class_names import drop_unnamed
from ..compat import OutOfMemoryError
from ..errors import UserError
from ..flops import input_channels
from ..without_torch.options import SCORE_THR
from ..without_torch.results import Ids, Results, in_coco_format
from .output import Pictures, write_label_map
from .predictor import Predictor, build_predictor, use_bfloat16
from .sources import Image, Source, batches, images_of, sources_of

__all__ = ['build_predictor', 'predict_files', 'sources_of']


def predict_files(
    predictor: Predictor,
    sources: Sequence[Source],
    out: Path,
    ann_file: Optional[str],
    batch_size: int,
    bf16: bool = False,
    score_thr: float = SCORE_THR,
) -> Results:
    """Predict on images and videos, and write pictures, results, label maps and images.json.

    Args:
        predictor: of :func:`build_predictor`.
        sources: of :func:`sources_of`.
        out: folder to write.
        ann_file: COCO annotations whose ids a detector's results get.
        batch_size: most images at a time.
        bf16: compute in bfloat16: backbone and neck of a detector, all of a segmentor.
        score_thr: lowest score of the objects in pictures.

    Raises:
        UserError: the annotations do not fit, ``out`` cannot be written, or memory is exhausted.
    """
    inferencer, detection = predictor.inferencer, predictor.detection
    model = inferencer.model
    device = next(model.parameters()).device
    ids = Ids(ann_file, predictor.classes, 1 if detection else predictor.first_value)
    for source in sources:
        if ann_file and source.fps is not None:
            raise UserError(f"--ann-file: it names no image '{source.name}'.")
    numbers = ids.annotated(
        [source.path for source in sources], [source.name for source in sources]
    )
    context = use_bfloat16(model, device, detection) if bf16 else nullcontext()
    options = dict(pred_score_thr=score_thr) if detection else dict(opacity=0.5)
    draw = functools.partial(inferencer.visualize, return_vis=True, **options)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: folder '{out}' could not be made: {error.strerror}.") from None

    def keep(image: Image, sample) -> None:
        """Add the results of one image to those of all."""
        sample = sample.cpu()
        drop_unnamed(sample, len(predictor.classes))
        reason = ''
        if detection:
            instances = sample.pred_instances
            found = inferencer.pred2dict(type(sample)(pred_instances=instances))
            if 'mask_scores' in instances:
                found['mask_scores'] = instances.mask_scores.tolist()
            for kind, new in in_coco_format(found, image.entry['id'], ids.categories).items():
                results.add(kind, new)
        else:
            reason = write_label_map(image, sample, predictor.first_value, out)
        if not reason:
            results.images.append(image.entry)
            reason = pictures.add(image, sample)
        results.skip(image.entry['file_name'], reason)
        progress.update()

    results = Results(out, ids)
    if detection:
        results.add('bbox', [])
    progress = ProgressBar(sum(source.frames for source in sources))
    try:
        with results, Pictures(draw, out) as pictures:
            images = images_of(
                sources, numbers, predictor.pipeline, input_channels(model), progress, results.skip
            )
            for batch in batches(images, batch_size):
                try:
                    with context:
                        samples = inferencer.forward(
                            inferencer.collate_fn([image.inputs for image in batch])
                        )
                except OutOfMemoryError:  # type: ignore[misc]
                    raise UserError(
                        f"--batch-size: {len(batch)} images like '{batch[0].entry['file_name']}' "
                        f'do not fit into the memory of {device}.'
                    ) from None
                for image, sample in zip(batch, samples):
                    keep(image, sample)
    finally:
        print()  # after the progress bar
    return results
