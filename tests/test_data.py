"""The moving digits, their input pipelines, the word embedding and the patch codec."""

import dataclasses
import itertools
import json
import resource
import shutil

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sf_jax import options
from sf_jax.data import moving_digits, pipeline
from sf_jax.models import patch_codec
from sf_jax.models.text import VOCABULARY, WordEmbedding

TINY = moving_digits.DigitsConfig(name="tiny", clips={"train": (40, 24), "judge": (20, 12), "test": (10, 16)})
TEXT = WordEmbedding()
GOLDEN_SEVEN = [-1, -1, 1, -1, 1, -1, 1, 1, 1, 1, 1, -1, 1, 1, 1, 1]
KINDS = list(itertools.product(range(8), range(2)))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    moving_digits.build(path, TINY)
    return path


@pytest.fixture(scope="module")
def clips():
    """160 clips of 24 frames, one for each digit, direction and speed."""
    plan = moving_digits.plan_clips("test", 160)
    return plan, np.stack([clip["video"] for clip in moving_digits.generate(plan, 24)])


def measured_velocity(videos):
    """Mean velocity of the ink's centroid on the torus, [N, F, H, W, 1] -> [N, 2] (row, column)."""
    ink = videos[..., 0].astype(np.float64)
    turns = np.exp(2j * np.pi * np.arange(24) / 24)
    phase = np.stack([np.angle(ink.sum(3) @ turns), np.angle(ink.sum(2) @ turns)], axis=-1)
    return moving_digits.wrap(np.diff(phase, axis=1) * 24 / (2 * np.pi)).mean(axis=1)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


# Clips.


def test_splits_share_no_scan_and_hold_every_digit():
    _, labels = moving_digits.load_scans()
    parts = moving_digits.split_scans(labels)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(1797))
    for (split, part), share in zip(parts.items(), (0.65, 0.175, 0.175), strict=True):
        assert len(part) / 1797 == pytest.approx(share, abs=0.01), split
        assert np.bincount(labels[part], minlength=10) == pytest.approx(len(part) / 10, rel=0.1), split
        assert np.isin(moving_digits.plan_clips(split, 300).scan, part).all()


def test_plan_is_deterministic_and_differs_between_splits_and_seeds():
    plan = moving_digits.plan_clips("train", 50)
    again = moving_digits.plan_clips("train", 50)
    for field in dataclasses.fields(plan):
        np.testing.assert_array_equal(getattr(plan, field.name), getattr(again, field.name))
    for other in (moving_digits.plan_clips("test", 50), moving_digits.plan_clips("train", 50, seed=1)):
        assert not np.allclose(plan.start, other.start)


def test_clips_cover_all_kinds_and_sometimes_leave_out_the_speed():
    plan = moving_digits.plan_clips("judge", 3200)
    kinds = plan.digit * 16 + plan.direction * 2 + plan.speed
    assert (np.bincount(kinds, minlength=160) == 20).all()
    assert 1 - plan.told.mean() == pytest.approx(0.15, abs=0.03)
    _, labels = moving_digits.load_scans()
    np.testing.assert_array_equal(labels[plan.scan], plan.digit)
    assert set(plan.captions()) <= set(moving_digits.all_captions())


def test_training_clips_favor_half_of_the_directions():
    shares = np.bincount(moving_digits.plan_clips("train", 5600).direction)
    np.testing.assert_array_equal(shares, [200] * 4 + [1200] * 4)


def test_captions():
    assert moving_digits.caption(3, 7, 0) == "a 3 moving up and right, slowly"
    assert moving_digits.caption(8, 4, 1) == "an 8 moving left, fast"
    assert moving_digits.caption(3, 7) == "a 3 moving up and right"
    assert len(set(moving_digits.all_captions())) == 240
    assert moving_digits.caption(8, None, 1) == "an 8 moving, fast" and moving_digits.caption(3, None) == "a 3 moving"
    assert len(set(moving_digits.all_captions("undirected"))) == 30


def test_undirected_captions_are_of_the_same_clips():
    plan = moving_digits.plan_clips("train", 40)
    full, undirected = (list(moving_digits.generate(plan, 2, captions)) for captions in ("full", "undirected"))
    for one, other in zip(full, undirected, strict=True):
        np.testing.assert_array_equal(one["video"], other["video"])
        direction = moving_digits.DIRECTIONS[one["direction"]]
        assert one["caption"].replace(f" {direction}", "") == other["caption"]
    assert moving_digits.VARIANTS["undirected"].clips["train"] == moving_digits.VARIANTS["full"].clips["train"]
    assert set(moving_digits.VARIANTS) == set(options.CAPTIONS)
    with pytest.raises(ValueError, match="captions is 'few': it must be one of full, undirected"):
        moving_digits.all_captions("few")


def test_render_at_whole_pixels_places_the_scan_and_wraps_round():
    scan = moving_digits.load_scans()[0][:1]
    plain, moved = moving_digits.render(scan, np.array([[[0.0, 0.0], [20.0, -5.0]]]))[0, ..., 0]
    np.testing.assert_array_equal(plain[:12, :12], scan[0])
    assert plain.sum() == scan.sum(dtype=np.int64)
    np.testing.assert_array_equal(moved, np.roll(plain, (20, -5), axis=(0, 1)))


def test_render_between_pixels_is_the_mean_of_neighbours():
    scan = moving_digits.load_scans()[0][:1]
    whole, half, after = moving_digits.render(scan, np.array([[[5, 7], [5, 7.5], [5, 8]]]))[0, ..., 0]
    np.testing.assert_allclose(half, (whole.astype(float) + after) / 2, atol=0.51)


def test_movement_agrees_with_direction_and_speed(clips):
    plan, videos = clips
    velocity = measured_velocity(videos)
    np.testing.assert_allclose(velocity, plan.velocity, atol=0.05)
    heading = np.rad2deg(np.arctan2(velocity[:, 0], velocity[:, 1]))
    off = np.abs((heading - 45 * plan.direction + 180) % 360 - 180)
    assert off.min() > 4 and off.max() < 16
    pace = np.linalg.norm(velocity, axis=1)
    assert pace[plan.speed == 0].max() < 1.7 < 2.6 < pace[plan.speed == 1].min()


def test_up_is_towards_row_zero():
    rng = np.random.default_rng(0)
    up = moving_digits.sample_motion(rng, moving_digits.DIRECTIONS.index("up"), 0, 20)
    right = moving_digits.sample_motion(rng, moving_digits.DIRECTIONS.index("right"), 0, 20)
    assert (up[:, 0] < 0).all() and (right[:, 1] > 0).all()
    # The true heading deviates from the caption's to either side.
    assert {-1, 1} == set(np.sign(up[:, 1])) == set(np.sign(right[:, 0]))


@pytest.mark.parametrize("direction, speed", KINDS)
def test_most_proposed_motions_are_accepted(direction, speed):
    proposed = moving_digits.propose_motion(np.random.default_rng(0), direction, speed, 2000)
    assert (~moving_digits.nearly_repeats(proposed)).mean() > 0.2


def test_frames_do_not_nearly_repeat_within_a_hundred():
    scans, labels = moving_digits.load_scans()
    rng = np.random.default_rng(0)
    velocity = np.concatenate([moving_digits.sample_motion(rng, *kind, 2) for kind in KINDS])
    chosen = [np.flatnonzero(labels == n % 10)[n] for n in range(len(velocity))]
    path = moving_digits.trajectory(np.zeros_like(velocity), velocity, 140)
    videos = moving_digits.render(scans[chosen], path).astype(np.float32)

    def difference(lag):
        """[N, F - lag], the mean absolute difference of frames `lag` apart."""
        return np.abs(videos[:, lag:] - videos[:, :-lag]).mean(axis=(2, 3, 4))

    neighbours = difference(1).mean(axis=1)
    closest = np.min([difference(lag).min(axis=1) for lag in range(8, 101)], axis=0)
    assert (closest / neighbours).min() > 0.5


# Files.


def test_source_gives_decoded_examples(data_dir):
    source = moving_digits.source(data_dir, "train", TINY)
    planned = list(moving_digits.generate(moving_digits.plan_clips("train", 40), 24))
    assert len(source) == 40
    for index in (0, 7, 39):
        example = source[index]
        assert type(example["caption"]) is str
        assert example["video"].shape == (24, 24, 24, 1) and example["video"].dtype == np.uint8
        assert_same(example, planned[index])
    assert {len(moving_digits.source(data_dir, split, TINY)) for split in ("judge", "test")} == {20, 10}


def test_build_leaves_what_is_there(data_dir, capsys):
    path = moving_digits.build(data_dir, TINY)
    assert capsys.readouterr().out == ""
    assert (path / "dataset_info.json").is_file() and data_dir in path.parents


def test_build_prints_one_line(tmp_path, capsys):
    config = moving_digits.DigitsConfig(name="few", clips={"test": (3, 2)})
    moving_digits.build(tmp_path / "new", config)
    assert capsys.readouterr().out.splitlines() == [
        f"moving_digits: writing 3 clips to {tmp_path}/new/moving_digits/few/1.2.0"
    ]


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="data_dir: cannot write .*file/data .* allowed: a folder"):
        moving_digits.build(tmp_path / "file" / "data", TINY)


def test_missing_data_and_unknown_split(tmp_path):
    with pytest.raises(ValueError, match="data_dir: got .*python -m sf_jax.data.moving_digits"):
        moving_digits.source(tmp_path, "train")
    with pytest.raises(ValueError, match="split: got 'valid', allowed: train, judge, test"):
        moving_digits.source(tmp_path, "valid")
    with pytest.raises(ValueError, match="split: got 'valid', allowed: train, judge, test"):
        moving_digits.plan_clips("valid", 1)


def change(name, change):
    """Damages a file of the clips' folder: passes its bytes through `change`, or removes it if that is None."""

    def damage(folder):
        path = folder / name
        if change is None:
            return path.unlink()
        return path.write_bytes(change(path.read_bytes()))

    return damage


def flipped(data):
    """Flips all bytes of the records, but not of the index at the end."""
    return data[:100] + bytes(byte ^ 255 for byte in data[100:20000]) + data[20000:]


SHARD, INFO, FEATURES = "moving_digits-train.array_record-00000-of-00001", "dataset_info.json", "features.json"
DAMAGES = {
    "cut": (change(SHARD, lambda data: data[: len(data) // 2]), f"{SHARD} is damaged"),
    "empty": (change(SHARD, lambda data: b""), f"{SHARD} is damaged"),
    "flipped": (change(SHARD, flipped), f"{SHARD} is damaged .*hash mismatch"),
    "no shard": (change(SHARD, None), f"{SHARD} is missing"),
    "other shard": (change(SHARD.replace("train", "test"), None), "test.array_record-00000-of-00001 is missing"),
    "cut info": (change(INFO, lambda data: data[:200]), f"{INFO} is damaged"),
    "empty info": (change(INFO, lambda data: b"{}"), f"{INFO} is damaged"),
    "other count": (change(INFO, lambda data: data.replace(b'"40"', b'"50"')), "damaged .40 records, 50 expected"),
    "other split": (change(INFO, lambda data: data.replace(b'"train"', b'"trail"')), f"{INFO} is damaged"),
    "no info": (change(INFO, None), f"{INFO} is missing"),
    "cut features": (change(FEATURES, lambda data: data[:200]), f"{FEATURES} is damaged"),
    "other features": (change(FEATURES, lambda data: data.replace(b"caption", b"captain")), f"{FEATURES} does not"),
    "no features": (change(FEATURES, None), f"{FEATURES} is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_clips_are_named_with_what_to_do(data_dir, tmp_path, damage):
    shutil.copytree(data_dir, tmp_path / "data")
    folder = tmp_path / "data" / "moving_digits" / "tiny" / "1.2.0"
    do, message = DAMAGES[damage]
    do(folder)
    with pytest.raises(
        ValueError, match=f"{folder}/.*{message}.*: remove the folder {folder} and run the command again"
    ):
        moving_digits.build(tmp_path / "data", TINY)
        # Damage inside records is found by the threads that read them.
        list(video_iterator(moving_digits.source(tmp_path / "data", "train", TINY), repeat=False))


def test_refused_writes_leave_no_clips(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, before[1]))
    try:
        with pytest.raises(
            OSError, match=r"cannot write .*/tiny/1.2.0 \(File too large\): make room, or choose another"
        ):
            moving_digits.build(tmp_path, TINY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "moving_digits" / "tiny").iterdir())
    moving_digits.build(tmp_path, TINY)
    assert len(moving_digits.source(tmp_path, "train", TINY)) == 40


# Pipelines.


def video_iterator(source, **changes):
    arguments = dict(batch_size=8, num_frames=5, seed=3, text_encoder=TEXT, text_dropout=0.3)
    return pipeline.video_iterator(source, **{**arguments, **changes})


def prompt_iterator(**changes):
    arguments = dict(batch_size=7, seed=3, text_encoder=TEXT)
    return pipeline.prompt_iterator(moving_digits.all_captions(), **{**arguments, **changes})


@pytest.fixture(scope="module")
def source(data_dir):
    return moving_digits.source(data_dir, "train", TINY)


def test_video_batches(source):
    batch = next(video_iterator(source))
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items() if name != "caption"} == {
        "video": ((8, 5, 24, 24, 1), "uint8"),
        "text": ((8, 10, 64), "float32"),
        "digit": ((8,), "int32"),
        "direction": ((8,), "int32"),
    }
    for text, digit, direction in zip(batch["caption"], batch["digit"], batch["direction"], strict=True):
        assert text.startswith(moving_digits.caption(digit, direction))


def test_one_epoch_in_order_is_complete(source):
    batches = list(video_iterator(source, batch_size=16, num_frames=24, shuffle=False, repeat=False))
    assert [len(batch["video"]) for batch in batches] == [16, 16, 8]
    expected = np.stack([source[index]["video"] for index in range(40)])
    np.testing.assert_array_equal(np.concatenate([batch["video"] for batch in batches]), expected)


def test_epochs_are_shuffled_differently(source):
    batches = list(itertools.islice(video_iterator(source, batch_size=40, num_frames=24), 2))
    first, second = ([clip.tobytes() for clip in batch["video"]] for batch in batches)
    assert sorted(first) == sorted(second) and first != second


def test_crops_are_consecutive_frames_from_various_places(source):
    begins = set()
    for batch in video_iterator(source, shuffle=False, repeat=False, batch_size=40):
        for index, crop in enumerate(batch["video"]):
            video = source[index]["video"]
            begins.update(b for b in range(20) if (video[b : b + 5] == crop).all())
    assert {0, 19} <= begins or len(begins) > 10


@pytest.mark.parametrize("dropout, low, high", [(0.0, 0, 0), (0.3, 0.2, 0.4), (1.0, 1, 1)])
def test_dropped_captions_become_the_empty_prompt(source, dropout, low, high):
    batches = list(itertools.islice(video_iterator(source, text_dropout=dropout, batch_size=40), 10))
    text = np.concatenate([batch["text"] for batch in batches])
    captions = np.concatenate([batch["caption"] for batch in batches])
    dropped = (text == 0).all(axis=(1, 2))
    assert low <= dropped.mean() <= high
    np.testing.assert_array_equal(text[~dropped], TEXT.encode(captions)[~dropped])


def test_cut_clips_begin_with_the_same_digit_elsewhere(source):
    whole, cut = (next(video_iterator(source, batch_size=40, cut=cut)) for cut in ((0.0, 3), (0.5, 3)))
    np.testing.assert_array_equal(cut["caption"], whole["caption"])
    np.testing.assert_array_equal(cut["video"][:, 3:], whole["video"][:, 3:])
    moved = (cut["video"][:, :3] != whole["video"][:, :3]).any(axis=(1, 2, 3, 4))
    assert 0.2 < moved.mean() < 0.8
    spectra = [np.abs(np.fft.rfft2(clips["video"][:, :3, ..., 0].astype(float))) for clips in (whole, cut)]
    np.testing.assert_allclose(spectra[0], spectra[1], atol=1e-6)  # only shifted


@pytest.mark.parametrize("kind", ["video", "cut video", "prompt"])
def test_restored_iterator_continues_exactly(source, kind):
    def make():
        return prompt_iterator() if kind == "prompt" else video_iterator(source, cut=(0.5 * (kind == "cut video"), 3))

    run = make()
    for _ in range(7):
        next(run)
    state = json.loads(json.dumps(run.get_state()))
    expected = list(itertools.islice(run, 40))
    fresh, used = make(), make()
    for _ in range(3):
        next(used)
    for iterator in (fresh, used):
        iterator.set_state(state)
        for left, right in zip(expected, itertools.islice(iterator, 40), strict=True):
            assert_same(left, right)


def test_orbax_saves_and_restores_the_iterator(source, tmp_path):
    run = video_iterator(source)
    next(run)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(run)))
        manager.wait_until_finished()
        other = video_iterator(source)
        manager.restore(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(other)))
    assert_same(next(run), next(other))


def test_seed_determines_the_batches(source):
    assert_same(next(video_iterator(source)), next(video_iterator(source)))
    assert_same(next(prompt_iterator()), next(prompt_iterator()))
    assert (next(video_iterator(source))["video"] != next(video_iterator(source, seed=4))["video"]).any()
    assert (next(prompt_iterator())["caption"] != next(prompt_iterator(seed=4))["caption"]).any()


def test_prompts_come_in_whole_epochs():
    captions = np.concatenate([b["caption"] for b in itertools.islice(prompt_iterator(batch_size=60), 8)])
    first, second = captions[:240].tolist(), captions[240:].tolist()
    assert sorted(first) == sorted(second) == sorted(moving_digits.all_captions()) and first != second


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_frames": 25}, "num_frames: got 25, allowed: 1 to the clips' 24 frames"),
        ({"num_frames": 0}, "num_frames: got 0"),
        ({"batch_size": 0}, "batch_size: got 0, allowed: 1 or more"),
        ({"text_dropout": 1.5}, "text_dropout: got 1.5, allowed: 0 to 1"),
        ({"seed": -1}, "seed: got -1, allowed: 0 to 4294967295"),
    ],
)
def test_pipeline_arguments_out_of_range(source, changes, message):
    with pytest.raises(ValueError, match=message):
        video_iterator(source, **changes)


def test_no_prompts():
    with pytest.raises(ValueError, match="prompts: got 0 entries"):
        pipeline.prompt_iterator([], batch_size=1, seed=0, text_encoder=TEXT)


# Text.


def test_vocabulary_is_that_of_the_captions():
    assert set(moving_digits.captions_words()) == set(VOCABULARY)
    assert TEXT.encode(moving_digits.all_captions()).shape == (240, 10, 64)


def test_embedding_is_normed_padded_and_distinguishes_all_captions():
    rows = TEXT.encode(["a 3 moving up", "", "An 8 moving left, fast."])
    assert rows.dtype == np.float32
    assert (rows[0, 4:] == 0).all() and (rows[1] == 0).all()
    np.testing.assert_array_equal((rows[2] ** 2).mean(axis=-1), [1] * 5 + [0] * 5)
    assert len(np.unique(TEXT.encode(moving_digits.all_captions()).reshape(240, -1), axis=0)) == 240
    words = TEXT.encode(VOCABULARY)[:, 0]
    assert np.abs(words @ words.T / 64 - np.eye(len(words))).max() < 0.6


def test_embedding_never_changes():
    assert TEXT.encode(["7"])[0, 0, :16].tolist() == GOLDEN_SEVEN
    np.testing.assert_array_equal(TEXT.encode(["seven"]), TEXT.encode(["7"]))
    # A longer vector begins with the shorter one.
    np.testing.assert_array_equal(WordEmbedding(dim=300).encode(["7"])[0, 0, :64], TEXT.encode(["7"])[0, 0])


def test_unknown_word_and_too_many_words():
    with pytest.raises(ValueError, match="unknown word 'sideways' .*known words: a, an, moving, .*fast"):
        TEXT.encode(["a 3 moving up", "a 3 moving sideways"])
    with pytest.raises(ValueError, match="has 11 words, allowed: at most 10"):
        TEXT.encode(["up " * 11])
    with pytest.raises(ValueError, match="allowed: a sequence of strings"):
        TEXT.encode("a 3")


# Codec.


def test_shipped_codec_reconstructs_unseen_digits(clips):
    codec = patch_codec.PatchCodec.load()
    assert (codec.spatial_factor, codec.temporal_factor, codec.channels) == (4, 1, 8)
    latents = jax.jit(lambda codec, x: codec.encode(x))(codec, patch_codec.to_float(clips[1]))
    assert latents.shape == (160, 24, 6, 6, 8) and latents.dtype == np.float32
    back = np.asarray(patch_codec.to_uint8(codec.decode(latents)), np.float32)
    assert 10 * np.log10(255**2 / ((back - clips[1]) ** 2).mean()) > 29


def test_latents_have_zero_mean_and_unit_variance(clips):
    codec = patch_codec.PatchCodec.load()
    plan = moving_digits.plan_clips("train", 480)
    videos = np.stack([clip["video"] for clip in moving_digits.generate(plan, 6)])
    latents = np.asarray(codec.encode(patch_codec.to_float(videos))).reshape(-1, codec.channels)
    np.testing.assert_allclose(latents.mean(axis=0), 0, atol=0.05)
    assert np.square(latents).mean() == pytest.approx(1, abs=0.07)
    deviations = latents.std(axis=0)
    assert deviations[0] < 2 and deviations[-1] > 0.5  # evened out, but not fully


def test_fitted_codec_with_all_channels_is_lossless_and_survives_saving(clips, tmp_path):
    frames = clips[1][:40].reshape(-1, 24, 24, 1)
    codec, explained = patch_codec.fit(frames, channels=16)
    assert explained == pytest.approx(1)
    codec.save(tmp_path / "codec.safetensors")
    codec = patch_codec.PatchCodec.load(tmp_path / "codec.safetensors")
    back = patch_codec.to_uint8(codec.decode(codec.encode(patch_codec.to_float(frames[None]))))
    np.testing.assert_array_equal(back, frames[None])


def test_codec_is_causal_and_local(clips):
    codec = patch_codec.PatchCodec.load()
    pixels = patch_codec.to_float(clips[1][:1])
    changed = np.asarray(codec.encode(pixels.at[0, 3, 4:8, 12:16].set(0.5)) != codec.encode(pixels)).any(-1)
    assert changed.sum() == 1 and changed[0, 3, 1, 3]


def test_codec_rejects_wrong_shapes():
    codec = patch_codec.PatchCodec.load()
    with pytest.raises(ValueError, match="pixels: got shape"):
        codec.encode(np.zeros((1, 1, 22, 24, 1), np.float32))
    with pytest.raises(ValueError, match="latents: got 12 channels, allowed: 8"):
        codec.decode(np.zeros((1, 1, 6, 6, 12), np.float32))
    with pytest.raises(ValueError, match="channels: got 17, allowed: 1 to 16"):
        patch_codec.fit(np.zeros((1, 24, 24, 1), np.uint8), channels=17)


def test_to_uint8_inverts_to_float_and_clips():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(patch_codec.to_uint8(patch_codec.to_float(levels)), levels)
    np.testing.assert_array_equal(patch_codec.to_uint8(np.array([-3.0, 3.0])), [0, 255])
