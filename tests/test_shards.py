"""The resumable writer of datasets: kills, several processes, other recipes, damaged files."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from sf_jax.data import prompts, shards, videos
from tests.helpers import refused

FEATURES = tfds.features.FeaturesDict(
    {
        "x": tfds.features.Tensor(shape=(None, 3), dtype=np.float32, encoding="bytes"),
        "caption": tfds.features.Text(),
    }
)


def plan(folder, **recipe):
    return shards.Plan(folder, "things", FEATURES, {"a": 1} | recipe, {"train": 10, "extra": 2}, 4)


def make(shard):
    for i in range(shard.start, shard.stop):
        yield {
            "x": np.random.default_rng(i).normal(size=(i + 1, 3)).astype(np.float32),
            "caption": f"{shard.split} {i}",
        }


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(tmp_path):
    assert shards.write(plan(tmp_path / "whole"), make)
    return tmp_path / "whole"


KILLED = """
import os, pathlib, signal, sys
from sf_jax.data import prompts, shards, videos
from tests.helpers import refused
from tests.test_shards import make, plan

def dies(shard):
    for i, example in enumerate(make(shard)):
        if shard.index == 1 and i == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield example

shards.write(plan(pathlib.Path(sys.argv[1])), dies)
"""


def test_killed_writer_continues_with_the_first_missing_shard_and_gives_the_same_bytes(whole, tmp_path):
    killed = tmp_path / "killed"
    assert subprocess.run([sys.executable, "-c", KILLED, str(killed)]).returncode == -signal.SIGKILL
    assert (killed / "things-train.array_record-00000-of-00003").is_file()
    with pytest.raises(ValueError, match="has only a part of dataset things: run the command that makes it again"):
        shards.open_records(killed, "things")
    asked = []
    assert shards.write(plan(killed), lambda shard: asked.append((shard.split, shard.index)) or make(shard))
    assert asked == [("train", 1), ("train", 2), ("extra", 0)]
    assert contents(killed) == contents(whole)


def test_two_processes_write_what_one_writes(whole, tmp_path):
    two = tmp_path / "two"
    assert not shards.write(plan(two), make, 0, 2)
    assert shards.write(plan(two), make, 1, 2)
    assert contents(two) == contents(whole)
    with pytest.raises(ValueError, match="process_index is 2: it must be in"):
        shards.write(plan(two), make, 2, 2)


def test_tfds_reads_it_without_tensorflow(whole):
    source = tfds.builder_from_directory(str(whole)).as_data_source("train")
    assert len(source) == 10 and source[9]["caption"] == b"train 9" and source[5]["x"].shape == (6, 3)
    records = shards.open_records(whole, "things", "extra")
    assert len(records) == 2 and records.recipe["a"] == 1
    assert "tensorflow" not in sys.modules


def test_entries_may_be_left_out_but_not_all(tmp_path):
    assert shards.write(plan(tmp_path / "some"), lambda shard: list(make(shard))[: 0 if shard.index == 1 else 3])
    records = shards.open_records(tmp_path / "some", "things")
    assert [record["caption"] for record in records] == [b"train %d" % i for i in (0, 1, 2, 8, 9)]
    with pytest.raises(ValueError, match="not a single record was made of 10 inputs"):
        shards.write(plan(tmp_path / "none"), lambda shard: ())


def test_another_recipe_is_refused_by_what_differs(whole):
    before = contents(whole)
    with pytest.raises(ValueError, match=r"holds things of another recipe \(a 1, wanted 2\): remove the folder"):
        shards.write(plan(whole, a=2), make)
    assert contents(whole) == before


@pytest.mark.parametrize("damage", ["half", "empty", "flipped"])
def test_a_damaged_shard_is_named_and_alone_made_again(whole, damage):
    before = contents(whole)
    path = whole / "things-train.array_record-00001-of-00003"
    data = bytearray(path.read_bytes())
    data[200] ^= 255  # inside the first record
    path.write_bytes({"half": data[: len(data) // 2], "empty": b"", "flipped": data}[damage])
    with pytest.raises(ValueError, match="train.array_record-00001-of-00003 is damaged .*: remove this file and run"):
        list(shards.open_records(whole, "things"))
    path.unlink()
    with pytest.raises(ValueError, match="00001-of-00003 is missing: run the command"):
        shards.open_records(whole, "things")
    assert shards.write(plan(whole), make) and contents(whole) == before


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_what_tfds_needs_is_named_and_alone_made_again(whole, name):
    before = contents(whole)
    (whole / name).write_text("{")
    with pytest.raises(ValueError, match=f"{name} is damaged .*: remove this file and run"):
        shards.open_records(whole, "things")
    (whole / name).unlink()
    with pytest.raises(ValueError, match="run the command that ma"):
        shards.open_records(whole, "things")
    assert shards.write(plan(whole), make) and contents(whole) == before


def test_unwritable_folder_and_foreign_dataset(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out: cannot write in"):
        shards.write(plan(tmp_path / "file" / "data"), make)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="not one of sf_jax: use another folder"):
        shards.write(plan(tmp_path), make)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data folder with one clip and its caption."""
    folder = tmp_path_factory.mktemp("prepared")
    made = {"text_dim": 3, "text_len": 4, "dtype": "float32", "made_with": {}}
    prompts.write_prompts(folder / "captions", ["a"], "b", lambda texts: [(np.ones((4, 3)), 2)] * len(texts), **made)
    latents = [(0, np.ones((2, 4, 4, 1), np.float32))]
    videos.write_videos(folder / "videos", ["v"], ["a"], 1, (2, 4, 4, 1), lambda *_: latents, made_with={})
    return folder


def opened(folder):
    sizes = {"frames": 1, "height": 4, "width": 4, "channels": 1}
    return videos.open_videos(folder, **sizes, text_dim=3, text_len=4)[0]


def refused_with(folder, file, key, value):
    """The one-line error for a data folder whose `file` has another value for a key, or lacks the key (`...`)."""
    good = file.read_text()
    changed = {name: entry for name, entry in (json.loads(good) | {key: value}).items() if entry is not ...}
    file.write_text(json.dumps(changed))
    text = refused(opened, folder)
    file.write_text(good)
    assert opened(folder)["latent"].shape == (1, 4, 4, 1)
    return text


@pytest.mark.parametrize("value", [None, 5, {}, ..., [], [2, 4, 4], [2, 4, 4, True], [2, 4, -4, 1], ["2", 4, 4, 1]])
def test_sizes_of_latents_in_a_recipe(prepared, value):
    file = prepared / "videos" / "recipe.json"
    assert str(file) in refused_with(prepared, file, "latent", value)


@pytest.mark.parametrize("value", [None, "x", [], -1, 1.5, True, ...])
@pytest.mark.parametrize("key", ["text_len", "text_dim"])
def test_sizes_of_embeddings_in_a_recipe(prepared, key, value):
    file = prepared / "captions" / "recipe.json"
    assert f"{file} is damaged ({key} is" in refused_with(prepared, file, key, value)


@pytest.mark.parametrize("part", ["captions", "videos"])
@pytest.mark.parametrize("change", [{"fileFormat": "riegeli"}, {"fileFormat": "tfrecord"}, {"fileFormat": "x"}, None])
def test_other_formats_and_empty_splits(prepared, part, change):
    file = prepared / part / "dataset_info.json"
    if change is None:
        change = {"splits": [split | {"shardLengths": []} for split in json.loads(file.read_text())["splits"]]}
    ((key, value),) = change.items()
    assert f"{file} is damaged" in refused_with(prepared, file, key, value)
