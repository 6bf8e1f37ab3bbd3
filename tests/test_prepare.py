"""`python -m sf_jax.prepare` on a small model folder, and the readers of its data."""

import functools
import itertools
import json
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from sf_jax.data import captions, moving_digits, pipeline, prompts, videos
from sf_jax.inference import prepare_job
from sf_jax.inference.decoders import VaeEncoder
from sf_jax.inference.prepare_job import Job
from sf_jax.inference.programs import encode_pixels
from sf_jax.inference.text_encoder import Umt5TextEncoder
from sf_jax.io import video as video_io
from sf_jax.models.text import WordEmbedding
from sf_jax.models.vae import WanVae
from sf_jax.options import OdeConfig
from sf_jax.training.media import wan_media
from sf_jax.training.pairs import pair_iterator
from sf_jax.weights import mapping
from sf_jax.weights import umt5 as umt5_names
from sf_jax.weights.folders import find_model
from sf_jax.weights.networks import identify, load_network
from tests.wan_folder import make_folder

TEXTS = ["a cat in the snow", "a dog runs", "the cat runs in the snow", "a snow dog", "the dog"]
READ = {"text_dim": 16, "text_len": 512}
SIZE = {"frames": 2, "height": 4, "width": 6, "channels": 16}
SMALL = {"frames": 2, "height": 32, "width": 48, "dtype": "float32"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The model folder."""
    return make_folder(tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    """A data folder with prompts and videos, and the command's output."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "prompts.txt").write_text("\n\n".join([*TEXTS, TEXTS[1]]) + "\n")
    make_videos(folder / "clips")
    for source in ({"prompts": str(folder / "prompts.txt")}, {"videos": str(folder / "clips"), "clips_per_video": 2}):
        assert prepare_job.run(Job(str(model), str(folder / "wan"), **SMALL, **source))
    return folder / "wan"


def pixels(seed, frames):
    """Moving stripes, uint8 [F, 32, 48, 3]."""
    y, x, t = np.mgrid[:32, :48, :frames]
    wave = np.sin((x + 2 * t + seed) / 4) * np.cos(y / (5 + seed))
    return np.stack([(wave.transpose(2, 0, 1) * 100 + 128).astype(np.uint8)] * 3, axis=-1)


def make_videos(folder):
    """Videos of one clip and a bit, two clips, and less than one; a file that is no video; a folder of frames."""
    folder.mkdir(parents=True)
    for i, (name, frames) in enumerate({"a": 7, "b": 10, "c": 4}.items()):
        video_io.write_mp4(folder / f"{name}.mp4", pixels(i, frames), 8)
        (folder / f"{name}.txt").write_text(TEXTS[i % 2])
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    (folder / "broken.txt").write_text("a snow cat")
    for i, image in enumerate(pixels(3, 5)):
        video_io.write_png(folder / "frames" / f"{i + 8}.png", image)
    (folder / "frames.txt").write_text("the\n dog ")


def embed_prompts(model, texts, dtype):
    """Embeddings [512, dim] by prompt, computed as in `generate`."""
    return dict(zip(texts, Umt5TextEncoder(find_model(model), dtype).encode(texts), strict=True))


def stored(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_embeddings_are_those_of_generation(model, data):
    source = prompts.open_prompts(data, **READ)
    wanted = embed_prompts(model, [*TEXTS, "", prepare_job.NEGATIVE_PROMPT], "float32")
    assert [source[i]["caption"] for i in range(len(source))] == TEXTS
    for i, text in enumerate(TEXTS):
        np.testing.assert_array_equal(source[i]["text"], wanted[text])
        assert source.records[i]["embedding"].shape == (len(text.split()) + 1, 16)
    np.testing.assert_array_equal(source.empty, wanted[""])
    np.testing.assert_array_equal(source.negative, wanted[prepare_job.NEGATIVE_PROMPT])


def test_bfloat16_and_csv(model, tmp_path, capsys):
    (tmp_path / "p.csv").write_text('id,caption\n1,"a cat, a dog"\n2,\n3," a cat, a dog"\n4,the snow\n')
    assert prepare_job.run(Job(str(model), str(tmp_path / "out"), prompts=str(tmp_path / "p.csv")))
    assert "1 duplicates left out" in capsys.readouterr().out
    source = prompts.open_prompts(tmp_path / "out", **READ)
    wanted = embed_prompts(model, ["a cat, a dog"], "bfloat16")["a cat, a dog"]
    assert len(source) == 2 and source[0]["text"].dtype == wanted.dtype == jax.numpy.bfloat16
    np.testing.assert_array_equal(source[0]["text"], wanted)


def test_latents_are_the_encoded_pixels(model, data):
    config, params = load_network(find_model(model).vae, "vae")
    source = videos.open_videos(data, **SIZE, **READ)
    found = {(r["video"].decode(), int(r["clip"])): i for i, r in enumerate(source.records)}
    assert sorted(found) == [("a.mp4", 0), ("b.mp4", 0), ("b.mp4", 1), ("frames", 0)]
    b = video_io.read_video(data.parent / "clips" / "b.mp4", 32, 48)
    for key, clip in {("b.mp4", 0): b[:5], ("b.mp4", 1): b[5:], ("frames", 0): pixels(3, 5)}.items():
        example = source[found[key]]
        wanted = encode_pixels(VaeEncoder(WanVae(config), params), clip[None])[0]
        np.testing.assert_array_equal(example["latent"], wanted)
        assert example["latent"].shape == (2, 4, 6, 16) and example["latent"].dtype == np.float32
        caption = "the dog" if key[0] == "frames" else TEXTS[1]
        assert example["caption"] == caption
        np.testing.assert_array_equal(example["text"], embed_prompts(model, [caption], "float32")[caption])
    # With a causal VAE, the first latents do not depend on later frames.
    shorter = videos.open_videos(data, **SIZE | {"frames": 1}, **READ)
    np.testing.assert_array_equal(shorter[0]["latent"], source[0]["latent"][:1])


def test_what_is_left_out_is_told(model, tmp_path, capsys):
    make_videos(tmp_path / "clips")
    job = Job(str(model), str(tmp_path / "out"), videos=str(tmp_path / "clips"), **SMALL)
    assert prepare_job.run(job)
    printed = capsys.readouterr().out
    assert "left out c.mp4: it has 4 frames, a clip needs 5" in printed
    assert "left out broken.mp4: video: cannot read" in printed
    assert "2 of 5 clips left out" in printed and "3 clips of 5 videos in" in printed
    only = tmp_path / "only"
    only.mkdir()
    for name in ("c.mp4", "c.txt"):
        (tmp_path / "clips" / name).rename(only / name)
    with pytest.raises(ValueError, match="not a single record was made of 1 inputs"):
        prepare_job.run(Job(str(model), str(tmp_path / "none"), videos=str(only), **SMALL))


def test_clips_that_were_left_out_can_be_tried_again(model, tmp_path, capsys, monkeypatch):
    make_videos(tmp_path / "clips")
    monkeypatch.setattr(videos, "PER_SHARD", 1)
    job = Job(str(model), str(tmp_path / "out"), videos=str(tmp_path / "clips"), **SMALL)
    read, bad = video_io.stream_video, set("abc")

    def refusing(path, *arguments):
        if path.stem in bad:
            raise ValueError("no decoder")
        return read(path, *arguments)

    monkeypatch.setattr(video_io, "stream_video", refusing)
    monkeypatch.setattr(video_io, "read_image", lambda *arguments: refusing(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="not a single record was made of 5 inputs: remedy .* give the command again"):
        prepare_job.run(job)
    bad.remove("b")
    assert prepare_job.run(job)
    printed = capsys.readouterr().out
    assert "left out a.mp4: no decoder" in printed and "1 clips of 5 videos" in printed
    shard = tmp_path / "out" / "videos" / "wan_videos-train.array_record-00000-of-00005"
    assert (
        f"4 of 5 clips left out: videos too short or not readable; to have them tried again, remove {shard}, "
        in printed
    )
    bad.clear()
    shard.unlink()
    assert prepare_job.run(job)
    assert "2 clips of 5 videos" in capsys.readouterr().out
    records = videos.open_videos(tmp_path / "out", **SIZE, **READ).records
    assert [r["video"] for r in records] == [b"a.mp4", b"b.mp4"]


def test_clips_before_a_damage_are_kept(model, tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    video_io.write_mp4(tmp_path / "clips" / "a.mp4", np.concatenate([pixels(i, 40) for i in range(8)]), 8)
    whole = (tmp_path / "clips" / "a.mp4").read_bytes()
    (tmp_path / "clips" / "a.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "clips" / "a.txt").write_text("a cat")
    job = Job(str(model), str(tmp_path / "out"), videos=str(tmp_path / "clips"), clips_per_video=60, **SMALL)
    reads = list(prepare_job._read(job, captions.find_videos(tmp_path / "clips")[0]))
    assert [k for _, k, _ in reads] == list(range(len(reads))) and 5 < len(reads) < 60
    assert all(clip.shape == (5, 32, 48, 3) for _, _, clip in reads[:-1]) and "damaged" in reads[-1][2]


def test_room_on_the_disk_is_told_before_the_work(tmp_path, capsys):
    prepare_job._tell_room(tmp_path / "a" / "b", 10, 2**60)
    assert "10 clips take up to 11529215046.1 GB" in capsys.readouterr().out
    prepare_job._tell_room(tmp_path / "a" / "b", 1, 1)
    assert not capsys.readouterr().out


def test_metadata_and_resampling(model, tmp_path, capsys):
    make_videos(tmp_path / "clips")
    rows = [{"file_name": "b.mp4", "text": "a cat"}, {"file_name": "./a.mp4", "text": "a dog"}]
    (tmp_path / "clips" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = Job(str(model), str(tmp_path / "out"), videos=str(tmp_path / "clips"), fps=4.0, **SMALL)
    assert prepare_job.run(job)
    assert "3 videos that its metadata does not name" in capsys.readouterr().out
    records = videos.open_videos(tmp_path / "out", **SIZE, **READ).records
    assert [r["video"] for r in records] == [b"b.mp4"]  # at half the frame rate, the other one is too short
    (tmp_path / "clips" / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="fps is 4.0: folders of frames such as frames have no rate"):
        prepare_job.run(job)


@pytest.mark.slow
def test_a_killed_run_continues_and_two_processes_do_the_work_of_one(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "PER_SHARD", 2)
    monkeypatch.setattr(videos, "PER_SHARD", 1)
    clips = {"videos": str(data.parent / "clips"), **SMALL}

    def job(out, **changes):
        return Job(str(model), str(tmp_path / out), **clips | changes)

    assert prepare_job.run(job("whole"))
    embedded = prepare_job.load_embedder

    def dies(*arguments):
        embedder = embedded(*arguments)

        def embed(texts):
            for i, item in enumerate(embedder.embed(texts)):
                if texts[i] == "the dog":
                    raise KeyboardInterrupt
                yield item

        return types.SimpleNamespace(embed=embed)

    monkeypatch.setattr(prepare_job, "load_embedder", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare_job.run(job("killed"))
    monkeypatch.setattr(prepare_job, "load_embedder", embedded)
    assert len(stored(tmp_path / "killed")) == 2  # the recipe and a shard
    assert prepare_job.run(job("killed"))
    assert not prepare_job.run(job("two", process_index=1, process_count=2))
    assert prepare_job.run(job("two", process_index=0, process_count=2))
    assert stored(tmp_path / "killed") == stored(tmp_path / "two") == stored(tmp_path / "whole")
    monkeypatch.setattr(prepare_job, "load_embedder", None)
    monkeypatch.setattr(prepare_job._Encoder, "load", None)
    assert prepare_job.run(job("whole"))  # complete, so no network is loaded
    with pytest.raises(ValueError, match=r"whole/captions holds wan_prompts of another recipe \(negative_prompt"):
        prepare_job.run(job("whole", negative_prompt="snow"))


# Iterators.


class Pairs:
    def __len__(self):
        return 30

    def __getitem__(self, i):
        return {"trajectory": np.full((2, 3), i, np.float32), "caption": moving_digits.all_captions()[i]}


def iterators(data, tmp_path):
    """kind -> a function (batch_size, process_index=, process_count=) -> iterator."""
    digits = moving_digits.DigitsConfig(name="few", description="A few clips.", clips={"train": (20, 8)})
    moving_digits.build(tmp_path, digits)
    text = WordEmbedding()
    common = {"seed": 3, "text_encoder": text}

    def pairs(batch_size, **processes):
        config = types.SimpleNamespace(seed=3, batch_size=batch_size, ode=OdeConfig())
        captions = moving_digits.all_captions()
        source = types.SimpleNamespace(prompt=lambda i: (captions[i], text.encode([captions[i]])[0]))
        return pair_iterator(Pairs(), config, source, **processes)

    clips = moving_digits.source(tmp_path, "train", digits)
    latents = videos.open_videos(data, **SIZE, **READ)
    embedded = prompts.open_prompts(data, **READ)
    return {
        "clips": functools.partial(_sized, pipeline.video_iterator, clips, num_frames=5, text_dropout=0.4, **common),
        "prompts": functools.partial(_sized, pipeline.prompt_iterator, moving_digits.all_captions(), **common),
        "pairs": pairs,
        "latents": functools.partial(_sized, pipeline.latent_iterator, latents, seed=3, text_dropout=0.4),
        "embedded": functools.partial(_sized, pipeline.embedded_prompt_iterator, embedded, seed=3),
    }


def _sized(make, source, batch_size, **arguments):
    return make(source, batch_size=batch_size, **arguments)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])
        assert left[name].dtype.kind == right[name].dtype.kind


@pytest.mark.parametrize("kind", ["clips", "prompts", "pairs", "latents", "embedded"])
def test_processes_share_a_batch_and_a_state(data, tmp_path, kind):
    make = iterators(data, tmp_path)[kind]
    whole = make(6)
    parts = [make(6, process_index=i, process_count=3) for i in range(3)]
    for _ in range(4):
        batches = [next(part) for part in parts]
        joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        assert_same(next(whole), joined)
        assert len(batches[0]["text"]) == 2
    states = [json.loads(json.dumps(part.get_state())) for part in (whole, *parts)]
    assert all(state == states[0] for state in states)
    expected = list(itertools.islice(whole, 3))
    again = [make(6, process_index=i, process_count=2) for i in range(2)]
    for iterator in again:
        iterator.set_state(states[1])
    for batch in expected:
        joined = [next(iterator) for iterator in again]
        assert_same(batch, {name: np.concatenate([part[name] for part in joined]) for name in batch})
    with pytest.raises(ValueError, match="batch_size: got 6, allowed: a multiple of the 4 processes"):
        make(6, process_index=0, process_count=4)
    with pytest.raises(ValueError, match="process_index is 2: it must be in"):
        make(6, process_index=2, process_count=2)


def test_only_own_rows_are_read(data):
    class Counting:
        def __init__(self, source):
            self.source, self.empty, self.asked = source, source.empty, []

        def __len__(self):
            return len(self.source)

        def __getitem__(self, index):
            self.asked.append(index)
            return self.source[index]

    source = Counting(videos.open_videos(data, **SIZE, **READ))
    batches = pipeline.latent_iterator(source, batch_size=2, seed=0, shuffle=False, process_index=1, process_count=2)
    for _ in range(4):
        next(batches)
    assert set(source.asked) == {1, 3}


def test_dropped_captions_are_the_empty_prompt(data):
    source = videos.open_videos(data, **SIZE, **READ)
    batches = itertools.islice(pipeline.latent_iterator(source, batch_size=4, seed=1, text_dropout=0.5), 30)
    empty, kept = 0, 0
    by_caption = {source[i]["caption"]: source[i]["text"] for i in range(len(source))}
    for batch in batches:
        assert batch["latent"].shape == (4, 2, 4, 6, 16) and batch["text"].shape == (4, 512, 16)
        for caption, text in zip(batch["caption"], batch["text"], strict=True):
            dropped = (text == source.empty).all()
            empty, kept = empty + dropped, kept + (not dropped)
            assert dropped or (text == by_caption[caption]).all()
    assert 0.35 < empty / (empty + kept) < 0.65
    order = pipeline.latent_iterator(source, batch_size=3, seed=1, shuffle=False, repeat=False)
    assert [len(batch["latent"]) for batch in order] == [3, 1]
    with pytest.raises(ValueError, match="text_dropout: got 2, allowed: 0 to 1"):
        pipeline.latent_iterator(source, batch_size=4, seed=1, text_dropout=2)
    with pytest.raises(ValueError, match="repeat: got False, allowed: True where there are 2 processes"):
        pipeline.latent_iterator(source, batch_size=4, seed=1, repeat=False, process_count=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 3}, "data.frames is 3: the clips of data.dir .* have 2 latent frames, it must be 1 to 2"),
        ({"height": 6}, "data.height is 6: the latents of data.dir .* have 4, it must be 4"),
        ({"width": 4}, "data.width is 4: .* it must be 6"),
        ({"channels": 8}, "model.channels is 8: .* it must be 16"),
        ({"text_dim": 32}, "model.text_dim is 32: the prompts of data.dir .* have 16, it must be 16"),
        ({"text_len": 64}, "model.text_len is 64: .* have up to 512 tokens, it must be at least 512"),
    ],
)
def test_data_of_other_sizes_is_refused(data, changes, message):
    with pytest.raises(ValueError, match=message):
        videos.open_videos(data, **SIZE | READ | changes)


def test_missing_data_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match=r"data.dir: .* has no dataset wan_prompts; .*sf_jax.prepare --prompts"):
        prompts.open_prompts(tmp_path, **READ)
    with pytest.raises(ValueError, match=r"data.dir: .* has no dataset wan_videos; .*sf_jax.prepare --videos"):
        videos.open_videos(tmp_path, **SIZE, **READ)
    # Without prompts, the videos' captions are used.
    (tmp_path / "captions").symlink_to(data / "captions")
    assert prompts.open_prompts(tmp_path, **READ)[0]["caption"] == TEXTS[0]


def test_a_network_is_known_whatever_its_file(model, tmp_path):
    path = find_model(model).text_encoder
    config, params = load_network(path, "umt5")
    save_file(mapping.to_tensors(umt5_names.entries(config, "transformers"), params), tmp_path / "t.safetensors")
    assert identify(tmp_path / "t.safetensors", "umt5") == identify(path, "umt5")
    params["norm"]["scale"] *= 2
    save_file(mapping.to_tensors(umt5_names.entries(config), params), tmp_path / "o.safetensors")
    assert identify(tmp_path / "o.safetensors", "umt5")[1] != identify(path, "umt5")[1]


@pytest.mark.parametrize("frames", [1, pytest.param(4, marks=(pytest.mark.slow, pytest.mark.exhaustive))])
def test_last_pixel_frame_becomes_an_image(model, frames):
    config, params = load_network(find_model(model).vae, "vae")
    params["decoder"]["conv_out"]["kernel"] *= 4
    media, vae = wan_media(config), WanVae(config)
    latents = np.random.default_rng(0).normal(size=(2, frames, 4, 6, 16)).astype(np.float32)
    assert media.clean({"latent": latents}) is latents
    found = jax.jit(media.as_image)({"vae": params}, latents)
    decode, encode = (jax.jit(functools.partial(vae.apply, method=method)) for method in ("decode", "encode"))
    decoded = decode({"params": params}, latents)
    assert np.abs(decoded[:, -1:]).max() > 1  # so that clipping counts
    last = np.clip(decoded[:, -1:], -1, 1)
    np.testing.assert_allclose(found, encode({"params": params}, last), atol=1e-5)
    assert found.shape == (2, 1, 4, 6, 16)
