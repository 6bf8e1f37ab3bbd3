"""The log of a run: one JSON object a line, and a progress bar with the time left."""

import json
import math
import pathlib
import sys
import time

import jax
from tqdm import tqdm

from sf_jax.files import replacing


class Log:
    """Writes `log.jsonl` and a progress bar.

    Metrics stay on the device until a line is due, so logging never makes a step wait.
    """

    def __init__(self, path: pathlib.Path, start: int, steps: int, every: int, title: str):
        """Opens the log; lines after step `start` (of a run that was killed) are dropped."""
        lines = [line for line in path.read_text().splitlines() if _step(line) <= start] if path.exists() else []
        with replacing(path) as unfinished:
            unfinished.write_text("".join(line + "\n" for line in lines))
        self._file = path.open("a")
        self._every, self._steps = every, steps
        self._pending: dict[str, jax.Array] = {}
        self._since, self._counted = time.perf_counter(), 0
        terminal = sys.stdout.isatty()
        self._bar = tqdm(
            total=steps,
            initial=start,
            desc=title,
            unit="step",
            file=sys.stdout,
            dynamic_ncols=terminal,
            mininterval=1.0 if terminal else 15.0,
        )

    def step(self, step: int, metrics: dict[str, jax.Array], due: bool = False) -> None:
        """Takes the metrics of iteration `step` (counted from 1); `due` writes a line now, whatever `every` says.

        Raises:
          FloatingPointError: if a metric that is due is not finite.
        """
        self._pending |= metrics
        self._counted += 1
        self._bar.update(1)
        if step % self._every and step != self._steps and not due:
            return
        values = {name: value.item() for name, value in jax.device_get(self._pending).items() if value.ndim == 0}
        seconds = (time.perf_counter() - self._since) / self._counted
        self._file.write(json.dumps({"step": step, **values, "seconds_per_step": round(seconds, 4)}) + "\n")
        self._file.flush()
        self._bar.set_postfix(
            {k: f"{v:.4g}" for k, v in values.items() if "loss" in k} | {"ms": f"{1000 * seconds:.0f}"}
        )
        self._pending, self._since, self._counted = {}, time.perf_counter(), 0
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(f"step {step}: {', '.join(bad)} is not finite")

    def close(self) -> None:
        """Ends the bar and the file."""
        self._bar.close()
        self._file.close()


def _step(line: str) -> float:
    """The step of a log line; a line cut short by a kill counts as never written."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf
