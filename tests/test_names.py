"""Names of new videos, and names under which browsers reach the server."""

import os
import subprocess
import sys

import pytest

from sf_jax import files
from sf_jax.inference import names
from sf_jax.server import guard


def test_names_never_take_those_of_files_that_are_there(tmp_path, capsys):
    for name in ("a_cat.mp4", "a_dog.png", "a_cat_2.gif"):
        (tmp_path / name).touch()
    some = ["a_cat", "a_cat_3", "a_dog", "a_fox"]
    assert names.free_names(some, tmp_path, "number") == ["a_cat_4", "a_cat_3", "a_dog_2", "a_fox"]
    assert "a_cat.mp4 is there already: the new one is a_cat_4" in capsys.readouterr().out
    assert names.free_names(some, tmp_path, "replace") == some
    assert "a_dog.png is there already: it is replaced" in capsys.readouterr().out
    capsys.readouterr()
    assert names.free_names(some, tmp_path, "skip") == [None, "a_cat_3", "a_dog", "a_fox"]
    assert "a_dog.png is there already, a_dog.mp4 is not: it is made, and existing" in capsys.readouterr().out
    assert names.free_names(some, tmp_path, "skip", needed=(".mp4", ".npy")) == some
    assert names.free_names(some, tmp_path, "skip", (".mp4",)) == [None, "a_cat_3", "a_dog", "a_fox"]
    with pytest.raises(ValueError, match="a_cat.mp4 is there already: give another --out, or --if_exists=skip"):
        names.free_names(some, tmp_path, "refuse")


def test_two_processes_never_choose_the_same_name(tmp_path):
    with names.reserved_names(["a_cat", "a_dog"], tmp_path, "number") as first:
        assert first == ["a_cat", "a_dog"]
        with names.reserved_names(["a_cat", "a_fox"], tmp_path, "number") as second:
            assert second == ["a_cat_2", "a_fox"]
        refused = names.reserved_names(["a_bird", "a_dog"], tmp_path, "refuse")
        with pytest.raises(ValueError, match="a_dog.mp4 is being made by another process"), refused:
            pass
        with names.reserved_names(["a_cat"], tmp_path, "replace") as third:
            assert third == ["a_cat"]
    assert not list(tmp_path.iterdir())
    with names.reserved_names(["a cat-0", "A cat-0"], tmp_path, "refuse", (".mp4",)) as both:
        assert both == ["a cat-0", "A cat-0"]  # as in VBench's list
        with names.reserved_names(["A cat-0", "a cat-0"], tmp_path, "number", (".mp4",)) as others:
            assert others == ["A cat-0_2", "a cat-0_3"]
    (tmp_path / ".notes.reserved").write_text("of somebody else")
    os.utime(tmp_path / ".notes.reserved", (0, 0))
    files.remove_leftovers(tmp_path)
    (tmp_path / ".notes.reserved").unlink()
    empty = files.reservation_path(tmp_path, "a_cat")
    empty.touch()
    with names.reserved_names(["a_cat"], tmp_path, "number") as new:
        assert new == ["a_cat_2"]
    os.utime(empty, (0, 0))  # its process was killed before it wrote its id
    with names.reserved_names(["a_cat"], tmp_path, "number") as old:
        assert old == ["a_cat"]
    code = "import os, pathlib, sys; from sf_jax import files\n"
    code += "with files.reservation(pathlib.Path(sys.argv[1]), 'a_cat'): os._exit(0)"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    assert len(list(tmp_path.iterdir())) == 1  # of a process that was killed
    with names.reserved_names(["a_cat"], tmp_path, "refuse") as last:
        assert last == ["a_cat"]
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    files.remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_video_that_another_process_has_just_finished_is_kept(tmp_path, monkeypatch):
    choose = names.free_names

    def finished(*arguments):
        chosen = choose(*arguments)
        (tmp_path / "a_cat.mp4").touch()
        return chosen

    monkeypatch.setattr(names, "free_names", finished)
    with names.reserved_names(["a_cat"], tmp_path, "number") as new:
        assert new == ["a_cat_2"]


def test_origins_and_hosts_are_those_that_browsers_send():
    origins = ["https://A.org/", "http://b.org:80", "https://c.org:8443", "*"]
    assert [guard.origin_of(text) for text in origins] == ["https://a.org", "http://b.org", "https://c.org:8443", "*"]
    for text in ("a.org", "ftp://a.org", "https://a.org/page", ""):
        with pytest.raises(ValueError, match=f"origins: {text!r} is no origin; give a scheme and a host"):
            guard.origin_of(text)
    hosts = guard.host_names(["Video.example.org:443", "[FD00::1]", "[fd00::2]:80", "fd00::3"], "0.0.0.0")
    assert hosts[:5] == ("video.example.org", "[fd00::1]", "[fd00::2]", "[fd00::3]", "0.0.0.0")
    with pytest.raises(ValueError, match="hosts: 'https://a.org' is no name of a server"):
        guard.host_names(["https://a.org"], "0.0.0.0")
