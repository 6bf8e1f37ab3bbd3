"""Multi-process runs: how the processes of a command find each other.

`python -m sf_jax.train` and `python -m sf_jax.prepare` run as a single process unless the environment says otherwise:

    SF_JAX_COORDINATOR=HOST:PORT SF_JAX_NUM_PROCESSES=N SF_JAX_PROCESS_ID=K   any machines; HOST is that of process 0
    SF_JAX_LOCAL_DEVICES=0,1      with these: the local devices that this process uses (default: all)
    SF_JAX_DISTRIBUTED=1          TPU slices and clusters that JAX detects automatically

The tasks of one SLURM step (`srun --ntasks=N`) find each other without any of these. JAX then assigns one device per
task.
"""

import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

_COORDINATOR, _COUNT, _INDEX = "SF_JAX_COORDINATOR", "SF_JAX_NUM_PROCESSES", "SF_JAX_PROCESS_ID"
_DEVICES, _AUTOMATIC = "SF_JAX_LOCAL_DEVICES", "SF_JAX_DISTRIBUTED"
# New files may appear with a delay on other machines of a network file system.
_SECONDS_TO_APPEAR = 30
# Texts exchanged between processes are padded to a multiple of this, so that few array shapes occur.
_TEXT_BYTES = 512


def initialize(environ: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes, if the environment specifies any; must run before JAX looks for devices.

    Raises:
      ValueError: if a variable is missing or invalid, or the other processes cannot be reached.
    """
    given = {name: environ[name] for name in (_COORDINATOR, _COUNT, _INDEX) if environ.get(name)}
    automatic = environ.get(_AUTOMATIC, "")
    if automatic not in ("", "0", "1"):
        raise ValueError(f"{_AUTOMATIC} is {automatic!r}: it must be 0 or 1")
    if given:
        if len(given) < 3:
            missing = ", ".join(name for name in (_COORDINATOR, _COUNT, _INDEX) if name not in given)
            raise ValueError(f"{missing} is not set: {', '.join(given)} is, and the three go together")
        arguments = _explicit(given, environ.get(_DEVICES, ""))
        told = ", ".join(f"{name}={value}" for name, value in given.items())
    elif environ.get(_DEVICES):
        raise ValueError(f"{_DEVICES} is set: it goes with {_COORDINATOR}, which is not")
    elif automatic == "1" or automatic != "0" and _whole(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        arguments = {}
        told = f"{_AUTOMATIC}=1" if automatic == "1" else "a SLURM step of several tasks"
    else:
        return
    try:
        jax.distributed.initialize(**arguments)
    except Exception as error:  # Cluster detection and the network can raise anything.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{told}: the processes did not find each other ({reason})") from error


def _whole(text: str) -> int:
    return int(text) if text.isdigit() else -1


def _explicit(given: Mapping[str, str], devices: str) -> dict:
    """The arguments of `jax.distributed.initialize`."""
    count, index = _whole(given[_COUNT]), _whole(given[_INDEX])
    host, _, port = given[_COORDINATOR].rpartition(":")
    if not host or _whole(port) < 1:
        raise ValueError(f"{_COORDINATOR} is {given[_COORDINATOR]!r}: it must be HOST:PORT, the address of process 0")
    if count < 1:
        raise ValueError(f"{_COUNT} is {given[_COUNT]!r}: it must be a number, 1 or more")
    if not 0 <= index < count:
        raise ValueError(f"{_INDEX} is {given[_INDEX]!r}: it must be a number from 0 to {count - 1}")
    arguments = {"coordinator_address": given[_COORDINATOR], "num_processes": count, "process_id": index}
    if devices:
        numbers = [_whole(number) for number in devices.split(",")]
        if min(numbers) < 0:
            raise ValueError(f"{_DEVICES} is {devices!r}: it must be numbers of devices, such as 0,1")
        arguments["local_device_ids"] = numbers
    return arguments


def check_shared(folder: Path, field: str) -> None:
    """Checks that all processes see the same folder; every process must call this.

    Raises:
      ValueError: if a process does not see what process 0 writes there.
    """
    if jax.process_count() == 1:
        return
    token = multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))
    mark = folder / f".shared.{int(token):08x}"
    try:
        if jax.process_index() == 0:
            mark.touch()
        multihost_utils.sync_global_devices("mark of the shared folder")
        seen = appears(mark)
        all_seen = np.ravel(multihost_utils.process_allgather(np.asarray(seen)))
    finally:
        if jax.process_index() == 0:
            mark.unlink(missing_ok=True)
    if not all_seen.all():
        blind = ", ".join(str(index) for index in np.flatnonzero(~all_seen))
        raise ValueError(
            f"{field} is {folder}: process {blind} does not see what process 0 writes there; it must be a folder that "
            "all machines share"
        )


def appears(path: Path) -> bool:
    """Waits for a file written by another process; returns whether it has become visible."""
    until = time.monotonic() + _SECONDS_TO_APPEAR
    while not (seen := path.exists()) and time.monotonic() < until:
        time.sleep(0.5)
    return seen


def first_told(text: str | None) -> str | None:
    """The text of the first process that has one, or None; every process must call this."""
    if jax.process_count() == 1:
        return text
    given = (text or "").encode()
    longest = int(np.max(multihost_utils.process_allgather(np.asarray(len(given)))))
    if longest == 0:
        return None
    own = np.zeros(-(-longest // _TEXT_BYTES) * _TEXT_BYTES, np.uint8)
    own[: len(given)] = np.frombuffer(given, np.uint8)
    told = (bytes(row).rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(own))
    return next((words for words in told if words), None)


def by_first(action: Callable[[], None]) -> None:
    """Runs `action` in process 0 while the others wait; every process must call this.

    Raises:
      OSError: in every process, if it fails (a single process raises the original exception).
    """
    reason = None
    if jax.process_index() == 0:
        try:
            action()
        except Exception as error:  # without this, the other processes would wait forever
            if jax.process_count() == 1:
                raise
            reason = str(error) or type(error).__name__
    if reason := first_told(reason):
        raise OSError(reason)
