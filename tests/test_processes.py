"""Several processes train like one: same losses, same checkpoints, one log.

The networks have one layer, so that XLA unrolls the loops over layers. Its CPU backend may start a collective while an
earlier, independent loop with collectives still runs, and the transport between processes cannot tell them apart.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from safetensors.numpy import load_file

from sf_jax.data import shards
from sf_jax.training import sharding
from sf_jax.weights.package import load_package
from tests.helpers import tree_relative
from tests.test_resume import cut_files
from tests.test_training import SMALL, losses, save_teacher, small_config

MODEL = SMALL | {"freq_dim": 16, "num_layers": 1}
WORKER = """
import json, sys, jax
from sf_jax import distributed
workdir, teacher, data, objective, steps, *more = sys.argv[1:]
distributed.initialize()
if jax.process_count() > 1:  # texts of any length, from any process
    assert distributed.first_told(None) is None
    assert distributed.first_told("x" * 2000 if jax.process_index() else None) == "x" * 2000
from sf_jax.io.video import write_samples
from sf_jax.training import loop
from tests.test_processes import MODEL
from tests.test_training import small_config

mesh = {"data": 1, "fsdp": -1}
changes = {"steps": int(steps), "mesh": mesh, "data_dir": data, "generator_every": 2, "checkpoint_every": 3}
changes |= {"model": MODEL, "teacher_weights": teacher} | (json.loads(more[0]) if more else {})
config = small_config(objective, **changes)
loop.train(config, workdir, write_samples)
print("done", jax.process_index(), jax.device_count())
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A small teacher's weights."""
    return save_teacher(tmp_path_factory.mktemp("weights"), small_config("teacher", model=MODEL))


def start(index, count, devices, port, *arguments):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    if count > 1:
        names = ("SF_JAX_COORDINATOR", "SF_JAX_NUM_PROCESSES", "SF_JAX_PROCESS_ID")
        env |= dict(zip(names, (f"localhost:{port}", str(count), str(index)), strict=True))
    code = [sys.executable, "-c", WORKER, *map(str, arguments)]
    return subprocess.Popen(code, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_all(count, devices, *arguments):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [start(i, count, devices, port, *arguments) for i in range(count)]


def ended(running):
    """Waits for processes; returns their outputs."""
    outputs = [process.communicate(timeout=500)[0] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(output[-3000:] for output in outputs)
    return outputs


def run(count, devices, *arguments):
    """Runs `count` processes to the end; returns their outputs."""
    return ended(start_all(count, devices, *arguments))


@pytest.mark.parametrize("processes, platform, expected", [(2, "cpu", True), (2, "tpu", False), (1, "cpu", False)])
def test_only_several_processes_on_cpus_may_hang(processes, platform, expected):
    devices = [types.SimpleNamespace(process_index=index, platform=platform) for index in range(processes)]
    assert sharding.may_hang(types.SimpleNamespace(devices=np.array(devices))) == expected


@pytest.mark.slow
def test_two_processes_train_as_one(teacher, tmp_path):
    data, objective = tmp_path / "data", "distill"
    runs = {"two": (2, 4), "one": (1, 1)}
    for name, (count, devices) in runs.items():
        outputs = run(count, devices, tmp_path / name, teacher, data, objective, 5)
        assert all(f"done {i} {count * devices}" in output for i, output in enumerate(outputs))
        assert all(("several processes on CPUs may hang" in output) == (count > 1) for output in outputs)
    found = {name: losses(tmp_path / name) for name in runs}
    assert [line["step"] for line in found["two"]] == [1, 2, 3, 4, 5]
    for ours, theirs in zip(found["two"], found["one"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("critic_loss", "generator_loss"):
            if name in ours:
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5)
    weights = [load_file(tmp_path / name / "student.safetensors") for name in runs]
    assert tree_relative(*weights) < 1e-5
    # Files that only the second process reads.
    cut_files(tmp_path / "two" / "checkpoints" / "5" / "state" / "ocdbt.process_1" / "d")
    outputs = run(2, 4, tmp_path / "two", teacher, data, objective, 5)
    assert "checkpoint of step 5 is damaged" in outputs[0]
    assert all("resuming from step 3" in output for output in outputs)
    assert losses(tmp_path / "two") == found["two"]
    again = load_file(tmp_path / "two" / "student.safetensors")
    assert all((again[name] == weights[0][name]).all() for name in again)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_signal_to_one_process_stops_all_with_a_checkpoint(teacher, tmp_path):
    # Samples and the export merge adapters that are sharded over processes.
    adapters = {"lora": {"rank": 2}, "critic_lora": {"rank": 2}, "log": {"sample_every": 3}}
    rest = (tmp_path / "run", teacher, tmp_path / "data", "distill", 15, json.dumps(adapters))
    running = start_all(2, 2, *rest)
    until = time.monotonic() + 300
    while not (tmp_path / "run" / "checkpoints" / "3").exists() and time.monotonic() < until:
        time.sleep(0.05)
    running[1].send_signal(signal.SIGINT)  # becomes SIGTERM, which JAX handles
    outputs = ended(running)
    assert not any("done" in output for output in outputs)
    assert (tmp_path / "run" / "samples" / "step_000003.mp4").stat().st_size
    told = [re.search(r"SIGTERM: saved step (\d+) ", output) for output in outputs]
    assert all(told) and len({found[1] for found in told}) == 1, outputs
    step = told[0][1]
    assert (tmp_path / "run" / "checkpoints" / step).exists()
    outputs = run(2, 2, *rest)
    assert all(f"resuming from step {step}" in output and f"done {i} 4" in output for i, output in enumerate(outputs))
    assert [line["step"] for line in losses(tmp_path / "run")] == list(range(1, 16))
    assert load_package(tmp_path / "run" / "student.safetensors").kind == "student"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_make_the_pairs_of_one(teacher, tmp_path):
    ode = json.dumps({"ode": {"pairs": 20, "batch_size": 8, "solver_steps": 4}})
    for name, count in (("two", 2), ("one", 1)):
        run(count, count, tmp_path / name, teacher, tmp_path / "data", "init", 3, ode)
    two, one = (losses(tmp_path / name) for name in ("two", "one"))
    np.testing.assert_allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=1e-5)
    two, one = (shards.open_records(tmp_path / name / "ode_pairs", "ode_pairs") for name in ("two", "one"))
    assert len(two) == len(one) == 20
    for ours, theirs in zip(two, one, strict=True):
        assert ours["caption"] == theirs["caption"]
        np.testing.assert_allclose(ours["trajectory"], theirs["trajectory"], rtol=1e-5, atol=1e-5)
