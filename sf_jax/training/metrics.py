"""The log of a run: one JSON object a line, and a progress bar with the time left."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence

import jax
from tqdm import tqdm

from sf_jax.files import replacing
from sf_jax.training.health import LINES, warnings


class Log:
    """Writes `log.jsonl` and a progress bar.

    Metrics stay on the device until a line is due, so logging never makes a step wait. Numbers that are not finite end
    the run (or, with `skip`, are counted as skipped updates), and figures that run away are warned of.
    """

    def __init__(
        self,
        path: pathlib.Path,
        start: int,
        steps: int,
        every: int,
        title: str,
        skip: bool = False,
        names: Mapping[str, Sequence[str]] | None = None,
    ):
        """Opens the log; lines after step `start` (of a run that was killed) are dropped.

        Args:
          path: the file.
          start: iterations done before.
          steps: iterations in all.
          every: iterations between lines.
          title: of the progress bar.
          skip: whether updates that are not finite (which the update programs leave out) are counted, not an error.
          names: prefix of an update's metrics -> names of the entries of its metric `nonfinite`.
        """
        lines = [line for line in path.read_text().splitlines() if _step(line) <= start] if path.exists() else []
        with replacing(path) as unfinished:
            unfinished.write_text("".join(line + "\n" for line in lines))
        self._file = path.open("a")
        self._every, self._steps, self._skip, self._names = every, steps, skip, names or {}
        self._history = [json.loads(line) for line in lines]
        self._checks: list[tuple[int, str, jax.Array, jax.Array]] = []
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
          FloatingPointError: if an update or a metric since the last line is not finite; the first one is named.
        """
        for name in [name for name in metrics if name.endswith("nonfinite")]:
            prefix = name.removesuffix("nonfinite")
            self._checks.append((step, prefix, metrics[f"{prefix}finite"], metrics[name]))
        self._pending |= {name: value for name, value in metrics.items() if not name.endswith("finite")}
        self._counted += 1
        self._bar.update(1)
        if step % self._every and step != self._steps and not due:
            return
        values = {name: value.item() for name, value in jax.device_get(self._pending).items()}
        seconds = (time.perf_counter() - self._since) / self._counted
        wrong = self._not_finite()
        line = {"step": step, **values, "seconds_per_step": round(seconds, 4)}
        line |= {"skipped": len(wrong)} if wrong and self._skip else {}
        for text in warnings(self._history, values):
            line["warnings"] = [*line.get("warnings", ()), text]
            tqdm.write(f"warning, step {step}: {text}")
        self._history = [*self._history[1 - LINES :], line]
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._bar.set_postfix(
            {k: f"{v:.4g}" for k, v in values.items() if "loss" in k} | {"ms": f"{1000 * seconds:.0f}"}
        )
        self._pending, self._since, self._counted = {}, time.perf_counter(), 0
        if wrong and not self._skip:
            raise FloatingPointError(wrong[0])
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad and not self._skip:
            raise FloatingPointError(f"step {step}: {', '.join(bad)} is not finite")

    def _not_finite(self) -> list[str]:
        """What was not finite in the updates since the last line, an entry for each."""
        checks, self._checks = jax.device_get(self._checks), []
        found = []
        for step, prefix, finite, counts in checks:
            if finite:
                continue
            names = self._names.get(prefix, [f"parameter {i}" for i in range(len(counts))])
            tensors = [f"{name} ({count} values)" for name, count in zip(names, counts, strict=True) if count]
            what = f"the gradient of {', '.join(tensors[:3])}" if tensors else "the loss alone"
            found.append(f"step {step}: {prefix}loss or its gradient is not finite: {what}")
        return found

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
