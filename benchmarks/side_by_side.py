"""Times the two sides of a comparison alternately, in one process."""

import dataclasses
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

PAUSE = 0.1
# A measurement repeats a side's call for about so many seconds, and has the mean, so short calls find a warm cache.
LEAST_SECONDS = 0.2
HEADER = f"{'':58s}{'ours':>20s}{'theirs':>20s}{'ratio':>14s}{'difference':>12s}{'others':>8s}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
      what: the sizes, for the table.
      ours: runs our code once, waits for it and returns the output.
      theirs: the same for their code; both outputs have the same shape.
      same: whether to compare the outputs; not for updates, which draw their own noise.
    """

    what: str
    ours: Callable[[], jax.Array]
    theirs: Callable[[], np.ndarray]
    same: bool = True


def measure(row: Row, repeats: int, clock: Callable[[], float]) -> dict:
    """Times both sides alternately; also the difference of their outputs and the load of other processes."""
    outputs = [np.asarray(side(), np.float64) for side in (row.ours, row.theirs)]
    difference = None
    if row.same:
        difference = float(np.linalg.norm(outputs[0] - outputs[1]) / np.linalg.norm(outputs[1]))
    sides = {"ours": row.ours, "theirs": row.theirs}
    calls = {name: calls_needed(side) for name, side in sides.items()}
    seconds, others = {name: [] for name in sides}, []
    for _ in range(repeats):
        for name, side in sides.items():
            time.sleep(PAUSE)
            before, began = machine_time(), clock()
            for _ in range(calls[name]):
                side()
            seconds[name].append((clock() - began) / calls[name])
            others.append([after - start for after, start in zip(machine_time(), before, strict=True)])
    wall, busy, own = np.sum(others, axis=0)
    share = float(max(busy - own, 0) / (wall * os.cpu_count())) if busy else None
    return {"what": row.what, "seconds": seconds, "difference": difference, "others": share}


def calls_needed(side: Callable) -> int:
    """How many calls of a side, which has run before, take `LEAST_SECONDS`."""
    seconds = 0.0
    for _ in range(2):  # the first call finds a cold cache
        began = time.perf_counter()
        side()
        seconds = time.perf_counter() - began
        if seconds >= LEAST_SECONDS:
            break
    return math.ceil(LEAST_SECONDS / seconds)


def machine_time() -> tuple[float, float, float]:
    """Seconds of wall time, of busy time of all cores (0 if unknown), and of this process's CPU time."""
    stat = Path("/proc/stat")
    busy = 0.0
    if stat.is_file():
        user, nice, system, _, _, *interrupts = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
        busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), busy, time.process_time()


def line(row: dict) -> str:
    """A line of the table."""
    sides = [row["seconds"][side] for side in ("ours", "theirs")]
    middle, least = [float(np.median(side)) for side in sides], [min(side) for side in sides]
    cells = [f"{m:.4g} ({s:.4g})" for m, s in zip(middle, least, strict=True)]
    ratio = f"{middle[0] / middle[1]:.2f} ({least[0] / least[1]:.2f})"
    others = "?" if row["others"] is None else f"{row['others']:.0%}"
    difference = "-" if row["difference"] is None else f"{row['difference']:.1e}"
    return f"{row['what']:58s}{cells[0]:>20s}{cells[1]:>20s}{ratio:>14s}{difference:>12s}{others:>8s}"


def device() -> str:
    """The CPU's name from Linux, else from Python."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
