"""The study of position biases: its images, a short form of it, and what it says to bad options."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from .tool_process import leave_libraries_uncollected, load_script

FOLDER = Path(__file__).parents[1] / 'benchmarks/position_bias'


@pytest.fixture(scope='module', autouse=True)
def importable():
    load_script(FOLDER / 'study.py')  # which finds what lies beside it


def areas_and_counts(draw, size: int):
    """Mean of the objects' visible pixels, and how many objects there are on 64 x 64 pixels."""
    rng = np.random.default_rng(0)
    units = 40  # of 64 x 64 pixels, in whatever images
    scenes = [draw(rng, size, unit=64) for _ in range(round(units * (64 / size) ** 2))]
    areas = [mask.sum() for _, objects in scenes for _, mask in objects]
    return np.mean(areas), len(areas) / units


def test_a_larger_canvas_has_more_objects_of_the_same_size():
    import make_shapes
    import pairs_of_disks

    for draw in (make_shapes.scene, pairs_of_disks.scene):
        area, count = areas_and_counts(draw, 64)
        for size in (32, 128):
            other_area, other_count = areas_and_counts(draw, size)
            assert 0.75 < other_area / area < 1.33  # more of them hide each other in a larger one
            assert 0.7 < other_count / count < 1.4


def test_an_image_of_its_own_size_is_what_it_was():
    from make_shapes import scene

    image, objects = scene(np.random.default_rng(3), 64)
    same, same_objects = scene(np.random.default_rng(3), 64, unit=64)
    assert (image == same).all() and len(objects) == len(same_objects)


def test_the_class_of_a_pair_is_where_its_blue_disk_lies():
    from pairs_of_disks import DIRECTIONS, scene

    image, objects = scene(np.random.default_rng(0), 128, unit=64)
    assert {kind for kind, _ in objects} == {0, 1, 2, 3}
    for kind, mask in objects:
        blue, red = image[..., 0] == 220, image[..., 2] == 220
        (y_blue, x_blue), (y_red, x_red) = (
            np.argwhere(mask & colour).mean(0) for colour in (blue, red)
        )
        offset = np.array([x_blue - x_red, y_blue - y_red])
        assert (np.sign(np.round(offset / abs(offset).max())) == DIRECTIONS[kind]).all()


def test_what_was_learnt_of_positions_is_taken_away_for_a_while():
    import torch
    from study import no_position

    from crossformer_mm import CrossFormer

    for option in ('dynamic', 'relative', 'absolute', 'none'):
        torch.manual_seed(0)
        backbone = CrossFormer(
            dict(embed_dims=16, depths=(2,), num_heads=(1,)),
            patch_sizes=(4,),
            merge_sizes=(),
            group_size=(4,),
            interval=(2,),
            out_indices=(0,),
            position_bias=option,
        ).eval()
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.add_(torch.randn_like(parameter))
            image = torch.rand(1, 3, 32, 32)
            (before,) = backbone(image)
            with no_position(backbone):
                (without,) = backbone(image)
            (after,) = backbone(image)
        assert torch.equal(before, after)
        assert torch.equal(before, without) == (option == 'none')


def test_tests_of_sizes_and_groups_are_what_they_say():
    from experiments import Test
    from study import Plan, tests

    names = [test.name for test in tests(Plan())]
    assert len(names) == len(set(names)) == 20
    assert {
        'scaled x0.5',
        'scaled x3',
        'canvas x3',
        'scaled x1, G x2',
        'canvas x2, I x2',
        'scaled x1, without position',
    } <= {*names}
    assert Test('scaled', 2, 2).name == 'scaled x2, G x2' and 'canvas x1' not in names


def test_differences_are_of_the_same_seed():
    from report import difference, spread

    assert spread({0: 1.0, 1: 3.0}) == '2.0 ± 1.4'
    # t(0.975, 2) = 4.3027; sd 1; half = 4.3027 / sqrt(3) = 2.48
    assert difference({0: 1.0, 1: 12.0, 2: 103.0, 9: 7.0}, {0: 0.0, 1: 10.0, 2: 100.0}) == (
        '+2.0 [-0.5, +4.5]'
    )
    assert difference({0: 5.0, 1: 15.0, 2: 106.0}, {0: 0.0, 1: 10.0, 2: 100.0}).startswith(
        '**+5.3**'
    )


def study(*arguments) -> None:
    """The study's command, in this process."""
    leave_libraries_uncollected()
    import study

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['study.py', *map(str, arguments)])
        study.run(study.main)


@pytest.fixture(scope='module')
def short(tmp_path_factory):
    """The study in short has run: a detector with two options, trained at one size."""
    folder = tmp_path_factory.mktemp('study')
    options = ('--short', '--out', folder / 'out', '--report-to', folder / 'results', '--seeds', 1)
    study(
        *options,
        '--experiments',
        'instance',
        '--trainings',
        'single',
        '--options',
        'dynamic',
        'relative',
    )
    return folder, options


def test_the_short_form_runs_to_its_report(short):
    folder, _ = short
    results = json.loads((folder / 'results/results.json').read_text())
    assert [(run['option'], run['training']) for run in results['runs']] == [
        ('dynamic', 'single'),
        ('relative', 'single'),
    ]
    for run in results['runs']:
        assert list(run['scores']) == [
            'scaled x1',
            'scaled x1.5',
            'canvas x1.5',
            'scaled x1, G x0.75',
            'scaled x1, without position',
            'canvas x1.5, without position',
        ]
        assert all(0 <= score <= 100 for score in run['scores'].values()) and run['loss'] > 0
    table = (folder / 'results/table.md').read_text()
    assert '| scaled x1.5 |' in table and '| minus dynamic | relative |' in table


def test_again_it_does_what_is_left(short, capsys):
    folder, options = short
    jobs = folder / 'out/jobs'
    before = {file.name: file.stat().st_mtime_ns for file in jobs.iterdir()}
    study(*options, '--experiments', 'instance', '--trainings', 'single', '--options', 'dynamic')
    assert '1 trainings, 1 of them done\n2 trainings gathered' in capsys.readouterr().out
    study(*options, '--experiments', 'semantic', '--trainings', 'mixed', '--options', 'absolute')
    said = capsys.readouterr().out
    assert '1 trainings, 0 of them done' in said and 'minutes to go' in said
    after = {file.name: file.stat().st_mtime_ns for file in jobs.iterdir()}
    assert after.items() >= before.items()
    assert after.keys() - before.keys() == {'semantic-mixed-absolute-0.json'}


def test_training_at_mixed_sizes_draws_a_size_for_each_batch(short):
    """Each training at one size keeps to it."""
    import study as module
    from mmengine.registry import HOOKS

    resize = type('Resize', (), {})()
    pipeline = SimpleNamespace(transforms=[object(), resize])
    runner = SimpleNamespace(
        seed=1, train_dataloader=SimpleNamespace(dataset=SimpleNamespace(pipeline=pipeline))
    )
    hook = HOOKS.build(dict(type='MixedSizes', sides=[32, 64, 96]))
    hook.before_train(runner)
    drawn = []
    for _ in range(60):
        drawn.append(resize.scale)
        hook.after_train_iter(runner, 0)
    assert set(drawn) == {(32, 32), (64, 64), (96, 96)}
    plan, folder = module.SHORT, short[0] / 'out'
    mixed, single = (
        module.read_config(folder, plan, module.Job(0, 'semantic', training, 'none'))
        for training in ('mixed', 'single')
    )
    assert [part.type for part in mixed.custom_hooks] == ['MixedSizes']
    assert not single.get('custom_hooks')


def complaint(capsys, *arguments) -> str:
    """What the study says when it ends at once."""
    with pytest.raises(SystemExit) as ended:
        study(*arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_bad_options_end_in_a_sentence(capsys, tmp_path, short):
    assert "invalid choice: 'rotary'" in complaint(capsys, '--options', 'rotary')
    assert 'must be at least 1' in complaint(capsys, '--seeds', 0)
    assert 'holds no results yet' in complaint(capsys, '--report', '--out', tmp_path)
    assert 'holds results of another plan' in complaint(capsys, '--out', short[0] / 'out')
