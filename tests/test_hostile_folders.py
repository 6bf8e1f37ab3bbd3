"""Unexpected folder contents: leftovers of killed processes, other data, odd names, damaged logs."""

import json
import os
import subprocess
import time

import numpy as np
import pytest

from sf_jax import files
from sf_jax.config import from_dict
from sf_jax.data import moving_digits, shards
from sf_jax.training import checkpoint, loop, metrics
from tests.helpers import refused
from tests.test_shards import make, plan

DEEP = "[" * 100_000

# leftovers of killed processes


def dead_process() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.skipif(os.name == "nt", reason="processes cannot be asked there")
def test_leftovers_of_killed_processes_go(tmp_path):
    dead, machine, old = dead_process(), files._machine(), time.time() - 7200
    gone = [f".log.jsonl.{dead}.{machine}0123abcd.tmp", f".a b.{dead}.{machine}0123abcd.tmp"]
    kept = [
        f".log.jsonl.{os.getpid()}.{machine}0123abcd.tmp",  # still running
        f".log.jsonl.{dead}.{'0' * 8}0123abcd.tmp",  # on another machine
        f".log.jsonl.{dead}.0123abcd.tmp",  # from an earlier version, perhaps on another machine
        ".hidden",
        "log.jsonl",
        f"log.jsonl.{dead}.{machine}0123abcd.tmp",
    ]
    for name in gone + kept:
        (tmp_path / name).write_text("")
    for name in (f".w.safetensors.{dead}.0123abcd.tmp", f".x.{os.getpid()}.0123abcd.tmp", ".shared.0123abcd"):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (old, old))
    kept.append(f".x.{os.getpid()}.0123abcd.tmp")
    folder = tmp_path / f".metadata.{dead}.{machine}0123abcd.tmp"
    folder.mkdir()
    (folder / "features.json").write_text("")
    os.utime(tmp_path / ".hidden", (old, old))
    files.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    with files.replacing(tmp_path / "new") as unfinished:
        files.remove_leftovers(tmp_path)
        unfinished.write_text("x")  # its own file also counts as in use
    assert (tmp_path / "new").read_text() == "x"


@pytest.mark.skipif(os.name == "nt", reason="processes cannot be asked there")
def test_leftovers_go_from_data_folders(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    leftover = folder / f".recipe.json.{dead_process()}.{files._machine()}0123abcd.tmp"
    leftover.write_text("")
    shards.write(plan(folder), make)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


# other data


def names_of(folder):
    return sorted(folder.glob("things-train*"))


def swap(first, second):
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


def test_shards_of_another_dataset_are_noticed(tmp_path):
    def other(shard):
        for example in make(shard):
            yield example | {"caption": example["caption"].upper()}

    shards.write(plan(tmp_path / "a"), make)
    shards.write(plan(tmp_path / "b"), other)
    a, b = (names_of(tmp_path / name) for name in "ab")
    digest = shards.open_records(tmp_path / "a", "things").digest
    assert digest != shards.open_records(tmp_path / "b", "things").digest
    good = a[1].read_bytes()
    a[1].write_bytes(b[1].read_bytes())
    assert "00001-of-00003 is damaged (it is not the file that was written" in refused(
        shards.open_records, tmp_path / "a", "things"
    )
    a[1].write_bytes(good)
    swap(a[0], a[1])
    assert "is not the file that was written" in refused(shards.open_records, tmp_path / "a", "things")
    (tmp_path / "a" / shards.DIGESTS).unlink()  # as in earlier versions: a resumed run notices by the digest
    assert shards.open_records(tmp_path / "a", "things").digest != digest
    swap(a[0], a[1])
    assert shards.open_records(tmp_path / "a", "things").digest == digest
    assert shards.write(plan(tmp_path / "a"), make) and (tmp_path / "a" / shards.DIGESTS).is_file()


def test_the_digest_of_a_long_shard_sees_its_ends_and_its_middle(tmp_path):
    content = bytearray(np.random.default_rng(0).bytes(400_000))
    path = tmp_path / "a"

    def digest():
        path.write_bytes(content)
        return shards.file_digests([path])[0]

    before = digest()
    for place in (0, 4095, (400_000 - shards._END) // 2, 399_999, 400_000 - shards._END):
        content[place] ^= 1
        assert digest() != before
        content[place] ^= 1
    content += b"\0"
    assert digest() != before


def test_digits_whose_shards_change_places_are_noticed():
    def source(order, changed=None):
        clips = [{"video": np.full((2, 1, 1, 1), i % 251, np.uint8), "caption": str(i), "digit": i % 10} for i in order]
        if changed is not None:
            clips[changed]["digit"] = 11
        return moving_digits.ClipSource([clip | {"caption": clip["caption"].encode()} for clip in clips])

    whole = source(range(1000)).digest
    assert whole == source(range(1000)).digest != source([*range(500, 1000), *range(500)]).digest
    assert source(range(999)).digest != whole != source(range(1000), changed=0).digest


def test_a_run_goes_on_with_the_same_records_alone(capsys):
    config = from_dict({"stage": "teacher", "data": {"dir": "clips"}})
    digests = {"data.dir": "a", "records": "b", "teacher_weights": "c"}

    def changed(saved, allow=False):
        return loop._changed_inputs(config, saved, digests, 7, allow)

    assert changed(digests) == changed(None) == [] and capsys.readouterr().out == ""
    assert changed({"data.dir": "a", "teacher_weights": "c"}) == []
    assert "step 7 was saved without a hash of its records" in capsys.readouterr().out
    assert "data.dir is clips: step 7 was trained with other data" in refused(changed, digests | {"records": "x"})
    assert changed(digests | {"records": "x"}, allow=True) == ["records: x -> b"]
    assert "trained with other data" in refused(changed, digests | {"data.dir": "x"})
    assert "trained with other weights" in refused(changed, digests | {"teacher_weights": "x"})


# workdirs


def test_odd_names_among_checkpoints_are_named_and_skipped(tmp_path):
    for name in ("2", "100", "\u00b2", "abc", " 5", "0100", "\u0663", "-3", "1e3"):
        (tmp_path / name).mkdir()
    (tmp_path / "7").write_text("")
    (tmp_path / "8").symlink_to(tmp_path / "2")
    assert [step for step, _ in checkpoint.step_folders(tmp_path)] == [100, 2]
    odd = {"\u00b2", "abc", " 5", "0100", "\u0663", "-3", "1e3", "7", "8"}
    assert set(checkpoint.other_names(tmp_path)) == odd


def open_log(path, start=3):
    log = metrics.Log(path, start, 10, 1, "teacher")
    log.close()
    return path.read_text()


GOOD = [json.dumps({"step": step, "seconds_per_step": 1, "motion": 0.5}) for step in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "bad",
    [
        b'{"step": "3"}',
        b'{"step": null}',
        b'{"step": true}',
        b'{"step": NaN}',
        b"[1]",
        b'"abc"',
        b"null",
        b"{}",
        b"\xff\xfe\x00",
        b"not JSON",
        DEEP.encode(),
    ],
)
def test_a_damaged_log_is_set_aside(bad, tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    content = "\n".join([*GOOD[:2], "BAD", *GOOD[2:], ""]).encode().replace(b"BAD", bad)
    path.write_bytes(content)
    assert open_log(path).splitlines() == GOOD[:3]
    assert (tmp_path / "log.jsonl.damaged").read_bytes() == content
    printed = capsys.readouterr().out
    assert printed.count(f"{path} is damaged, 1 of its lines are none of a log: kept as {path}.damaged, 4 go on\n") == 1
    path.write_bytes(content)
    open_log(path)
    assert (tmp_path / "log.jsonl.damaged.1").read_bytes() == content


def test_a_log_of_a_killed_run_is_not_damaged(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join([*GOOD[:3], GOOD[3][:10]]))
    assert open_log(path).splitlines() == GOOD[:3]
    path.write_text("\n".join([*GOOD[:3], '{"step": 3, "warnings": ["\\u2028"], "motion": "x"}', ""]))
    assert len(open_log(path).splitlines()) == 4
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]
