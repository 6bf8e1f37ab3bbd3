"""Resuming a run after damage, signals, kills at any moment, full disks and config changes."""

import dataclasses
import errno
import json
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from sf_jax import files
from sf_jax.data import moving_digits
from sf_jax.training import checkpoint, export, fingerprint, loop, metrics, sinks, stages
from sf_jax.weights.package import save_package
from tests.helpers import random_params, tree_relative
from tests.test_training import SMALL, losses, save_teacher, small_config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A small teacher's weights."""
    return save_teacher(tmp_path_factory.mktemp("weights"), small_config("teacher"))


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    """A run of four steps with checkpoints at steps 2, 3 and 4, not to be modified: (config, workdir)."""
    workdir = tmp_path_factory.mktemp("finished")
    changes = {"checkpoint_every": 1, "keep_checkpoints": 3, "data_dir": str(workdir / "no_data")}
    config = small_config("distill", teacher_weights=teacher, **changes)
    loop.train(config, workdir)
    assert not (workdir / "no_data").exists()  # Self Forcing reads no videos
    return config, workdir


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of that run: (config, workdir, final weights)."""
    config, whole = finished
    subprocess.run(["cp", "-r", str(whole), str(tmp_path / "run")], check=True)
    return config, tmp_path / "run", (whole / "student.safetensors").read_bytes()


def flip_a_bit(folder):
    """Flips one bit in the middle of the largest file of the saved state."""
    path = max((p for p in (folder / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut_files(folder):
    """Truncates files to almost nothing, as Orbax's merge may no longer need the second half of a file."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 50])


def remove_state(folder):
    subprocess.run(["rm", "-r", str(folder / "state")], check=True)


def change_position(folder):
    """Changes the data position in the checkpoint's metadata."""
    path = folder / "about" / "metadata"
    about = json.loads(path.read_text())
    about["log"] = {"values": {}, "skipped": 7}
    path.write_text(json.dumps(about))


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [flip_a_bit, cut_files, remove_state, change_position],
)
def test_damaged_newest_checkpoint_is_told_and_the_one_before_is_used(damage, copy, capsys):
    config, workdir, weights = copy
    damage(workdir / "checkpoints" / "4")
    (workdir / "student.safetensors").unlink()
    assert loop.train(config, workdir).read_bytes() == weights
    out = capsys.readouterr().out
    assert "checkpoint of step 4 is damaged" in out and "using step 3" in out and "resuming from step 3" in out
    assert (workdir / "damaged" / "4").is_dir() and (workdir / "checkpoints" / "4").is_dir()
    assert [line["step"] for line in losses(workdir)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_when_all_are_damaged_nothing_is_touched(copy):
    config, workdir, _ = copy
    for step in (2, 3, 4):
        flip_a_bit(workdir / "checkpoints" / str(step))
    before = sorted(str(p) for p in workdir.rglob("*"))
    with pytest.raises(ValueError, match="none of the checkpoints .* can be read .*nothing was changed"):
        loop.train(config, workdir)
    assert sorted(str(p) for p in workdir.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "run with another config (seed: 0 -> 3)"),
        ({"stage": "init"}, "is the workdir of another stage (stage: 'distill' -> 'init')"),
        ({"optimizer": {"lr": 1.0}, "steps": 9}, "optimizer.lr: 0.0001 -> 1.0; steps: 4 -> 9"),
    ],
)
def test_changed_configs_are_refused_with_the_fields(changes, message, copy):
    config, workdir, _ = copy
    old = dataclasses.asdict(config)
    values = old | {name: old[name] | v if isinstance(v, dict) else v for name, v in changes.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        loop.train(checkpoint.from_dict(values), workdir)


@pytest.mark.slow
def test_changed_configs_go_on_when_told_to(copy, capsys):
    config, workdir, _ = copy
    loop.train(dataclasses.replace(config, steps=5, seed=1), workdir, allow_config_change=True)
    assert "config changed: seed: 0 -> 1" in capsys.readouterr().out
    lines = losses(workdir)
    assert lines[4] == {"step": 4, "config_changed": ["seed: 0 -> 1", "steps: 4 -> 5"]} and lines[5]["step"] == 5
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, ffn_dim=64), critic=config.model)
    wider = dataclasses.replace(wider, teacher=config.model)
    with pytest.raises(ValueError, match="holds step 5 of another model or optimizer .*ffn_in"):
        loop.train(wider, workdir, allow_config_change=True)


@pytest.mark.slow
def test_other_data_is_refused(copy, monkeypatch):
    config, workdir, weights = copy
    captions = moving_digits.all_captions()
    monkeypatch.setattr(moving_digits, "all_captions", lambda _: captions[:-1])
    with pytest.raises(
        ValueError, match="data.dir is .*: step 4 was trained with other data; use the old data, or --allow"
    ):
        loop.train(config, workdir)
    assert (workdir / "student.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_other_weights_in_the_same_file_are_refused(copy):
    config, workdir, weights = copy
    path = pathlib.Path(config.teacher_weights)
    kept = path.read_bytes()
    try:
        save_package(path, stages.package_of(small_config("teacher"), random_params(config.model, 7)))
        with pytest.raises(
            ValueError, match="teacher_weights is .*: step 4 was trained with other weights; use the old"
        ):
            loop.train(config, workdir)
        assert (workdir / "student.safetensors").read_bytes() == weights
        loop.train(config, workdir, allow_config_change=True)
        assert "teacher_weights: " in losses(workdir)[-1]["config_changed"][0]
    finally:
        path.write_bytes(kept)


@pytest.mark.slow
def test_a_second_run_in_the_same_workdir_is_refused(copy):
    config, workdir, _ = copy
    with files.locked(workdir, "workdir"), pytest.raises(ValueError, match="another run is using it; wait for its end"):
        loop.train(config, workdir)
    loop.train(config, workdir)


@pytest.mark.slow
def test_figures_that_change_nothing_may_change(copy):
    config, workdir, weights = copy
    free = dataclasses.replace(config, log_every=2, keep_checkpoints=1, checkpoint_every=4, grace_seconds=3.0)
    assert loop.train(free, workdir).read_bytes() == weights


@pytest.mark.slow
def test_full_disk_is_told_and_leaves_a_good_checkpoint(teacher, tmp_path, monkeypatch):
    config = small_config("distill", teacher_weights=teacher, checkpoint_every=1)
    whole = loop.train(config, tmp_path / "whole").read_bytes()
    save = checkpoint.ocp.CheckpointManager.save

    def full(self, step, **rest):
        if step == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory))
        return save(self, step, **rest)

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", full)
    with pytest.raises(
        OSError, match="cannot save step 3 .*No space left on device.*last good checkpoint is .*/2; make"
    ):
        loop.train(config, tmp_path / "run")
    monkeypatch.undo()
    assert loop.train(config, tmp_path / "run").read_bytes() == whole


@pytest.mark.slow
def test_what_is_not_finite_is_never_saved(teacher, tmp_path):
    rate = {"name": "adamw", "lr": 1e30}  # one update gives huge values, the next is not finite
    config = small_config("distill", teacher_weights=teacher, checkpoint_every=1, critic_optimizer=rate)
    with pytest.raises(FloatingPointError, match="is not finite.*checkpoint.*lower a learning rate"):
        loop.train(config, tmp_path)
    step, package = export.load_run(tmp_path)
    assert step == 1 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(package.params))


def test_checksums_see_every_bit():
    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=(5, 7)).astype("float32"), "b": jnp.ones((3,), jnp.bfloat16), "c": jnp.int32(4)}
    before = fingerprint.measure(tree)
    for _ in range(20):
        raw = tree["a"].copy()
        words = raw.view(np.uint32)
        words[rng.integers(5), rng.integers(7)] ^= np.uint32(1 << int(rng.integers(32)))
        assert fingerprint.measure(tree | {"a": raw})["a"].checksum != before["a"].checksum
    swapped = tree["a"][::-1].copy()
    assert fingerprint.measure(tree | {"a": swapped})["a"].checksum != before["a"].checksum
    tree["a"][2, 3], tree["a"][0, 0] = np.nan, np.inf
    assert [leaf.nonfinite for leaf in fingerprint.measure(tree).values()] == [2, 0, 0]


def command(teacher, folder, *more):
    found = [sys.executable, "-m", "sf_jax.train", "--config=configs/digits.py:distill", f"--workdir={folder}"]
    found += [f"--config.teacher_weights={teacher}", "--config.log_every=1", "--config.batch_size=8"]
    found += [
        "--config.init_weights=None",
        "--config.data.frames=6",
        "--config.checkpoint_every=1",
        "--config.steps=16",
        *more,
    ]
    return found + [f"--config.model.{k}={v}" for k, v in (SMALL | {"freq_dim": 16}).items()]


def wait_for_lines(path, count, process):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.01)


@pytest.mark.slow
def test_refused_writes_end_in_one_line_and_the_run_goes_on(finished, copy):
    config, workdir, weights = copy
    for step in (3, 4):
        subprocess.run(["rm", "-r", str(workdir / "checkpoints" / str(step))], check=True)
    (workdir / "student.safetensors").unlink()
    arguments = command(
        config.teacher_weights,
        workdir,
        f"--config.data.dir={config.data.dir}",
        "--config.steps=4",
        "--config.model.remat=none",
    )
    # The system limits files to 8 blocks; compiled programs are only read, not written.
    env = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}
    limited = ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh", *arguments]
    done = subprocess.run(limited, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "resuming from step 2" in done.stdout
    wanted = "error: cannot save step 3 .*too large.*: the last good checkpoint is .*/2; make room .*\n"
    assert re.fullmatch(wanted, done.stderr), done.stderr[-2000:]
    assert os.listdir(workdir / "checkpoints") == ["2"]
    assert loop.train(config, workdir).read_bytes() == weights
    assert losses(workdir) == losses(finished[1])


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    """The workdir of the command without interruptions."""
    workdir = tmp_path_factory.mktemp("whole")
    assert subprocess.run(command(teacher, workdir)).returncode == 0
    return workdir


@pytest.mark.slow
def test_killed_at_random_moments_continues_bit_exactly(teacher, whole, tmp_path):
    workdir, rng = tmp_path / "killed", random.Random(0)
    for lines in (3, 9):  # saves at every step, so most kills hit a save
        process = subprocess.Popen(command(teacher, workdir))
        wait_for_lines(workdir / "log.jsonl", lines, process)
        time.sleep(0.1 * rng.random())
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command(teacher, workdir), stdout=subprocess.PIPE, text=True)
    assert "resuming from step" in done.stdout and done.returncode == 0
    assert losses(workdir) == losses(whole)
    name = "student.safetensors"
    assert (workdir / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.exhaustive)]
)
def test_signals_save_and_the_same_command_goes_on(number, code, teacher, whole, tmp_path):
    arguments = command(teacher, tmp_path / "run", "--config.checkpoint_every=1000")
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_lines(tmp_path / "run" / "log.jsonl", 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code and "Traceback" not in err, err
    step = int(re.search(rf"{number.name}: saved step (\d+) in [0-9.]+ s, [0-9.]+ s after the signal", out).group(1))
    assert 3 <= step < 16
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and f"resuming from step {step}" in done.stdout
    assert losses(tmp_path / "run") == losses(whole)
    names = [folder / "student.safetensors" for folder in (tmp_path / "run", whole)]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.slow
def test_a_save_that_takes_longer_than_there_is_says_so(teacher, tmp_path):
    arguments = command(teacher, tmp_path / "run", "--config.checkpoint_every=1000", "--config.grace_seconds=0.001")
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_lines(tmp_path / "run" / "log.jsonl", 3, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    told = r"error: SIGTERM: step \d+ was not saved within 0.001 s \(grace_seconds\); there is no checkpoint yet\n"
    assert process.returncode == 1 and re.search(told, err), err


MESHES = """
import sys, dataclasses, jax
from sf_jax.config import MeshConfig
from sf_jax.training import loop
from tests.test_training import small_config

teacher, workdir, data_dir = sys.argv[1:]
config = small_config("distill", teacher_weights=teacher, data_dir=data_dir, mesh=dict(data=2, fsdp=2, tensor=2))
loop.train(config, workdir)
"""


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(finished, copy):
    config, workdir, _ = copy
    subprocess.run(["rm", "-r", *(str(workdir / "checkpoints" / step) for step in "34")], check=True)
    (workdir / "student.safetensors").unlink()
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    code = [sys.executable, "-c", MESHES, config.teacher_weights, str(workdir), config.data.dir]
    done = subprocess.run(code, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "resuming from step 2" in done.stdout, done.stdout + done.stderr[-2000:]
    weights = [load_file(folder / "student.safetensors") for folder in (workdir, finished[1])]
    assert tree_relative(*weights) < 1e-5


@pytest.mark.slow
def test_tensorboard_gets_the_numbers_and_the_log_says_what_is_missing(teacher, tmp_path, monkeypatch):
    config = small_config("distill", teacher_weights=teacher, log={"tensorboard": True, "sample_every": 2})
    shown = []
    monkeypatch.setattr(loop, "_WORTH_MEASURING", 4)
    loop.train(config, tmp_path, lambda videos, labels, path, fps: shown.append((videos.shape, len(labels), path.name)))
    assert shown == [((2, 6, 24, 24, 1), 2, "step_000002"), ((2, 6, 24, 24, 1), 2, "step_000004")]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(0 < line["model_flop_utilization"] < 1 for line in lines)
    events = list((tmp_path / "tensorboard").glob("events*"))
    assert len(events) == 1 and b"critic_loss" in events[0].read_bytes()
    with pytest.raises(ValueError, match="log.sample_every is 2: nothing here can write samples"):
        loop.train(config, tmp_path / "other")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ValueError, match=r"log.wandb_project is 'x': wandb is not installed: pip install 'sf_jax\[logs\]'"
    ):
        loop.train(small_config("distill", teacher_weights=teacher, log={"wandb_project": "x"}), tmp_path / "other")


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(tmp_path, monkeypatch):
    started = []

    def init(**given):
        started.append(given)
        return types.SimpleNamespace(id="abc", log=lambda values, step: started.append(step), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    config = small_config("teacher", log={"wandb_project": "x"})
    for _ in range(2):
        (sink,) = sinks.open_sinks(config, tmp_path, 0)
        sink.write(3, {"loss": 1.0})
        sink.close()
    assert started[0]["id"] is None and started[2]["id"] == "abc" and started[1] == started[3] == 3


@pytest.mark.slow
def test_a_line_between_two_checkpoints_is_the_same_after_a_resume(teacher, tmp_path, monkeypatch):
    config = small_config("distill", teacher_weights=teacher, steps=6, log_every=4, generator_every=4)
    loop.train(config, tmp_path / "whole")
    take = metrics.Log.step

    def interrupt(self, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        take(self, step, *rest)

    monkeypatch.setattr(metrics.Log, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "run")
    monkeypatch.undo()
    loop.train(config, tmp_path / "run")
    # Step 4's log line, written by another process, contains the student's update of step 1.
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert "generator_loss" in losses(tmp_path / "run")[0]


def test_a_log_that_cannot_be_written_says_so_once(tmp_path):
    log, before = metrics.Log(tmp_path / "log.jsonl", 0, 4, 1, "teacher"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*/log.jsonl \(File too large\): make room"):
            log.note(1, text="long" * 2**20)
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_peaks_are_those_of_the_longest_name():
    assert metrics.peak_flops("TPU v5 lite") == 197e12 and metrics.peak_flops("TPU v5p") == 459e12
    assert metrics.peak_flops("cpu") is None and metrics.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert jax.devices()[0].device_kind == "cpu" or metrics.peak_flops(jax.devices()[0].device_kind)
