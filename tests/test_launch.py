"""How processes find each other, and the launch scripts; small programs on PATH simulate the clusters."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import yaml

from sf_jax import distributed

ROOT = Path(__file__).parents[1]
THREE = {"SF_JAX_COORDINATOR": "host:123", "SF_JAX_NUM_PROCESSES": "2", "SF_JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, None),
        ({"SF_JAX_DISTRIBUTED": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SF_JAX_DISTRIBUTED": "0", "SLURM_STEP_NUM_TASKS": "4"}, None),
        (THREE, {"coordinator_address": "host:123", "num_processes": 2, "process_id": 1}),
        (
            THREE | {"SF_JAX_LOCAL_DEVICES": "2,3"},
            {"coordinator_address": "host:123", "num_processes": 2, "process_id": 1, "local_device_ids": [2, 3]},
        ),
        ({"SF_JAX_DISTRIBUTED": "1"}, {}),
        ({"SLURM_STEP_NUM_TASKS": "4"}, {}),
    ],
)
def test_the_environment_says_who_the_others_are(environ, wanted, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    distributed.initialize(environ)
    assert calls == ([] if wanted is None else [wanted])


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"SF_JAX_COORDINATOR": "host:1"}, "SF_JAX_NUM_PROCESSES, SF_JAX_PROCESS_ID is not set"),
        (THREE | {"SF_JAX_COORDINATOR": "host"}, "SF_JAX_COORDINATOR is 'host': it must be HOST:PORT"),
        (THREE | {"SF_JAX_NUM_PROCESSES": "two"}, "SF_JAX_NUM_PROCESSES is 'two'"),
        (THREE | {"SF_JAX_PROCESS_ID": "2"}, "SF_JAX_PROCESS_ID is '2': it must be a number from 0 to 1"),
        (THREE | {"SF_JAX_LOCAL_DEVICES": "0,x"}, "SF_JAX_LOCAL_DEVICES is '0,x'"),
        ({"SF_JAX_LOCAL_DEVICES": "0"}, "SF_JAX_LOCAL_DEVICES is set: it goes with SF_JAX_COORDINATOR"),
        ({"SF_JAX_DISTRIBUTED": "yes"}, "SF_JAX_DISTRIBUTED is 'yes': it must be 0 or 1"),
    ],
)
def test_wrong_environments_are_refused(environ, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize(environ)


def test_a_cluster_that_is_not_there_is_one_line():
    env = os.environ | {"SF_JAX_DISTRIBUTED": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "sf_jax.train", "--config=configs/digits.py", "--workdir=/nowhere"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: SF_JAX_DISTRIBUTED=1: the processes did not find each other (")


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)


# A fake .venv/bin/python: training only records its arguments; everything else runs for real.
PYTHON = f"""
case "$*" in
  *"-m pip install"*) echo "pip $*" >>"$NOTES/calls"; exit 0 ;;
  *"-m sf_jax."*)
    run="$NOTES/run.${{SF_JAX_PROCESS_ID:-x}}"
    trap 'echo stopped >>"$run"; exit 0' TERM
    # complete as soon as it is there: tests read it at once
    {{ printf 'call'; printf ' [%s]' "${{@:2}}"; printf '\\n'; env | grep SF_JAX_ | sort; }} >"$NOTES/part.$$"
    mv "$NOTES/part.$$" "$run"
    for argument in "$@"; do case "$argument" in --workdir=*) workdir="${{argument#*=}}" ;; esac; done
    if [[ "$FAKE" == unsaved ]]; then exit 143; fi
    if [[ "$FAKE" == "fail 1" && "$SF_JAX_PROCESS_ID" == 1 ]]; then exit 3; fi
    if [[ "$FAKE" == done && "${{SF_JAX_PROCESS_ID:-0}}" == 0 ]]; then
      mkdir -p "$workdir"
      touch "$workdir/student.safetensors"
    fi
    if [[ "$FAKE" == done || "$FAKE" == early ]]; then exit 0; fi
    for ((i = 0; i < 600; i++)); do sleep 0.1; done
    exit 9 ;;
  *) exec "{sys.executable}" "$@" ;;
esac
"""


@pytest.fixture
def place(tmp_path):
    """A repository with a fake environment, and an empty folder for programs."""
    shutil.copytree(ROOT / "launch", tmp_path / "repo" / "launch")
    shutil.copy(ROOT / "setup.py", tmp_path / "repo")
    program(tmp_path / "repo" / ".venv" / "bin" / "python", PYTHON)
    (tmp_path / "repo" / ".venv" / "pyvenv.cfg").touch()
    (tmp_path / "notes").mkdir()
    (tmp_path / "bin").mkdir()
    return tmp_path


def start(place, script, *arguments, **env):
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    names = {"SF_JAX_COORDINATOR", "CUDA_VISIBLE_DEVICES", "PYTHON"}
    kept = {name: value for name, value in os.environ.items() if name not in names}
    env = kept | {"PATH": path, "NOTES": str(place / "notes"), "FAKE": "done"} | env
    return subprocess.Popen(
        ["bash", str(place / "repo" / "launch" / script), *arguments],
        env=env,
        cwd=place / "repo",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    return output


def notes(place, name):
    return (place / "notes" / name).read_text()


def wait_for(*paths):
    until = time.monotonic() + 30
    while not all(path.exists() and path.stat().st_size for path in paths):
        assert time.monotonic() < until, paths
        time.sleep(0.05)


def four_gpus(place):
    program(place / "bin" / "nvidia-smi", "for i in 0 1 2 3; do echo GPU $i; done")


def test_one_process_drives_all_gpus(place):
    four_gpus(place)
    finish(start(place, "multi_gpu.sh", "--config=a b", "--workdir=run"))
    assert notes(place, "run.x") == "call [sf_jax.train] [--config=a b] [--workdir=run]\n"
    assert "cuda" in notes(place, "calls")


def test_processes_share_the_gpus(place):
    four_gpus(place)
    finish(start(place, "multi_gpu.sh", "--processes=2", "--config=c", "--workdir=run"))
    for k, devices in enumerate(("0,1", "2,3")):
        found = notes(place, f"run.{k}")
        assert "[sf_jax.train] [--config=c] [--workdir=run]" in found and f"SF_JAX_LOCAL_DEVICES={devices}\n" in found
        assert f"SF_JAX_PROCESS_ID={k}\n" in found and "SF_JAX_NUM_PROCESSES=2\n" in found
    assert notes(place, "run.0").split("SF_JAX_COORDINATOR=")[1].split()[0] in notes(place, "run.1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_process(place, number):
    four_gpus(place)
    process = start(place, "multi_gpu.sh", "--processes=4", "--workdir=run", FAKE="wait")
    files = [place / "notes" / f"run.{k}" for k in range(4)]
    wait_for(*files)
    time.sleep(0.3)
    process.send_signal(number)
    assert "passed on" in finish(process)
    assert all(path.read_text().endswith("stopped\n") for path in files)


def test_a_process_that_fails_ends_the_others(place):
    four_gpus(place)
    output = finish(start(place, "multi_gpu.sh", "--processes=2", "--workdir=run", FAKE="fail 1"), 3)
    assert "exit code 3" in output and "process_*.log" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes=3", "--workdir=run"], "--processes=3: it must divide the 4 GPUs"),
        (["--processes=two", "--workdir=run"], "--processes=two: it must be a number"),
        (["--processes=2", "--config=c"], "needs --workdir=FOLDER"),
    ],
)
def test_shares_that_cannot_be_are_refused(place, arguments, message):
    four_gpus(place)
    assert message in finish(start(place, "multi_gpu.sh", *arguments), 1)


# SLURM, not srun, signals the tasks; a failing task ends the others.
SRUN = """
echo "srun $*" >>"$NOTES/calls"
while [[ "$1" == --* ]]; do shift; done
running=()
for k in 0 1; do SLURM_PROCID=$k "$@" & running+=("$!"); done
echo "${running[@]}" >"$NOTES/tasks"
for k in 0 1; do wait -n || { rc=$?; kill -KILL "${running[@]}" 2>/dev/null; exit $rc; }; done
"""


def slurm(place, *more, **env):
    four_gpus(place)
    program(place / "bin" / "srun", SRUN)
    program(
        place / "bin" / "scontrol", 'echo "scontrol $*" >>"$NOTES/calls"; [[ "$1" != show ]] || printf "n7\\nn8\\n"'
    )
    env = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[7-8]"} | env
    env |= {"SLURM_SUBMIT_DIR": str(place / "repo")}
    return start(place, "slurm.sbatch", "--config=c", f"--workdir={place}/run", *more, **env)


def test_a_slurm_job_runs_one_process_a_node(place):
    assert "done: " in finish(slurm(place, SLURM_CPUS_PER_TASK="32"))
    assert "--cpus-per-task=32" in notes(place, "calls")
    for k in range(2):
        found = notes(place, f"run.{k}")
        assert f"[--config=c] [--workdir={place}/run] [--config.grace_seconds=280]" in found
        assert "SF_JAX_COORDINATOR=n7:21234\n" in found
        assert "SF_JAX_NUM_PROCESSES=2\n" in found and "SF_JAX_LOCAL_DEVICES=0,1,2,3\n" in found
    assert "requeue" not in notes(place, "calls") and "--kill-on-bad-exit=1" in notes(place, "calls")


def test_a_slurm_jobs_own_grace_counts(place):
    finish(slurm(place, "--config.grace_seconds=9"))
    assert f"[--workdir={place}/run] [--config.grace_seconds=9]\n" in notes(place, "run.0")


@pytest.mark.parametrize("fake", ["early", "unsaved"])
def test_a_slurm_job_that_ran_out_of_time_is_queued_again(place, fake):
    finish(slurm(place, FAKE=fake))
    assert "scontrol requeue 41234" in notes(place, "calls")


def test_a_slurm_job_that_fails_is_not(place):
    assert "exit code 3" in finish(slurm(place, FAKE="fail 1"), 1)
    assert "requeue" not in notes(place, "calls")


def test_a_cancelled_slurm_job_is_not_queued_again(place):
    process = slurm(place, FAKE="wait")
    wait_for(place / "notes" / "run.0", place / "notes" / "run.1")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)  # scancel: to the batch script and to the tasks
    for task in notes(place, "tasks").split():
        os.kill(int(task), signal.SIGTERM)
    assert "cancelled" in finish(process)
    assert "requeue" not in notes(place, "calls")


GCLOUD = """
printf 'gcloud' >>"$NOTES/calls"; printf ' [%s]' "$@" >>"$NOTES/calls"; printf '\\n' >>"$NOTES/calls"
for argument in "$@"; do
  case "$argument" in --command=*) cd "$NOTES/worker" && bash -c "${argument#*=}"; exit ;; esac
done
"""
SLICE = {"TPU_NAME": "sf", "ZONE": "z1", "ACCELERATOR_TYPE": "v5p-128"}


@pytest.fixture
def pod(place):
    """A slice with one worker, whose home is notes/worker."""
    program(place / "bin" / "gcloud", GCLOUD)
    program(place / "notes" / "worker" / "sf_jax" / ".venv" / "bin" / "python", PYTHON)
    return place


def test_a_slice_is_made_and_given_back(pod):
    finish(start(pod, "tpu_pod.sh", "create", **SLICE, SPOT="1", PROJECT="p"))
    finish(start(pod, "tpu_pod.sh", "delete", **SLICE))
    made, deleted = notes(pod, "calls").splitlines()
    assert made == (
        "gcloud [compute] [tpus] [tpu-vm] [create] [sf] [--zone=z1] [--project=p] [--accelerator-type=v5p-128] "
        "[--version=v2-alpha-tpuv5] [--spot]"
    )
    assert deleted == "gcloud [compute] [tpus] [tpu-vm] [delete] [sf] [--zone=z1]"


def test_a_run_on_a_slice_outlives_its_connection_and_is_stopped(pod):
    run = pod / "notes" / "run.x"
    finish(start(pod, "tpu_pod.sh", "train", "--config=c", "--workdir=/mnt/share/a b", **SLICE, FAKE="wait"))
    wait_for(run)
    assert "call [sf_jax.train] [--config=c] [--workdir=/mnt/share/a b]" in run.read_text().replace("[-m] ", "")
    assert "SF_JAX_DISTRIBUTED=1" in run.read_text() and "[--worker=all]" in notes(pod, "calls")
    assert "stop it first" in finish(start(pod, "tpu_pod.sh", "train", "--config=c", **SLICE), 1)
    finish(start(pod, "tpu_pod.sh", "stop", **SLICE))
    assert run.read_text().endswith("stopped\n")


@pytest.mark.parametrize(
    ("arguments", "env", "message", "code"),
    [
        (["create"], {"ZONE": "z"}, "TPU_NAME", 1),
        (["create"], SLICE | {"ACCELERATOR_TYPE": "v9-8"}, "ACCELERATOR_TYPE is v9-8", 1),
        (["mount", "somewhere"], SLICE, "give HOST:/SHARE", 1),
        (["train"], SLICE, "give the flags of python -m sf_jax.train", 1),
        (["other"], SLICE, "bash launch/tpu_pod.sh create", 2),
    ],
)
def test_wrong_words_for_a_slice_are_refused(pod, arguments, env, message, code):
    assert message in finish(start(pod, "tpu_pod.sh", *arguments, **env), code)


def jobset():
    return yaml.safe_load((ROOT / "launch" / "gke_jobset.yaml").read_text())


def test_the_jobset_has_what_a_slice_needs():
    job = jobset()
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert "alpha.jobset.sigs.k8s.io/exclusive-topology" in job["metadata"]["annotations"]
    (rule,) = job["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (slices,) = job["spec"]["replicatedJobs"]
    template = slices["template"]["spec"]
    assert template["parallelism"] == template["completions"] and template["backoffLimit"] == 0
    pod = template["template"]["spec"]
    (container,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    assert chips == template["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    # podFailurePolicy requires pods that are not restarted in place.
    assert pod["restartPolicy"] == "Never"
    conditions, codes = template["podFailurePolicy"]["rules"]
    assert conditions["onPodConditions"] == [{"type": "DisruptionTarget"}] and codes["onExitCodes"]["values"] == [
        75,
        143,
    ]
    grace = next(flag for flag in container["args"] if "grace_seconds" in flag)
    assert float(grace.partition("=")[2]) < pod["terminationGracePeriodSeconds"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert {"name": "SF_JAX_DISTRIBUTED", "value": "1"} in container["env"]


@pytest.mark.parametrize(("fake", "code"), [("done", 0), ("early", 75), ("fail 1", 3), ("term", 75), ("unsaved", 143)])
def test_a_pod_ends_with_zero_only_when_the_weights_are_there(fake, code, place):
    (container,) = jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    # A fake python that does what FAKE says.
    program(
        place / "bin" / "python",
        """echo "$*" >"$NOTES/run"
for argument in "$@"; do case "$argument" in --workdir=*) workdir="${argument#*=}" ;; esac; done
case "$FAKE" in
  done) mkdir -p "$workdir"; touch "$workdir/student.safetensors" ;;
  "fail 1") exit 3 ;;
  term) trap 'exit 0' TERM; for ((i = 0; i < 300; i++)); do sleep 0.1; done ;;
  unsaved) trap 'exit 143' TERM; for ((i = 0; i < 300; i++)); do sleep 0.1; done ;;
esac""",
    )
    env = os.environ | {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "NOTES": str(place / "notes"), "FAKE": fake}
    arguments = [*container["command"], f"--workdir={place}/run", "--config=c"]
    process = subprocess.Popen(arguments, env=env)
    if fake in ("term", "unsaved"):
        wait_for(place / "notes" / "run")
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == code
    assert notes(place, "run") == f"-m sf_jax.train --workdir={place}/run --config=c\n"


def vbench(place, *arguments, **env):
    return start(place, "vbench.sh", *arguments, **{"VBENCH": "no-such-program"} | env)


@pytest.fixture
def lists(place):
    """Prompts and their names, and a fake vbench program."""
    (place / "long.txt").write_text("a 7 moving left, fast\na 2 moving up\na 3 moving down\n")
    (place / "short.txt").write_text("seven\ntwo\nthree\n")
    program(
        place / "bin" / "vbench",
        """echo "vbench $*" >>"$NOTES/calls"
while (($#)); do case "$1" in --output_path) mkdir -p "$2"; echo '{}' >"$2/x_eval_results.json" ;; esac; shift; done""",
    )
    return [f"--prompts={place}/long.txt", f"--names={place}/short.txt", f"--folder={place}/vbench"]


def test_vbench_generates_five_videos_of_each_prompt_and_scores_them(place, lists):
    finish(vbench(place, "generate", *lists, "--limit=2", "--model=m", "--seed=3"))
    (call,) = [line for line in notes(place, "run.x").splitlines() if line.startswith("call")]
    folder = place / "vbench"
    assert call == (
        f"call [sf_jax.generate] [--prompts={folder}/first_prompts.txt] [--names={folder}/first_names.txt] "
        f"[--vbench_names] [--num_samples=5] [--if_exists=skip] [--out={folder}/videos] [--model=m] [--seed=3]"
    )
    assert (folder / "first_names.txt").read_text() == "seven\ntwo\n"
    (folder / "videos").mkdir()
    assert "VBench is not installed: in an environment of its own, pip install" in finish(
        vbench(place, "score", *lists), 1
    )
    done = finish(vbench(place, "score", *lists, VBENCH="vbench"))
    assert done.count("VBench: ") == 16 and f"scores are in {folder}/scores" in done
    calls = [line for line in notes(place, "calls").splitlines() if line.startswith("vbench")]
    assert len(calls) == 16 and f"--videos_path {folder}/videos --dimension subject_consistency" in calls[0]
    assert "VBench: " not in finish(vbench(place, "score", *lists, VBENCH="vbench"))


def test_vbench_refuses_a_folder_of_other_videos(place, lists):
    videos = place / "vbench" / "videos"
    videos.mkdir(parents=True)
    finish(vbench(place, "generate", *lists, "--limit=1", "--checkpoint=setup.py", "--seed=3"))
    (videos / "seven-0.mp4").touch()
    finish(vbench(place, "generate", *lists, "--seed=3", "--checkpoint=setup.py"))
    assert f"in {place}/repo\n" in (place / "vbench" / "generated_by.txt").read_text()
    for other in (["--checkpoint=b"], ["--checkpoint=setup.py", "--seed=3", "--samples=2"]):
        done = finish(vbench(place, "generate", *lists, *other), 1)
        assert f"the videos in {videos} are not of these flags" in done
    finish(vbench(place, "score", *lists, VBENCH="../bin/vbench"))
    (videos / "two-0.mp4").touch()
    assert "are of other videos than there are now" in finish(vbench(place, "score", *lists, VBENCH="vbench"), 1)


def test_vbench_reads_paths_where_the_user_is(place, lists):
    program(place / "repo" / ".venv" / "bin" / "python", 'echo "$PWD $*" >>"$NOTES/calls"')
    done = subprocess.run(
        ["bash", str(place / "repo" / "launch" / "vbench.sh"), "generate", *lists, "--model", "models/wan"],
        env={name: value for name, value in os.environ.items() if name != "PYTHON"} | {"NOTES": str(place / "notes")},
        cwd=place / "bin",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    call = notes(place, "calls").splitlines()[-1]
    assert call.startswith(f"{place}/bin -m sf_jax.generate") and call.endswith(" --model models/wan")


def test_vbench_says_what_it_would_do(place):
    done = finish(vbench(place, "all", "--dry-run", "--limit=4", "--model=m"))
    assert "first_prompts.txt --names=" in done and f"\nhead -n 4 -- {place}/repo/runs/vbench/all_dimension.txt" in done
    assert "all_dimension_extended.txt" in done and "--num_samples=5" in done and done.count("evaluate") == 16
    assert not (place / "repo" / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["generate", "--limit=x"], "--limit=x: it must be a number", 1),
        (["generate", "--prompts=a"], "--prompts and --names: give both or none", 1),
        (["generate", "--prompts=a", "--names=b"], "one of them does not exist", 1),
        (["generate", "--out=x"], "--out=x: the protocol sets it", 1),
        (["generate", "--out", "x"], "--out: the protocol sets it", 1),
        (["generate", "-novbench_names"], "-novbench_names: the protocol sets it", 1),
        (["generate", "--folder", "x"], "--folder: write --folder=", 1),
        (["generate", "-prompts=x"], "-prompts=x: write --folder=", 1),
        (["score"], "there are no videos in", 1),
        (["other"], "bash launch/vbench.sh lists", 2),
    ],
)
def test_wrong_words_for_vbench_are_refused(place, arguments, message, code):
    assert message in finish(vbench(place, *arguments), code)


def test_the_protocol_has_the_hashes_of_the_script():
    script = (ROOT / "launch" / "vbench.sh").read_text()
    protocol = (ROOT / "docs" / "results" / "protocol.md").read_text()
    hashes = re.findall(r"\b[0-9a-f]{64}\b", script)
    assert len(hashes) == 3 and all(value in protocol for value in hashes)
    assert all(value in protocol for value in re.findall(r"\b[0-9a-f]{40}\b", script))
