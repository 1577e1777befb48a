"""Pictures, videos and ids that predictions are written to: crossformer_mm/prediction/output.py."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from crossformer_mm.prediction import sources_of
from crossformer_mm.prediction.output import Video, mp4_fps
from crossformer_mm.without_torch.files import find_files

from ..helpers import CLASSES, needs_bfloat16


def write_video(path: Path, fps: float, frames: list) -> Path:
    size = frames[0].shape[1::-1]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), fps, size)
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


@pytest.mark.parametrize(
    'options', [(), pytest.param(('--bf16', '--batch-size', 2), marks=needs_bfloat16)]
)
def test_a_video_gives_a_video(predict, shapes, segmentor, photos, options):
    frames = [cv2.imread(str(shapes / f'ade/images/validation/{i:012d}.jpg')) for i in (1, 2, 3)]
    clip = write_video(photos / 'clip.avi', 5, frames)
    found = predict(segmentor, clip, *options, threshold=None)
    assert found.names() == [f'clip.avi#{i}' for i in (1, 2, 3)]
    maps = [
        cv2.imread(str(found.out / one['label_map']), cv2.IMREAD_UNCHANGED)
        for one in found.index['images']
    ]
    assert maps[0].shape == (96, 96) and not (maps[0] == maps[1]).all()
    drawn = cv2.VideoCapture(str(found.out / 'pictures/clip.mp4'))
    assert drawn.get(cv2.CAP_PROP_FPS) == 5
    frames = [drawn.read() for _ in range(4)]
    assert [whole for whole, _ in frames] == [True, True, True, False]
    assert frames[0][1].shape == (96, 96, 3)
    assert not list(found.out.rglob('.*'))


@pytest.mark.parametrize('channels', [1, 4])
def test_images_of_other_channels_are_drawn_as_they_are(predict, image, quick, photos, channels):
    """And those that have not as many as the model takes are skipped, others are kept."""
    colour = image.copy()
    colour[:, : colour.shape[1] // 2] //= 2  # unlike its mirror image
    image = {1: colour[..., 1], 4: np.dstack([colour, colour[..., 0]])}[channels]
    cv2.imwrite(str(photos / 'b.png'), image)
    wrong = ['a.png', 'c.avi'] if channels == 4 else []
    if wrong:
        cv2.imwrite(str(photos / 'a.png'), colour)
    write_video(photos / 'c.avi', 5, [colour] * 2)
    found = predict(quick(channels), photos, expect=int(bool(wrong)))
    assert found.names('skipped') == wrong
    assert all(f'the model takes {channels}' in one['reason'] for one in found.index['skipped'])
    assert found.names() == ['b.png'] + ['c.avi#1', 'c.avi#2'] * (not wrong)
    assert found.ids == {one['id'] for one in found.index['images']}
    shown = colour if channels == 4 else np.stack([image] * 3, axis=-1)
    drawn = cv2.imread(str(found.out / 'pictures/b.jpg'))
    # JPEG of noise: OpenCV's releases differ in how they sample colours.
    error, mirrored = (
        np.abs(drawn.astype(int) - other).mean() for other in (shown, shown[:, ::-1])
    )
    assert error < 13 and mirrored > 2 * error


def test_videos_of_any_rate_and_size_cost_no_results(predict, image, quick, photos):
    """A rate that MP4 takes rounded, too many pixels a side for MPEG-4, and an image."""
    cv2.imwrite(str(photos / 'a.png'), image)
    cv2.imwrite(str(photos / 'd.png'), image)
    write_video(photos / 'b_slow.avi', 211.222, [image] * 3)
    write_video(photos / 'c_wide.avi', 5, [cv2.resize(image, (9000, 16))] * 2)
    found = predict(quick(), photos, expect=1)
    slow, wide = ([f'{name}.avi#{i}' for i in (1, 2, 3)] for name in ('b_slow', 'c_wide'))
    assert found.names() == ['a.png', *slow, *wide[:2], 'd.png']
    assert found.ids == set(range(1, 8))
    (skipped,) = found.index['skipped']
    assert 'no MP4 of 9000 x 16 pixels' in skipped['reason'] and skipped['reason'] in found.said
    pictures = {path.name for path in (found.out / 'pictures').iterdir()}
    assert pictures == {'a.jpg', 'b_slow.mp4', 'd.jpg'}
    drawn = cv2.VideoCapture(str(found.out / 'pictures/b_slow.mp4'))
    assert drawn.get(cv2.CAP_PROP_FPS) == 211.22 and drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 3


@pytest.mark.parametrize(
    'fps', [0, -1, float('nan'), float('inf'), 1e-5, 0.04, 29.97, 211.222, 655.354, 6553.55, 9e4]
)
def test_rates_are_those_that_mp4_can_hold(tmp_path, fps):
    rate, file = mp4_fps(fps), tmp_path / 'x.mp4'
    video = Video(file, rate, (32, 16))
    video.add(np.zeros((16, 32, 3), np.uint8))
    video.add(np.zeros((8, 8, 3), np.uint8))  # of a video that changes its size
    video.finish(keep=True)
    written = cv2.VideoCapture(str(file))
    assert written.get(cv2.CAP_PROP_FPS) == pytest.approx(rate, rel=1e-6)
    assert written.get(cv2.CAP_PROP_FRAME_COUNT) == 2
    if 0.01 < fps < 65535:
        assert rate == pytest.approx(fps, rel=2e-4)


def test_what_cannot_be_written_is_skipped_and_the_rest_is_kept(
    predict, image, quick, photos, tmp_path
):
    """A picture where a folder is, and one of more pixels a side than JPEG has."""
    for name in 'ab':
        cv2.imwrite(str(photos / f'{name}.png'), image)
    cv2.imwrite(str(photos / 'c.png'), cv2.resize(image, (66000, 1)))
    (tmp_path / 'out/pictures/a.jpg').mkdir(parents=True)
    found = predict(quick(), photos, expect=1)
    assert found.names() == ['a.png', 'b.png', 'c.png']
    assert found.names('skipped') == ['a.png', 'c.png']
    assert 2 in found.ids
    assert (found.out / 'pictures/b.jpg').is_file()


def test_images_of_one_name_in_several_folders_keep_their_own(
    predict, shapes, quick, photos, tmp_path
):
    """Also with the ids of annotations, and beside a video whose frames would have the same names."""
    known, annotations = [], tmp_path / 'known.json'
    for number in (1, 2):
        (photos / f'cam{number}').mkdir()
        image = shapes / f'coco/val2017/00000000000{number}.png'
        shutil.copy(image, photos / f'cam{number}/frame.png')
        known.append(dict(id=70 + number, file_name=f'cam{number}/frame.png'))

    def write_annotations(images):
        categories = [dict(id=number, name=name) for number, name in enumerate(CLASSES, start=1)]
        annotations.write_text(json.dumps(dict(images=images, categories=categories)))

    write_annotations(known)
    found = predict(quick(), photos, '--ann-file', annotations)
    assert [one['id'] for one in found.index['images']] == [71, 72]
    pictures = {str(path.relative_to(found.out)) for path in found.out.rglob('*.jpg')}
    assert pictures == {f'pictures/cam{number}/frame.jpg' for number in (1, 2)}
    write_annotations([dict(id=71, file_name='frame.png')])
    said = predict(quick(), photos, '--ann-file', annotations, expect=2).said
    assert "'cam1/frame.png' and 'cam2/frame.png' are one image in it" in said

    (photos / 'clip').mkdir()
    (photos / 'clip/000001.png').touch()
    (photos / 'clip.avi').touch()
    files = find_files([str(photos)], found.out, videos=True)
    stems = {source.name: source.stem for source in sources_of(files, found.out)}
    assert stems['clip.avi'] == 'clip.avi' and stems['clip/000001.png'] == 'clip/000001'


def test_no_input_is_overwritten(refusal_of, detector, tmp_path):
    (tmp_path / 'pictures').mkdir()
    photo = tmp_path / 'pictures' / 'photo.jpg'
    cv2.imwrite(str(photo), np.zeros((9, 9, 3), np.uint8))
    assert 'would replace it' in refusal_of('predict.py', *detector, photo, '--out', tmp_path)
