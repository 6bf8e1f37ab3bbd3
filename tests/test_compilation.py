"""Compiled programs on disk: their folder, cache hits, and that bad entries cannot break a run."""

import functools
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sf_jax import compilation
from sf_jax.inference import executables
from sf_jax.inference.executables import Executables
from tests.helpers import read_frames

# Runs a command and prints how often JAX looked up a program and how often it found one.
COUNTED = """
import collections, runpy, sys
import jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    print("programs", events["compile_requests_use_cache"], events["cache_hits"], file=sys.stderr)
"""


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A cache folder for this test only."""
    for name in list(os.environ):
        if "CACHE" in name:
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "sf_jax"


def test_the_folder_is_the_users_or_the_named_one_or_none(alone, tmp_path, monkeypatch, capsys):
    assert compilation.cache_folder() == alone and alone.is_dir()
    monkeypatch.setenv("SF_JAX_CACHE_DIR", str(tmp_path / "named" / "deep"))
    assert compilation.cache_folder() == tmp_path / "named" / "deep"
    for value in ("off", "OFF", "none", "0"):
        monkeypatch.setenv("SF_JAX_CACHE_DIR", value)
        assert compilation.cache_folder() is None and compilation.keep_compiled() is None
    assert not capsys.readouterr().err


def test_a_folder_that_cannot_be_used_is_told_in_one_line(alone, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SF_JAX_CACHE_DIR", str(tmp_path / "file"))
    assert compilation.keep_compiled() is None
    assert capsys.readouterr().err.endswith("File exists; compiled programs are not kept\n")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("SF_JAX_CACHE_DIR", str(tmp_path / "open"))
    assert compilation.keep_compiled() is None
    assert "or everybody can write it; compiled programs are not kept" in capsys.readouterr().err
    monkeypatch.delenv("SF_JAX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compilation.keep_compiled() is None and not capsys.readouterr().err


def test_programs_that_nobody_reads_are_removed_once_a_day(alone):
    folder = compilation._compiled_folder(None)
    (folder / "looked").unlink()
    paths = {name: folder / "executables" / name for name in ("old", "read", "new")} | {"jax": folder / "jit_f-cache"}
    paths["old"].parent.mkdir()
    long_ago = time.time() - 61 * 24 * 3600
    for name, path in paths.items():
        path.touch()
        if name != "new":
            os.utime(path, (time.time() if name == "read" else long_ago, long_ago))
    compilation._compiled_folder(None)
    assert {name for name, path in paths.items() if path.exists()} == {"read", "new"}
    os.utime(paths["read"], (long_ago, long_ago))
    compilation._compiled_folder(None)
    assert paths["read"].exists()


def test_python_users_ask_for_it(alone):
    code = """
import jax, sf_jax
sf_jax.load_pipeline
assert jax.config.jax_compilation_cache_dir is None
folder = sf_jax.keep_compiled()
assert str(folder) == jax.config.jax_compilation_cache_dir and folder.name.startswith("compiled-")
assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
import os; os.environ["JAX_COMPILATION_CACHE_DIR"] = "theirs"
assert str(sf_jax.keep_compiled()) == "theirs"
assert sf_jax.keep_compiled(folder.parent / "ours").parent.name == "ours"
print(folder)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(str(alone)), done.stderr


def counted_program():
    """A program with a static argument, and the list that grows when it is traced."""
    traced = []

    @functools.partial(jax.jit, static_argnums=1, donate_argnums=2)
    def program(x, power, total):
        traced.append(power)
        return {"sum": total + (x**power).sum(), "x": x}

    return program, traced


def test_a_program_is_read_and_not_traced_again(tmp_path, monkeypatch):
    program, traced = counted_program()
    x = np.arange(4, dtype=np.float32)
    for _ in range(2):  # each with empty in-memory caches, like a new process
        kept = Executables(tmp_path)
        for start in (1.0, 2.0):
            out = kept.call(program, (1,), x, 2, jnp.float32(start))
            assert float(out["sum"]) == 14 + start and np.array_equal(out["x"], x)
    assert traced == [2] and len(list(tmp_path.iterdir())) == 1
    kept.call(program, (1,), x, 3, jnp.float32(0))
    kept.call(program, (1,), x[:2], 3, jnp.float32(0))
    assert traced == [2, 3, 3] and len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(executables, "_code", lambda: "other code")
    executables._surroundings.cache_clear()
    Executables(tmp_path).call(program, (1,), x, 2, jnp.float32(0))
    executables._surroundings.cache_clear()
    assert len(list(tmp_path.iterdir())) == 4
    abstract = jax.eval_shape(lambda x: kept.call(program, (1,), x, 2, 0.0), x)
    assert abstract["x"].shape == (4,) and len(list(tmp_path.iterdir())) == 4


def test_places_are_part_of_a_program(tmp_path):
    program, traced = counted_program()
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(np.ones(4, np.float32), NamedSharding(mesh, PartitionSpec("data")))
    for _ in range(2):
        kept = Executables(tmp_path)
        for x, where in ((spread, mesh), (np.ones(4, np.float32), None)):
            out = kept.call(program, (1,), x, 2, jnp.float32(0), mesh=where)
            assert float(out["sum"]) == 4
    assert len(traced) == len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"no program", None])
def test_a_damaged_file_is_compiled_again(tmp_path, damage):
    program, traced = counted_program()
    arguments = (program, (1,), np.ones(3, np.float32), 2)
    assert float(Executables(tmp_path).call(*arguments, jnp.float32(0))["sum"]) == 3
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-100] if damage is None else damage)
    assert float(Executables(tmp_path).call(*arguments, jnp.float32(1))["sum"]) == 4
    assert len(traced) == 1 or len(path.read_bytes()) > len(whole) // 2
    assert float(Executables(tmp_path).call(*arguments, jnp.float32(2))["sum"]) == 5


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path):
    program, _ = counted_program()
    kept = Executables(tmp_path / "missing")
    assert float(kept.call(program, (1,), np.ones(3, np.float32), 2, jnp.float32(0))["sum"]) == 3


def run(*arguments, module="sf_jax.generate"):
    done = subprocess.run([sys.executable, "-c", COUNTED, module, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *other, last = done.stderr.splitlines()
    assert not other, done.stderr
    asked, found = map(int, last.split()[1:])
    return asked, found


@pytest.mark.slow
@pytest.mark.parametrize("model", ["digits", "wan", "bidirectional", "schedule"])
def test_after_warm_nothing_is_compiled(model, alone, folder, tmp_path):
    size, prompt = ["--frames=21", "--height=32", "--width=48"], ["--prompt=a cat"]
    flags = ["--frames=12"] if model == "digits" else [f"--model={folder}", *size]
    if model in ("wan", "schedule"):
        flags += [f"--checkpoint={folder}/student.safetensors"]
    if model == "schedule":
        schedule = tmp_path / "schedule.json"
        schedule.write_text('[{"time": 0, "prompt": "a cat"}, {"time": 0.8, "prompt": "a dog", "mode": "recache"}]')
        flags, prompt = [*flags, f"--schedule={schedule}", "--window=6", "--frames=33"], []
    if model == "bidirectional":
        flags += ["--solver=unipc", "--steps=4"]
    prompt = [] if model == "digits" else prompt
    run(*flags, module="sf_jax.warm")
    files = {path: path.read_bytes() for path in alone.rglob("*") if path.is_file()}
    assert files and not (tmp_path / "out").exists()
    asked, found = run(*flags, *prompt, f"--out={tmp_path}/out", "--seed=7")
    assert asked == found
    assert {path: path.read_bytes() for path in alone.rglob("*") if path.is_file()} == files
    if model != "digits":
        return
    video = read_frames(tmp_path / "out" / "a_3_moving_up_and_right_slowly.mp4")
    for path in files:
        path.write_bytes(b"damaged")
    run(*flags, f"--out={tmp_path}/again", "--seed=7")
    np.testing.assert_array_equal(read_frames(tmp_path / "again" / "a_3_moving_up_and_right_slowly.mp4"), video)


@pytest.mark.slow
def test_processes_may_share_an_empty_cache(alone, tmp_path):
    arguments = [sys.executable, "-m", "sf_jax.generate", "--frames=6"]
    both = [subprocess.Popen([*arguments, f"--out={tmp_path}/{i}"], stderr=subprocess.PIPE, text=True) for i in (1, 2)]
    assert [(process.communicate()[1], process.returncode) for process in both] == [("", 0)] * 2


def test_warm_needs_a_place(monkeypatch):
    monkeypatch.setenv("SF_JAX_CACHE_DIR", "off")
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
    done = subprocess.run([sys.executable, "-m", "sf_jax.warm"], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and done.stderr.startswith(
        "error: no folder for compiled programs: set SF_JAX_CACHE_DIR"
    )
    assert len(done.stderr.splitlines()) == 1
