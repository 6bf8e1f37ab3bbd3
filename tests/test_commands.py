"""The commands as a user types them: their output, and one clear line for every mistake."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from configs import digits
from sf_jax import files, load_pipeline
from sf_jax.command import define_path
from sf_jax.config import from_dict
from sf_jax.weights.package import load_package, shipped_path
from tests.forked import run_command
from tests.helpers import read_frames


def command(*arguments, module="sf_jax.generate", **options):
    return run_command(module, *arguments, **options)


def test_generate_without_arguments_writes_a_video(tmp_path):
    # A separate cache, as JAX warns when another process is writing the entry that this one reads.
    env = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    env |= {"PYTHONPATH": os.getcwd(), "XDG_CACHE_HOME": str(tmp_path / "caches")}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # on a fast machine, none would be kept otherwise
    done = command(cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("chunk") >= 16 and "time to first frame" in done.stdout
    name = tmp_path / "out" / "a_3_moving_up_and_right_slowly"
    assert read_frames(name.with_suffix(".mp4")).shape == (48, 288, 288, 3)
    assert name.with_suffix(".gif").exists() and name.with_suffix(".png").exists()
    assert not done.stderr.strip(), done.stderr
    (compiled,) = (tmp_path / "caches" / "sf_jax").iterdir()
    assert compiled.name.startswith("compiled-") and any(compiled.iterdir())


def test_shipped_student_streams_and_does_not_depend_on_the_batch():
    pipe = load_pipeline()
    prompts = ["a 7 moving left, fast", "a 2 moving up, slowly"]
    parts = list(pipe.stream(prompts, frames=9, seed=3))
    assert [part.shape for part in parts] == [(2, 3, 24, 24, 1)] * 3
    alone = pipe(prompts[1], frames=9, seed=3, first_index=1)
    whole = pipe(prompts, frames=9, seed=3)
    assert (abs(alone[0].astype(int) - whole[1]) <= 1).mean() > 0.99
    assert (whole != pipe(prompts, frames=9, seed=4)).any()


def test_shipped_teacher_makes_its_own_length_only():
    pipe = load_pipeline("teacher")
    assert pipe("a 0 moving down").shape == (1, 9, 24, 24, 1)
    with pytest.raises(ValueError, match="frames is 48: this bidirectional network generates 9"):
        pipe("a 0 moving down", frames=48)


def test_shipped_start_is_what_the_config_says():
    pipe = load_pipeline("init")
    assert pipe("a 0 moving down", frames=12).shape == (1, 12, 24, 24, 1)
    package, config = load_package(shipped_path("init")), from_dict(digits.get_config("distill"))
    assert config.init_weights == "init" and package.kind == "student" and package.captions == config.data.captions
    assert dataclasses.replace(package.config, remat=config.model.remat) == config.model
    assert package.rollout == load_pipeline("student").rollout == from_dict(digits.get_config("init")).rollout
    assert from_dict(digits.get_config("switch")).init_weights == "student"
    start, config = load_package(shipped_path("consistency")), from_dict(digits.get_config("polish"))
    assert config.init_weights == "consistency" and start.kind == "student" and start.rollout == package.rollout
    assert dataclasses.replace(start.config, remat=config.model.remat) == config.model


def test_generate_with_nothing_to_do_lists_no_files(tmp_path):
    (tmp_path / "a_7_moving_left.mp4").touch()
    done = command("--prompt=a 7 moving left", f"--out={tmp_path}", "--if_exists=skip")
    assert done.returncode == 0 and done.stdout.endswith("kept\nevery video is there already\n"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=a purple 7"], "purple"),
        (["--frames=10"], "frames is 10: with chunks of 3 latent frames the nearest that can be generated: 9 or 12"),
        (["--checkpoint=none.safetensors"], "checkpoint none.safetensors does not exist"),
        (["--checkpoint=sf_jax/assets/digits_codec.safetensors"], "was not written by sf_jax.train"),
        (["--prompts=none.txt"], "prompts: cannot read none.txt"),
        (["--guidance=3"], "a student has none"),
        (["--out=setup.py/videos"], "cannot write in setup.py/videos"),
    ],
)
def test_generate_refuses_bad_input_in_one_line(arguments, message):
    done = command(*arguments)
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("runs/a", "runs/a"),
        ("~/videos", "HOME/videos"),
        ("C:", "C:"),
        ("gs://bucket/a", "gs://bucket/a is an address (gs): files of this machine alone"),
        ("hf://org/model", "is an address (hf)"),
        ("gs:/bucket", "is an address (gs)"),
        ("C:\\videos", "is a path of Windows"),
        ("~nobody-of-this-name/a", "there is no home folder of that name"),
    ],
)
def test_paths_are_of_this_machine(path, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    try:
        assert files.local_path(path) == expected.replace("HOME", str(tmp_path))
    except ValueError as error:
        assert expected in str(error)


def test_path_flags_and_fields(tmp_path):
    values = flags.FlagValues()
    define_path("out", None, "a folder", values)
    values(["x", "--out=~/videos"])
    assert values.out == str(Path("~/videos").expanduser())
    with pytest.raises(flags.IllegalFlagValueError, match="is an address"):
        values(["x", "--out=gs://bucket"])
    config = digits.get_config("distill")
    config.data.dir = "gs://bucket/data"
    with pytest.raises(ValueError, match="data.dir: gs://bucket/data is an address"):
        from_dict(config)


def test_unknown_words_are_answered_with_the_known_ones():
    done = command("--prompt=a purple 7")
    assert "'purple'" in done.stderr and "moving" in done.stderr and "slowly" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config=configs/digits.py:init", "--config.teacher_weights=none.safetensors"],
            "none.safetensors does not exist",
        ),
        (["--config=configs/digits.py:distill", "--config.data.frames=10"], "frames is 10"),
        (["--config=configs/digits.py:distill", "--config.mesh.data=64"], "the sizes must multiply to"),
        (["--config=configs/wan_distill.py"], "has no dataset wan_prompts"),
    ],
)
def test_train_refuses_bad_input_in_one_line(arguments, message, tmp_path):
    done = command(*arguments, f"--workdir={tmp_path}/run", module="sf_jax.train")
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/digits.py:distill", "--workdir=setup.py/run"], "workdir: cannot write in setup.py/run"),
        (["--config=configs/digits.py", "--config.stepz=3", "--workdir=x"], "stepz"),
        (["--config=configs/none.py", "--workdir=x"], "configs/none.py"),
        (["--config=configs/digits.py:other", "--workdir=x"], "configs/digits.py has teacher, causal,"),
        (["--config=configs/digits.py"], "workdir"),
    ],
)
def test_train_answers_a_wrong_command_line_in_one_line(arguments, message):
    done = command(*arguments, module="sf_jax.train")
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_digits_that_cannot_be_written_or_read_end_in_one_line(tmp_path):
    build = [sys.executable, "-m", "sf_jax.data.moving_digits", f"--data_dir={tmp_path}"]
    limited = ["sh", "-c", 'ulimit -f 2000; exec "$@"', "sh"]  # blocks of 512 or 1024 bytes
    done = subprocess.run([*limited, *build], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(
        f"error: cannot write {tmp_path}/moving_digits/full/1.2.0 (File too large): make room"
    )
    assert subprocess.run(build).returncode == 0
    folder = tmp_path / "moving_digits" / "full" / "1.2.0"
    path = folder / "moving_digits-train.array_record-00001-of-00002"
    whole = path.read_bytes()
    # Only the index of the second shard is read at the start; damaged clips are found by grain's threads.
    for damaged in (whole[: len(whole) // 2], whole[:4096] + bytes(len(whole) - 2**18) + whole[4096 - 2**18 :]):
        path.write_bytes(damaged)
        options = ["--config=configs/digits.py:teacher", f"--config.data.dir={tmp_path}", f"--workdir={tmp_path}/run"]
        done = command(*options, module="sf_jax.train")
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith(f"error: {path} is damaged (")
        assert done.stderr.endswith(f": remove the folder {folder} and run the command again\n")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("jnp.zeros(2**50, 'int8')", "error: a device has not enough memory (RESOURCE_EXHAUSTED: Out of memory"),
        ("(_ for _ in ()).throw(RuntimeError('RESOURCE_EXHAUSTED'))", "Traceback"),
    ],
)
def test_too_little_memory_is_told_in_one_line_and_bugs_are_not(code, message):
    script = f"import jax.numpy as jnp; from sf_jax import command; command.run(lambda: {code}, smaller='be modest')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(message)
    assert message == "Traceback" or done.stderr.endswith(": be modest\n") and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_convert_and_evaluate(tmp_path):
    shipped = "sf_jax/assets/digits_student.safetensors"
    copy = tmp_path / "copy.safetensors"
    done = command(f"--input={shipped}", f"--output={copy}", "--dtype=float32", module="sf_jax.convert")
    assert done.returncode == 0 and copy.stat().st_size > 1.9 * os.path.getsize(shipped), done.stderr
    done = command(f"--input={shipped}", f"--output={tmp_path}", module="sf_jax.convert")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and not list(tmp_path.parent.glob("*.part"))
    options = ["--frames=9", "--num_samples=8", "--batch_size=8", f"--out={tmp_path}/report"]
    done = command(f"--checkpoint={copy}", *options, module="sf_jax.evaluate")
    assert done.returncode == 0 and "both right (joint)" in done.stdout, done.stderr
    done = command(f"--checkpoint={copy}", "--guidance=2", *options, module="sf_jax.evaluate")
    assert done.returncode == 1 and "a student has none" in done.stderr
