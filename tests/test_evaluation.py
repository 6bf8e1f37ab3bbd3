"""The judge, the figures and the report."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from absl import flags

from sf_jax import evaluate, load_pipeline
from sf_jax.data import moving_digits
from sf_jax.evaluation import judge as judging
from sf_jax.evaluation import metrics, report
from sf_jax.evaluation.forced import generate_behind_real, measure_behind_real
from sf_jax.models.patch_codec import PatchCodec, to_float, to_uint8

RNG = np.random.Generator(np.random.Philox(0))


@pytest.fixture(scope="module")
def judge():
    return judging.load()


@pytest.fixture(scope="module")
def clips():
    """Prompts, targets, and two different sets of matching real clips."""
    prompts, kinds, targets = metrics.choose_prompts(128)
    return prompts, targets, *(metrics.real_clips(kinds, 24, seed) for seed in (5, 6))


@pytest.fixture(scope="module")
def measure(judge, clips):
    real = metrics.reference(clips[2], clips[1], judge)
    return lambda videos, targets=clips[1], starts=(0,): metrics.measure(videos, targets, judge, real, starts)


@pytest.fixture(scope="module")
def normal(measure, clips):
    """Figures of the other real clips."""
    return measure(clips[3])


@dataclasses.dataclass
class RealPipe:
    """A fake model that returns real clips and records its calls."""

    only_frames: int | None = None
    calls: list = dataclasses.field(default_factory=list)

    def chunk_starts(self, frames):
        return tuple(range(0, frames, 4))

    def __call__(self, prompts, *, frames, seed, first_index=0):
        self.calls.append((len(prompts), frames, seed, first_index))
        kinds = {text: kind for text, kind in zip(*metrics.choose_prompts(640)[:2])}
        return metrics.real_clips(np.array([kinds[text] for text in prompts]), frames, seed + 77)


# The judge.


def test_shipped_judge_is_right_on_scans_nobody_was_trained_on(judge):
    shares = judging.accuracy(judge, "test", num_clips=800)
    assert shares["digit"] >= 0.97 and shares["direction"] >= 0.99, shares
    assert shares["joint"] >= 0.97


def test_judge_survives_the_codec_and_ignores_the_position(judge, clips):
    _, targets, videos, _ = clips
    codec = PatchCodec.load()
    blurred = np.asarray(to_uint8(codec.decode(codec.encode(to_float(videos[:, :5])))))
    assert metrics.correctness(judge(blurred), targets)["joint"].mean() > 0.95
    moved = np.roll(videos[:, :5], (7, -9), axis=(2, 3))
    assert metrics.correctness(judge(moved), targets)["joint"].mean() > 0.95
    # A shift by the network's stride changes only rounding.
    shifted = judge(np.roll(videos[:4, :3], (4, 8), axis=(2, 3)))
    for left, right in zip(judge(videos[:4, :3]), shifted, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-3)


def test_judge_is_saved_and_loaded_and_refuses_other_files(tmp_path, judge, clips):
    path = tmp_path / "judge.safetensors"
    judging.save(judge, path)
    assert path.stat().st_size <= 400_000
    for left, right in zip(judge(clips[2][:2]), judging.load(path)(clips[2][:2]), strict=True):
        np.testing.assert_array_equal(left, right)
    (tmp_path / "junk").write_bytes(b"junk" * 10)
    PatchCodec.load().save(tmp_path / "codec")
    for name, message in (("none", "cannot read"), ("junk", "not a safetensors"), ("codec", "another network")):
        with pytest.raises(ValueError, match=message):
            judging.load(tmp_path / name)
    with pytest.raises(ValueError, match="got 2 frames, allowed: 3 or more"):
        judge(clips[2][:, :2])
    with pytest.raises(ValueError, match="videos: got float64"):
        judge(clips[2] / 255)


def test_training_uses_only_the_judges_scans_and_lowers_the_loss(capsys):
    scans, labels = moving_digits.load_scans()
    own = moving_digits.split_scans(labels)["judge"]
    plan = moving_digits.plan_clips("judge", 320, seed=3)
    assert np.isin(plan.scan, own).all()
    batches = list(judging.training_windows(10, 32, 3, 2))
    assert (np.concatenate([batch["digit"] for batch in batches]) == labels[plan.scan]).all()
    assert batches[0]["windows"].shape == (32, 24, 24, 3) and batches[0]["windows"].dtype == np.uint8
    warped = judging.warp_scans(scans[own[:5]], 3, RNG)
    difference = np.abs(warped.astype(int) - scans[own[:5], None]).mean(axis=(2, 3))
    assert warped.shape == (5, 3, 12, 12) and (difference > 1).all() and (difference < 60).all()
    judging.train_judge(24, batch_size=32, variants=2, log_every=12)
    first, last = (float(x.split()[4].rstrip(",")) for x in capsys.readouterr().out.splitlines())
    assert last < first < 5
    with pytest.raises(ValueError, match="steps: got 0"):
        judging.train_judge(0)


# Figures.


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    deviations = np.array([[1.0, 2.0, 0.0], [3.0, 0.5, 1.0]])
    # Whitened samples have exactly the intended moments, so the closed form holds up to rounding.
    raw = RNG.normal(size=(2, 500, 3))
    raw -= raw.mean(axis=1, keepdims=True)
    white = [x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T for x in raw]
    means = np.array([[0.0, 1.0, 2.0], [0.5, 1.0, -1.0]])
    a, b = (mean + x * deviation for mean, x, deviation in zip(means, white, deviations, strict=True))
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_zero_for_the_same_and_grows_with_a_shift():
    a = RNG.normal(size=(400, 64)).astype(np.float32) @ RNG.normal(size=(64, 64)).astype(np.float32)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6 * float(a.var(axis=0).sum()))
    near, far = (metrics.frechet_distance(a, a + shift) for shift in (0.5, 2.0))
    assert near == pytest.approx(64 * 0.25, rel=1e-3) and far == pytest.approx(64 * 4, rel=1e-3)
    # Fewer samples than dimensions: covariances may be singular.
    assert 0 < metrics.frechet_distance(a[:10], a[10:30]) < np.inf
    with pytest.raises(ValueError, match=r"features: got \(1, 64\)"):
        metrics.frechet_distance(a[:1], a)


def test_real_clips_score_well_everywhere(measure, clips, normal):
    figures = normal
    assert figures.joint > 0.95 and min(figures.joint_per_quarter) > 0.93
    assert len(figures.joint_per_frame) == 22
    # Not near zero: clips of the same scan are similar, so 128 clips are few for 64 dimensions.
    assert max(figures.frechet_per_quarter) < 15
    for value in (figures.diversity, figures.brightness, figures.motion):
        assert value == pytest.approx(1, abs=0.15)
    assert measure(clips[2]).frechet_per_quarter == pytest.approx([0] * 4, abs=1e-3)


def test_wrong_captions_score_badly(measure, clips):
    targets = clips[1]
    digit = dataclasses.replace(targets, digit=(targets.digit + 1) % 10)
    direction = dataclasses.replace(targets, direction=(targets.direction + 1) % 8)
    figures = measure(clips[3], digit)
    assert figures.digit < 0.05 and figures.joint < 0.05 and figures.direction > 0.98
    figures = measure(clips[3], direction)
    assert figures.direction < 0.05 and figures.joint < 0.05 and figures.digit > 0.95


def test_frozen_videos_are_judged_wrong_and_show_in_the_motion(measure, clips, normal):
    frozen = np.repeat(clips[3][:, :1], 24, axis=1)
    figures = measure(frozen)
    assert figures.motion == 0 and figures.direction < 0.3 and figures.joint < 0.3
    assert min(figures.frechet_per_quarter) > 10 * max(normal.frechet_per_quarter)
    # Frozen halfway: the per-quarter figures show when.
    late = np.concatenate([clips[3][:, :12], np.repeat(clips[3][:, 11:12], 12, axis=1)], axis=1)
    figures = measure(late)
    joint, motion = figures.joint_per_quarter, figures.motion_per_quarter
    assert min(joint[:2]) > 0.93 and max(joint[2:]) < 0.3
    assert min(motion[:2]) > 0.8 and max(motion[2:]) == 0


def test_mode_collapse_shows_in_the_diversity(measure, clips):
    _, targets, _, videos = clips
    first = np.array([np.flatnonzero(targets.prompt == prompt)[0] for prompt in targets.prompt])
    figures = measure(videos[first])
    assert figures.diversity == pytest.approx(0, abs=1e-3) and figures.joint > 0.93
    assert np.isnan(metrics.diversity(np.zeros((2, 3, 4)), np.array([0, 1])))


@pytest.mark.slow
def test_a_digit_that_changes_on_its_way_shows_in_the_diversity(measure, clips):
    _, targets, _, videos = clips
    first = np.array([np.flatnonzero(targets.prompt == prompt)[0] for prompt in targets.prompt])
    # All samples of a prompt end with the same frames.
    figures = measure(np.concatenate([videos[:, :12], videos[first, 12:]], axis=1))
    assert figures.diversity_per_quarter[0] > 0.8 and figures.diversity_per_quarter[3] < 1e-3
    assert 0.2 < figures.diversity < 0.7 and 0.2 < figures.style_diversity < 0.8
    # Another sample's digit in every chunk: equally diverse in each quarter, but without consistency over time.
    mates = np.argsort(targets.prompt, kind="stable").reshape(-1, 4)
    changing = videos.copy()
    for chunk in range(8):
        changing[mates.ravel(), 3 * chunk : 3 * chunk + 3] = videos[np.roll(mates, chunk, axis=1).ravel()][
            :, 3 * chunk : 3 * chunk + 3
        ]
    assert measure(videos).identity > 0.95 > 0.3 > measure(changing).identity
    assert measure(changing).diversity < 0.7 * measure(videos).diversity
    assert measure(videos).style_diversity == pytest.approx(1, abs=0.15)


def test_steps_are_those_of_the_digit(clips):
    plan = moving_digits.plan_clips("test", 64, seed=1)
    scans, _ = moving_digits.load_scans()
    places = moving_digits.trajectory(plan.start, plan.velocity, 9)
    moved = metrics.steps(moving_digits.render(scans[plan.scan], places))
    assert np.abs(moved - plan.velocity[:, None]).max() < 0.1


def test_jumps_at_borders_show(measure, clips, normal):
    starts = (0, 4, 8, 12, 16, 20)
    smooth = measure(clips[3], starts=starts)
    assert smooth.border_jump < 0.05 and smooth.inside_jump < 0.05
    assert smooth.joint_across > 0.93 and smooth.joint_inside > 0.93
    moves = np.repeat(np.arange(6) * 3, 4)
    jumping = np.stack([np.roll(clips[3][:, i], moves[i], axis=2) for i in range(24)], axis=1)
    figures = measure(jumping, starts=starts)
    assert figures.border_jump == pytest.approx(3, abs=0.1) and figures.inside_jump < 0.05
    assert figures.joint_inside > 0.93 and figures.joint_across < 0.7
    single = measure(clips[3], starts=tuple(range(24)))
    assert np.isnan(normal.border_jump) and np.isnan(normal.joint_across) and normal.joint_inside == normal.joint
    assert np.isnan(single.inside_jump) and np.isnan(single.joint_inside) and single.joint_across == single.joint
    assert metrics.inside_chunks(6, (0, 1, 4)).tolist() == [False, True, False, False]


def test_bright_and_saturated_videos_show(measure, clips, normal):
    bright = np.where(clips[3] > 60, 255, clips[3]).astype(np.uint8)
    figures = measure(bright)
    assert figures.brightness > 1.2 and figures.saturation > 5 * normal.saturation
    drifting = clips[3].copy()
    drifting[:, 18:] = np.minimum(255, drifting[:, 18:].astype(int) + 40)
    per_quarter = measure(drifting).brightness_per_quarter
    assert per_quarter[3] > 1.5 > 1.2 > max(per_quarter[:3])


def test_quarters_share_frames_and_windows_evenly():
    assert metrics.quarters(50)[0] == (slice(0, 12), slice(0, 12))
    assert metrics.quarters(50)[3] == (slice(37, 50), slice(36, 48))
    assert [windows.stop - windows.start for _, windows in metrics.quarters(9)] == [1, 2, 2, 2]
    with pytest.raises(ValueError, match="frames: got 7, allowed: 8 or more"):
        metrics.quarters(7)


def test_figures_refuse_what_does_not_fit(judge, measure, clips):
    with pytest.raises(ValueError, match="videos: got 12 frames, allowed: 24"):
        measure(clips[2][:, :12])
    with pytest.raises(ValueError, match="targets: got 128, allowed: one for each of 5"):
        measure(clips[2][:5])
    with pytest.raises(ValueError, match=r"Targets.prompt: got shape \(2,\), allowed: \(3,\)"):
        metrics.Targets(np.zeros(3), np.zeros(3), np.zeros(2))


# Prompts and the whole evaluation.


@pytest.mark.parametrize("num_samples", [64, 256, 640])
def test_prompts_are_balanced_and_real_clips_show_them(num_samples, judge):
    prompts, kinds, targets = metrics.choose_prompts(num_samples)
    each = num_samples / 10
    assert np.bincount(targets.digit, minlength=10) == pytest.approx(each, abs=max(4, 0.1 * each))
    assert (np.bincount(targets.direction, minlength=8) == num_samples / 8).all()
    assert sum("fast" in text for text in prompts) == num_samples / 2
    assert (np.bincount(targets.prompt) == metrics.SAMPLES_PER_PROMPT).all()
    assert len(set(prompts)) == num_samples // metrics.SAMPLES_PER_PROMPT
    videos = metrics.real_clips(kinds, 3, seed=1)
    assert metrics.correctness(judge(videos), targets)["joint"].mean() > 0.95
    assert len(np.unique(videos.reshape(num_samples, -1), axis=0)) == num_samples
    with pytest.raises(ValueError, match="num_samples: got 3"):
        metrics.choose_prompts(3)


def test_without_told_directions_a_video_has_to_keep_its_own(judge, measure, clips):
    prompts, kinds, targets = metrics.choose_undirected_prompts(140)
    assert set(prompts) <= set(moving_digits.all_captions("undirected"))
    assert (np.bincount(targets.digit) == 14).all() and (np.bincount(targets.prompt) == 7).all()
    shares = np.array(moving_digits.DIRECTION_SHARES["train"])
    np.testing.assert_array_equal(np.bincount(targets.direction), 140 * shares / shares.sum())
    fast = np.array(["fast" in text for text in prompts])
    np.testing.assert_allclose(np.bincount(targets.direction[fast], minlength=8), 70 * shares / shares.sum(), atol=5)
    videos = metrics.real_clips(kinds, 24, seed=1)
    own = dataclasses.replace(targets, direction=None)
    opinion = judge(videos)
    told, kept = (metrics.correctness(opinion, wanted)["direction"] for wanted in (targets, own))
    assert told.mean() > 0.98 and kept.mean() > 0.98
    turned = np.concatenate([videos[:, :12], np.rot90(videos[:, 12:], axes=(2, 3))], axis=1)
    kept = metrics.correctness(judge(turned), own)["direction"]
    assert kept[:, : metrics.OWN_WINDOWS].mean() > 0.98 and kept[:, 12:].mean() < 0.02
    figures = measure(clips[3], dataclasses.replace(clips[1], direction=None))
    assert figures.joint > 0.95
    with pytest.raises(ValueError, match="num_samples: got 3"):
        metrics.choose_undirected_prompts(3)


def test_evaluate_writes_everything(tmp_path, capsys):
    pipes = {"a model": RealPipe(), "teacher": RealPipe(only_frames=12)}
    outcome, paths = evaluate.evaluate(pipes, tmp_path / "new", frames=16, num_samples=40, seed=3, batch_size=16)
    assert pipes["a model"].calls == [(16, 16, 3, 0), (16, 16, 3, 16), (16, 16, 3, 32)]
    assert {call[1] for call in pipes["teacher"].calls} == {12}
    names = {"results.json", "table.md", "plot.png"}
    names |= {"samples_a_model.png", "samples_teacher.png", "samples_real_clips.png"}
    assert {path.name for path in paths} == {path.name for path in (tmp_path / "new").iterdir()} == names
    assert all(path.stat().st_size > 500 for path in paths)
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert list(results["figures"]) == ["a model", "teacher", "real clips"]
    for name, figures in outcome.figures.items():
        assert figures.samples == 40 and figures.frames == (12 if name == "teacher" else 16)
        assert results["figures"][name]["joint"] == figures.joint > 0.9
        # Forty videos give only a rough diversity, but a distance above zero.
        assert 0.6 < figures.diversity < 1.5 and min(figures.frechet_per_quarter) > 0
    lines = (tmp_path / "new" / "table.md").read_text().splitlines()
    assert len({len(line) for line in lines}) == 1 and "a model" in lines[0] and "real clips" in lines[0]
    assert "40/40 videos of 16 frames, 0 s left" in capsys.readouterr().out


def test_evaluate_refuses_before_generating(tmp_path):
    pipe = RealPipe()
    with pytest.raises(ValueError, match="frames: got 7"):
        evaluate.evaluate({"a": pipe}, tmp_path, frames=7)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        evaluate.evaluate({"a": pipe}, tmp_path, batch_size=0)
    undirected = dataclasses.replace(load_pipeline(), captions="undirected")
    with pytest.raises(ValueError, match="checkpoint: b knows captions 'undirected', allowed: 'full'"):
        evaluate.evaluate({"a": pipe, "b": undirected}, tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="out: cannot write in"):
        evaluate.evaluate({"a": pipe}, tmp_path / "file")
    assert not pipe.calls


def test_behind_its_own_video_a_network_generates_the_same_again():
    pipe = load_pipeline("student")
    prompts = ["a 3 moving left, fast", "an 8 moving up and right, slowly"]
    own = pipe(prompts, frames=12, seed=3)
    again = generate_behind_real(pipe, prompts, own, seed=3)
    np.testing.assert_array_equal(again[:, :3], own[:, :3])
    # Differs only because its context went through 8-bit pixels and the codec.
    assert np.abs(again.astype(int) - own).mean() < 3
    other = generate_behind_real(pipe, prompts, own[::-1], seed=3)
    np.testing.assert_array_equal(other[:, :3], own[::-1, :3])
    assert np.abs(other[:, 3:].astype(int) - own[:, 3:]).mean() > 10
    first = generate_behind_real(pipe, prompts, own, seed=3, only_first=True)
    np.testing.assert_array_equal(first[:, :6], again[:, :6])
    assert (first[:, 6:] != again[:, 6:]).any()
    with pytest.raises(ValueError, match="the network is bidirectional"):
        generate_behind_real(load_pipeline("teacher"), prompts, own, seed=3)


@pytest.mark.parametrize("chunk", [3, 1])
def test_behind_real_frames_a_chunk_is_judged_with_those_before_it(chunk):
    _, kinds, targets = metrics.choose_prompts(16)
    real, other = (metrics.real_clips(kinds, 12, draw) for draw in range(2))
    judge, starts = judging.load(), range(0, 12, chunk)
    reference = metrics.reference(other, targets, judge)
    same, wrong = (measure_behind_real(x, real, targets, judge, reference, starts) for x in (real, real[::-1]))
    assert same.joint > 0.9 and same.border_jump < 0.1
    assert wrong.joint < same.joint - 0.2 and wrong.border_jump > 2
    assert len(same.joint_per_frame) == (9 if chunk == 3 else 10)  # no window ends in the first chunk


def test_report_survives_undefined_figures(tmp_path, normal):
    undefined = dataclasses.replace(normal, diversity=float("nan"))
    report.write_report(tmp_path, report.Report({}, {"x": undefined}))
    assert json.loads((tmp_path / "results.json").read_text())["figures"]["x"]["diversity"] is None
    assert " nan " in (tmp_path / "table.md").read_text()


def test_command_line(tmp_path, monkeypatch, capsys):
    pipes = {"before": RealPipe(), "after": RealPipe()}
    monkeypatch.setattr(evaluate, "load_pipes", lambda values: {name: pipes[name] for name in values.names})
    values = flags.FlagValues()
    evaluate.define_flags(values)
    values(["evaluate", "--names=before,after", "--frames=12", "--num_samples=8", f"--out={tmp_path}"])
    paths = evaluate.run(values)
    assert len(paths) == 6 and all(path.exists() for path in paths)
    assert "| joint, quarter 4" in capsys.readouterr().out


def test_command_line_trains_a_judge(tmp_path, monkeypatch, capsys, judge):
    seeds = []
    monkeypatch.setattr(judging, "train_judge", lambda seed: seeds.append(seed) or judge)
    values = flags.FlagValues()
    evaluate.define_flags(values)
    values(["evaluate", "--seed=5", f"--train_judge={tmp_path}/new/judge.safetensors"])
    (path,) = evaluate.run(values)
    assert seeds == [5] and "judge on test scans: digit 0.9" in capsys.readouterr().out
    trees = [jax.tree.leaves(x.params) for x in (judge, judging.load(path))]
    for left, right in zip(*trees, strict=True):
        np.testing.assert_array_equal(left, right)
