"""Bouncing digits: the world's laws, the metrics that know them, and training and generation in this world."""

import dataclasses

import numpy as np
import pytest

from benchmarks import table2, table2_measure
from configs import digits
from sf_jax import evaluate, options
from sf_jax.config import from_dict
from sf_jax.data import bouncing_digits, moving_digits
from sf_jax.evaluation import bouncing, judge
from sf_jax.inference.load import load_pipeline
from sf_jax.models.text import WordEmbedding
from sf_jax.training import loop, stages
from sf_jax.weights.package import load_package, save_package
from tests.helpers import random_params

SMALL = {"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "channels": 8, "text_dim": 64, "text_len": 10}


@pytest.fixture(scope="module")
def plan():
    return bouncing_digits.plan_clips("test", 180, 40, seed=1)


@pytest.fixture(scope="module")
def clips():
    """The targets, real clips and a reference from others."""
    _, targets = bouncing.choose_prompts(64)
    first, second = (bouncing.real_clips(targets, 24, seed) for seed in range(2))
    return targets, first, bouncing.reference(second, judge.load())


def changed(plan, **changes):
    return bouncing_digits.render(dataclasses.replace(plan, **changes))


# The world.


def test_two_digits_change_exactly_at_walls(plan):
    low, high = bouncing_digits.WALLS
    assert plan.center.min() >= low and plan.center.max() <= high
    step = np.diff(plan.center, axis=1)
    # Along an axis a step is shorter than the usual one exactly if a wall was met in it, and no step meets two there.
    met = ~np.isclose(np.abs(step), np.abs(plan.velocity)[:, None])
    np.testing.assert_array_equal(np.diff(plan.digit, axis=1) != 0, met.sum(axis=-1) == 1)
    pairs = np.asarray(bouncing_digits.PAIRS)[plan.pair]
    assert (plan.digit[..., None] == pairs[:, None]).any(axis=-1).all()
    for row in plan.scan:  # a digit that comes back has the shape that it had
        assert len(set(row)) <= 2
    pace = np.linalg.norm(plan.velocity, axis=-1)
    assert np.abs(pace / np.asarray(bouncing_digits.PACES)[plan.speed] - 1).max() <= bouncing_digits.PACE_JITTER


def test_clips_show_the_plan(plan):
    videos = bouncing_digits.render(plan)
    assert videos.shape == (180, 40, 24, 24, 1) and videos.dtype == np.uint8
    np.testing.assert_allclose(bouncing_digits.centers(videos[..., 0]), plan.center, atol=0.02)
    assert (np.bincount(plan.speed) == 90).all() and (np.bincount(plan.pair) == 4).all()
    _, labels = moving_digits.load_scans()
    np.testing.assert_array_equal(labels[plan.scan], plan.digit)
    assert np.isin(plan.scan, moving_digits.split_scans(labels)["test"]).all()
    first = plan.digit[:, 0] == np.asarray(bouncing_digits.PAIRS)[plan.pair, 0]
    assert 0.35 < first.mean() < 0.65


def test_no_frame_comes_again_within_four_hundred():
    plan = bouncing_digits.plan_clips("test", 20, 400, seed=2)
    step = np.diff(plan.center, axis=1)
    free = np.isclose(np.abs(step), np.abs(plan.velocity)[:, None]).all(axis=-1)  # the sign of others is of either side
    state = np.concatenate([plan.center[:, :-1], 10 * np.sign(step)], axis=-1)  # place and direction
    for row, usual in zip(state, free, strict=True):
        distance = np.linalg.norm(row[:, None] - row, axis=-1)
        distance[~usual] = distance[:, ~usual] = np.inf
        lag = np.abs(np.subtract.outer(np.arange(len(row)), np.arange(len(row))))
        assert distance[lag >= bouncing_digits.REPEAT_LAGS[0]].min() > 0.999 * bouncing_digits.REPEAT_DISTANCE


def test_captions_say_neither_turn_nor_direction(plan):
    assert set(plan.captions()) <= set(bouncing_digits.all_captions())
    assert len(set(bouncing_digits.all_captions())) == 135
    assert bouncing_digits.caption(bouncing_digits.PAIRS.index((3, 8)), 0) == "a 3 and an 8, slowly"
    assert WordEmbedding().encode(bouncing_digits.all_captions()).shape == (135, 10, 64)
    again = bouncing_digits.plan_clips("test", 180, 40, seed=1)
    np.testing.assert_array_equal(plan.scan, again.scan)
    longer = bouncing_digits.plan_clips("test", 180, 50, seed=1)
    np.testing.assert_array_equal(plan.digit, longer.digit[:, :40])
    examples = list(bouncing_digits.generate(plan[:3]))
    assert [example["digit"] for example in examples] == plan.digit[:3, 0].tolist()
    np.testing.assert_array_equal(examples[1]["video"], bouncing_digits.render(plan[1:2])[0])
    with pytest.raises(ValueError, match="split: got 'valid', allowed: train"):
        bouncing_digits.plan_clips("valid", 1, 9)


def test_directions_are_those_of_moving_digits():
    rng = np.random.default_rng(0)
    for index in range(len(moving_digits.DIRECTIONS)):
        velocity = moving_digits.propose_motion(rng, index, 0, 20)
        assert (bouncing_digits.direction_of(velocity) == index).all()


# The metrics.


def test_prompts_are_balanced():
    prompts, targets = bouncing.choose_prompts(360)
    assert len(set(prompts)) == 90 and (np.bincount(targets.pair) == 8).all()
    few, targets = bouncing.choose_prompts(128)
    assert len(set(few)) == 32 and (np.bincount(targets.speed) == 64).all()


def test_real_clips_are_lawful_and_others_are_not(clips):
    targets, real, reference = clips

    def figures(videos):
        return bouncing.measure(videos, targets, judge.load(), reference, range(24))

    best = figures(real)
    assert best.joint > 0.9 and best.digit > 0.9 and best.path > 0.99 and best.border_jump < 0.2
    assert 0.8 < best.diversity < 1.2 and 0.9 < best.brightness < 1.1 and best.forgetting < 0.3
    assert figures(np.repeat(real[:, :1], 24, axis=1)).joint < 0.1  # it stands still
    assert figures(np.roll(real, 1, axis=0)).digit < 0.3  # another prompt
    assert figures(np.zeros_like(real)).path == 0
    shuffled = figures(real[:, np.random.default_rng(0).permutation(24)])
    assert shuffled.joint < 0.02 and shuffled.border_jump > 2


def test_digits_that_ignore_walls_or_change_their_shape(plan):
    targets = bouncing.Targets(plan.pair, plan.speed)
    reference = bouncing.reference(bouncing_digits.render(plan), judge.load())
    _, labels = moving_digits.load_scans()
    pool = [np.flatnonzero(labels == digit) for digit in range(10)]
    rng = np.random.default_rng(0)
    other = np.vectorize(lambda digit: rng.choice(pool[digit]))(plan.digit)
    own, never, late, shapes = (
        bouncing.measure(changed(plan, **changes), targets, judge.load(), reference)
        for changes in (
            {},
            {"scan": np.repeat(plan.scan[:, :1], 40, axis=1)},
            {"scan": np.concatenate([plan.scan[:, :1], plan.scan[:, :-1]], axis=1)},
            {"scan": other},
        )
    )
    assert own.joint > 0.9 and own.forgetting < 0.3
    assert own.turns > 0.9
    assert never.path > 0.99 and never.digit > 0.9 and never.joint < 0.55 and never.turns < 0.3
    assert late.path > 0.99 and late.digit > 0.9 and late.joint < 0.45 and late.turns < 0.25
    assert shapes.joint > 0.8 and shapes.forgetting > 0.9


def test_windows_behind_real_frames(clips):
    targets, real, reference = clips
    starts = list(range(0, 24, 3))
    same = bouncing.measure_behind_real(real, real, targets, judge.load(), reference, starts)
    assert same.joint > 0.9 and same.border_jump < 0.2
    other = bouncing.measure_behind_real(np.roll(real, 2, axis=0), real, targets, judge.load(), reference, starts)
    assert other.joint < 0.1 and other.border_jump > 2
    assert len(same.joint_per_frame) == 18  # the first two chunks have too few frames before them


def test_empty_frames_and_wandering_digits(plan):
    # One frame of each video is empty: its windows are not lawful, and its borders do not count.
    seen = bouncing.Observation(plan.digit, plan.center.copy(), np.zeros((180, 40, 1)))
    seen.center[:, 20] = np.nan
    targets = bouncing.Targets(plan.pair, plan.speed)
    joint = bouncing.correctness(seen, targets)["joint"]
    assert not joint[:, 15:21].any() and joint[:, :15].mean() > 0.95 and joint[:, 21:].mean() > 0.95
    assert bouncing.jumps(seen.center, [20, 21, 22]).size == 0 and bouncing.jumps(seen.center, [1, 10]).shape == (180,)
    noise = np.random.default_rng(0).normal(size=plan.center.shape)
    shares = [
        bouncing.correctness(dataclasses.replace(seen, center=plan.center + size * noise), targets)["joint"].mean()
        for size in (0.2, 0.6)
    ]
    assert shares[0] > 0.9 and shares[1] < 0.5


def test_what_does_not_fit_is_refused(clips):
    targets, real, reference = clips
    seen = bouncing.observe(real[:, :12], judge.load())
    with pytest.raises(ValueError, match="videos: got 5 frames, allowed: 6 or more"):
        bouncing.correctness(bouncing.Observation(seen.digit[:, :5], seen.center[:, :5], seen.shape[:, :5]), targets)
    with pytest.raises(ValueError, match="videos: got 63, allowed: 64, one for each target"):
        bouncing.correctness(bouncing.Observation(seen.digit[1:], seen.center[1:], seen.shape[1:]), targets)
    with pytest.raises(ValueError, match="videos: got 12 frames, allowed: 24 as in the reference"):
        bouncing.measure(real[:, :12], targets, judge.load(), reference)
    with pytest.raises(ValueError, match="videos: got 3 windows of 6 frames, allowed: 4 or more"):
        bouncing.measure(real[:, :8], targets, judge.load(), reference)
    with pytest.raises(ValueError, match="num_samples: got 3, allowed: 4 or more"):
        bouncing.choose_prompts(3)


# Training and generation.


def config_of(stage, data_dir="data", **changes):
    values = digits.VARIANTS[stage]()
    values["model"] = SMALL | {"freq_dim": 16}
    values["data"] = values["data"] | {"frames": 6, "world": "bouncing", "dir": str(data_dir)}
    return from_dict(values | {"batch_size": 4, "steps": 1, "log_every": 1, **changes})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    config = config_of("teacher")
    path = tmp_path_factory.mktemp("weights") / "teacher.safetensors"
    save_package(path, stages.package_of(config, random_params(config.model)))
    return path


def test_other_commands_know_the_world(teacher, tmp_path):
    assert load_package(teacher).world == load_pipeline(teacher).world == "bouncing"
    assert load_pipeline().world == "moving"
    with pytest.raises(ValueError, match="checkpoint: mine shows bouncing digits, allowed: networks of moving digits"):
        evaluate.evaluate({"mine": load_pipeline(teacher)}, tmp_path)
    with pytest.raises(ValueError, match="teacher_weights is 'shipped': that teacher does not know data.world"):
        config_of("distill")
    assert set(options.WORLDS) == set(moving_digits.WORLDS)


@pytest.mark.slow
def test_training_and_the_table_in_this_world(teacher, tmp_path, monkeypatch):
    small = {"clips": {"train": (40, 8)}}
    config = dataclasses.replace(moving_digits.BOUNCING, name="few", **small)
    monkeypatch.setitem(moving_digits.WORLDS, "bouncing", config)
    trained = loop.train(config_of("teacher", tmp_path / "data"), tmp_path / "teacher")
    assert load_pipeline(trained).only_frames == 6
    student = loop.train(config_of("distill", tmp_path / "data", teacher_weights=str(teacher)), tmp_path / "student")
    measure = table2_measure.Measure("bouncing", samples=4)
    pipe = load_pipeline(student)
    figures = [measure(pipe, 12, 0, control) for control in table2.CONTROLS]
    assert all(x.frames == 12 and x.samples == 4 for x in figures)
    kept = table2.figures_of(figures[0])
    assert {"joint", "path", "joint_per_frame", "frechet_per_quarter"} <= set(kept)


def test_bad_worlds_are_refused():
    data = digits.VARIANTS["distill"]()["data"]
    for changes, message in (
        ({"world": "flat"}, "data.world is 'flat': it must be one of moving, bouncing"),
        ({"world": "bouncing", "cut": 0.5}, "data.cut is 0.5: .* 0 but for moving digits"),
        ({"name": "wan", "world": "bouncing"}, "data.world is 'bouncing': for the data 'wan' it must be 'moving'"),
    ):
        with pytest.raises(ValueError, match=message):
            from_dict(digits.VARIANTS["distill"]() | {"data": data | changes})
