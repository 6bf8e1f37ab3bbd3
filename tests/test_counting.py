"""Digits that count: the world's laws, the metrics that know them, and training and generation in this world."""

import dataclasses

import numpy as np
import pytest

from benchmarks import table2, table2_measure
from configs import digits
from sf_jax.config import from_dict
from sf_jax.data import counting_digits, moving_digits
from sf_jax.evaluation import counting, judge
from sf_jax.inference.load import digits_pipeline, load_pipeline
from sf_jax.models.text import VOCABULARIES
from sf_jax.training import loop, stages
from sf_jax.weights.package import load_package, save_package
from tests.helpers import random_params

SMALL = {"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "channels": 8, "text_dim": 64, "text_len": 10}


@pytest.fixture(scope="module")
def plan():
    return counting_digits.plan_clips("test", 200, 40, seed=1)


@pytest.fixture(scope="module")
def clips():
    """The speeds, real clips and a reference from others."""
    _, speed = counting.choose_prompts(64)
    first, second = (counting.real_clips(speed, 24, seed) for seed in range(2))
    return speed, first, counting.reference(second, judge.load())


def changed(plan, **changes):
    return counting_digits.render(dataclasses.replace(plan, **changes))


# The world.


def test_a_digit_becomes_the_next_one_exactly_at_walls(plan):
    low, high = counting_digits.WALLS
    assert plan.center.min() >= low and plan.center.max() <= high
    step = np.diff(plan.center, axis=1)
    # Away from walls the step is the same; where it is not, a wall was met before, after or in between.
    straight = np.isclose(step, np.sign(step) * np.abs(plan.velocity)[:, None]).all(axis=-1)
    turned = (np.sign(step[:, 1:]) != np.sign(step[:, :-1])).any(axis=-1)
    more = np.diff(plan.digit, axis=1) % 10
    assert more.max() <= 2
    assert (more[straight] == 0).all()
    met = more > 0
    assert ((met[:, 1:] | met[:, :-1]) >= turned).all()
    for i in np.flatnonzero((more == 0).all(axis=1)):
        assert len(set(plan.scan[i])) == 1
    assert ((np.diff(plan.scan, axis=1) != 0) <= met).all()  # a digit keeps its shape between two walls
    pace = np.linalg.norm(plan.velocity, axis=-1)
    assert np.abs(pace / np.asarray(counting_digits.PACES)[plan.speed] - 1).max() <= counting_digits.PACE_JITTER


def test_clips_show_the_plan(plan):
    videos = counting_digits.render(plan)
    assert videos.shape == (200, 40, 24, 24, 1) and videos.dtype == np.uint8
    np.testing.assert_allclose(counting_digits.centers(videos[..., 0]), plan.center, atol=0.02)
    assert (np.bincount(plan.speed) == 100).all() and (np.bincount(plan.digit[:, 0]) == 20).all()
    _, labels = moving_digits.load_scans()
    np.testing.assert_array_equal(labels[plan.scan], plan.digit)
    assert np.isin(plan.scan, moving_digits.split_scans(labels)["test"]).all()


def test_no_piece_of_a_long_clip_comes_again():
    video = counting_digits.render(counting_digits.plan_clips("test", 10, 400))[..., 0].astype(np.float32)
    for frames in video:
        pieces = np.lib.stride_tricks.sliding_window_view(frames, 9, axis=0).reshape(len(frames) - 8, -1)
        squares = (pieces**2).sum(axis=1)
        distance = squares[:, None] + squares - 2 * pieces @ pieces.T
        apart = np.abs(np.subtract.outer(np.arange(len(pieces)), np.arange(len(pieces)))) >= 9
        assert distance[apart].min() > 0.02 * squares.mean()


def test_captions_say_no_more_than_the_speed(plan):
    assert set(plan.captions()) == set(counting_digits.CAPTIONS)
    words = {word for text in counting_digits.CAPTIONS for word in text.replace(",", "").split()}
    assert words == set(VOCABULARIES["counting"])
    again = counting_digits.plan_clips("test", 200, 40, seed=1)
    np.testing.assert_array_equal(plan.scan, again.scan)
    examples = list(counting_digits.generate(plan[:3]))
    assert [example["digit"] for example in examples] == plan.digit[:3, 0].tolist()
    np.testing.assert_array_equal(examples[1]["video"], counting_digits.render(plan[1:2])[0])
    with pytest.raises(ValueError, match="split: got 'valid', allowed: train"):
        counting_digits.plan_clips("valid", 1, 9)


def test_directions_are_those_of_moving_digits():
    rng = np.random.default_rng(0)
    for index in range(len(moving_digits.DIRECTIONS)):
        velocity = moving_digits.propose_motion(rng, index, 0, 20)
        assert (counting_digits.direction_of(velocity) == index).all()


# The metrics.


def test_real_clips_are_lawful_and_others_are_not(clips):
    speed, real, reference = clips

    def figures(videos):
        return counting.measure(videos, speed, judge.load(), reference, range(24))

    best = figures(real)
    assert best.joint > 0.9 and best.digit > 0.9 and best.path > 0.99 and best.border_jump < 0.2
    assert 0.9 < best.diversity < 1.1 and 0.9 < best.brightness < 1.1
    assert figures(real[:, ::-1]).joint < 0.45  # it counts down
    assert figures(np.repeat(real[:, :1], 24, axis=1)).joint < 0.05  # it stands still
    assert figures(np.roll(real, 1, axis=0)).path < 0.2  # the other speed
    assert figures(np.zeros_like(real)).path == 0
    shuffled = figures(real[:, np.random.default_rng(0).permutation(24)])
    assert shuffled.joint < 0.02 and shuffled.border_jump > 2


def test_digits_that_ignore_walls_are_not_lawful(plan):
    order = np.argsort(plan.speed, kind="stable")
    slow, fast = order[:100], order[100:]
    plan = plan[np.stack([slow, fast], axis=1).reshape(-1)]
    reference = counting.reference(counting_digits.render(plan), judge.load())
    own, never, always = (
        counting.measure(videos, plan.speed, judge.load(), reference)
        for videos in (
            counting_digits.render(plan),
            changed(plan, scan=np.repeat(plan.scan[:, :1], 40, axis=1)),
            changed(plan, scan=np.roll(plan.scan, 3, axis=0)),
        )
    )
    assert own.joint > 0.9
    assert never.path > 0.99 and never.digit > 0.9 and never.joint < 0.7
    assert always.path > 0.99 and always.joint < 0.4


def test_windows_behind_real_frames(clips):
    speed, real, reference = clips
    starts = list(range(0, 24, 3))
    same = counting.measure_behind_real(real, real, speed, judge.load(), reference, starts)
    assert same.joint > 0.9 and same.border_jump < 0.2
    other = counting.measure_behind_real(np.roll(real, 2, axis=0), real, speed, judge.load(), reference, starts)
    assert other.joint < 0.1 and other.border_jump > 2
    assert len(same.joint_per_frame) == 18  # the first two chunks have too few frames before them


def test_short_videos_are_refused(clips):
    speed, real, _ = clips
    with pytest.raises(ValueError, match="videos: got 5 frames, allowed: 6 or more"):
        counting.correctness(counting.observe(real[:, :5], judge.load()), speed)


# Training and generation.


def config_of(stage, data_dir="data", **changes):
    values = digits.VARIANTS[stage]()
    values["model"] = SMALL | {"freq_dim": 16}
    values["data"] = values["data"] | {"frames": 6, "world": "counting", "dir": str(data_dir)}
    return from_dict(values | {"batch_size": 4, "steps": 1, "log_every": 1, **changes})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    config = config_of("teacher")
    path = tmp_path_factory.mktemp("weights") / "teacher.safetensors"
    save_package(path, stages.package_of(config, random_params(config.model)))
    return path


def test_a_network_knows_its_world(teacher):
    package = load_package(teacher)
    assert package.world == "counting"
    pipe = digits_pipeline(package)
    assert pipe.text_encoder.vocabulary == VOCABULARIES["counting"]
    with pytest.raises(ValueError, match="unknown word 'a' .*known words: counting, slowly, fast"):
        pipe("a 3 moving right")
    assert load_pipeline().text_encoder.vocabulary == VOCABULARIES["moving"]


@pytest.mark.slow
def test_training_and_the_table_in_this_world(teacher, tmp_path, monkeypatch):
    small = {"clips": {"train": (40, 8)}}
    config = dataclasses.replace(moving_digits.COUNTING, name="few", **small)
    monkeypatch.setitem(moving_digits.WORLDS, "counting", config)
    trained = loop.train(config_of("teacher", tmp_path / "data"), tmp_path / "teacher")
    assert load_package(trained).world == "counting"
    student = loop.train(config_of("distill", tmp_path / "data", teacher_weights=str(teacher)), tmp_path / "student")
    measure = table2_measure.Measure("counting", samples=4)
    pipe = load_pipeline(student)
    figures = [measure(pipe, 12, 0, control) for control in table2.CONTROLS]
    assert all(x.frames == 12 and x.samples == 4 for x in figures)
    kept = table2.figures_of(figures[0])
    assert {"joint", "path", "joint_per_frame", "frechet_per_quarter"} <= set(kept)


def test_bad_worlds_are_refused():
    data = digits.VARIANTS["distill"]()["data"]
    for changes, message in (
        ({"world": "flat"}, "data.world is 'flat': it must be one of moving, counting"),
        ({"world": "counting", "cut": 0.5}, "data.cut is 0.5: .* 0 but for moving digits"),
        ({"name": "wan", "world": "counting"}, "data.world is 'counting': for the data 'wan' it must be 'moving'"),
    ):
        with pytest.raises(ValueError, match=message):
            from_dict(digits.VARIANTS["distill"]() | {"data": data | changes})
