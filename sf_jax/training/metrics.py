"""The log of a run: JSON lines, a progress bar with the remaining time, and the detection of NaN and Inf."""

import contextlib
import json
import math
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sf_jax import strict_json
from sf_jax.files import replacing
from sf_jax.training.health import SIGNS, warnings
from sf_jax.training.sinks import Sink

# Fields of a line that depend on the machine; all others are the same however often a run is interrupted.
TIMING = ("seconds_per_step", "frames_per_second", "model_flop_utilization")
# Dense bfloat16 peak of a device in FLOP/s, by a prefix of its kind; the longest match counts.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
}


def peak_flops(kind: str) -> float | None:
    """Peak of a device kind (`jax.Device.device_kind`), or None if unknown, as for CPUs."""
    found = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(found, key=len)] if found else None


def measured_flops(devices: Sequence[jax.Device], dtype: str) -> float:
    """FLOP/s that devices of this process reach together in square matmuls, doubling the size until they take 20 ms.

    Args:
      devices: the devices, used at the same time; those of one CPU share its cores.
      dtype: type of the matrices.
    """
    product, size, seconds = jax.jit(jnp.matmul), 512, 0.0
    while seconds < 0.02 and size < 8192:
        size *= 2
        matrices = [jax.device_put(jnp.ones((size, size), dtype), device) for device in devices]
        jax.block_until_ready([product(x, x) for x in matrices])
        times = []
        for _ in range(4):
            began = time.perf_counter()
            jax.block_until_ready([product(x, x) for x in matrices])
            times.append(time.perf_counter() - began)
        seconds = min(times)
    return 2.0 * size**3 * len(devices) / seconds


class Log:
    """Writes `log.jsonl`, a progress bar and other logs.

    Metrics stay on the device until a line is due, so logging never blocks a step. All metrics of every step are kept
    until then, so that the first step that was not finite can be named. Metrics that jump or drift cause warnings.
    """

    def __init__(
        self,
        path: pathlib.Path,
        start: int,
        steps: int,
        every: int,
        title: str,
        *,
        sinks: Sequence[Sink] = (),
        leaf_names: Mapping[str, Sequence[str]] | None = None,
        skip: bool = False,
        carried: Mapping | None = None,
        frames: float = 0,
    ):
        """Opens the log and drops lines after step `start` (of a run that was killed).

        A file with invalid lines is kept under another name, and the valid lines continue here.

        Args:
          path: path of `log.jsonl`.
          start: number of finished iterations.
          steps: iterations of the whole run.
          every: iterations between lines.
          title: title of the progress bar.
          sinks: other logs.
          leaf_names: prefix of an update's metrics -> names of the entries of its metric `nonfinite`.
          skip: whether updates skip themselves if they are not finite, and are only counted here.
          carried: the result of `settle` at step `start`.
          frames: mean number of latent frames in an iteration's batch, for the rate.
        """
        lines = [(text, line) for text, line in _read_lines(path) if line["step"] <= start]
        with replacing(path) as unfinished:
            unfinished.write_text("".join(text + "\n" for text, _ in lines), encoding="utf-8")
        self._path, self._file = path, path.open("a", encoding="utf-8")
        self._every, self._steps, self._frames, self._skip = every, steps, frames, skip
        self._sinks, self._leaf_names = tuple(sinks), leaf_names or {}
        self._history = [
            {name: line[name] for name in SIGNS if _is_number(line.get(name))}
            for _, line in lines
            if "seconds_per_step" in line
        ]
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        carried = carried or {}
        self._values: dict[str, float] = dict(carried.get("values", {}))
        self._skipped = carried.get("skipped", 0)
        self._since, self._counted, self._left_out = time.perf_counter(), 0, 0.0
        self.flops_per_second_peak: float | None = None
        self.flops_per_step: float | None = None
        terminal = sys.stdout.isatty()
        self._bar = tqdm(
            total=steps,
            initial=start,
            desc=title,
            unit="step",
            file=sys.stdout,
            dynamic_ncols=terminal,
            mininterval=1.0 if terminal else 15.0,
            disable=jax.process_index() != 0,
        )

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Excludes the time of the block from the time per step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._left_out += time.perf_counter() - began

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of iteration `step` (counted from 1), and writes a line if one is due.

        Raises:
          FloatingPointError: if a metric of this step, or of an earlier one since the last line, is not finite.
        """
        self._pending.append((step, metrics))
        self._counted += 1
        self._bar.update(1)
        if step % self._every == 0 or step == self._steps:
            self.settle()
            self._write(step)

    def settle(self) -> dict:
        """Fetches the metrics from the devices; returns the value of `carried` for a run that resumes here.

        Raises:
          FloatingPointError: if a metric is not finite; names the first step and its nonfinite metrics.
        """
        pending, self._pending = jax.device_get(self._pending), []
        for step, metrics in pending:
            skipped = [name for name, value in metrics.items() if _is_verdict(name) and not value]
            faults = _faults(metrics, self._leaf_names)
            self._skipped += len(skipped)
            if faults and not (self._skip and skipped):
                self._line({"step": step, "nonfinite": faults})
                more = f" (and {len(faults) - 6} more)" if len(faults) > 6 else ""
                raise FloatingPointError(f"step {step}: {', '.join(faults[:6])} is not finite{more}")
            for name, value in metrics.items():
                if np.ndim(value) == 0 and not _is_verdict(name) and math.isfinite(value):
                    self._values[name] = value.item()
        return {"values": dict(self._values), "skipped": self._skipped}

    def note(self, step: int, **values) -> None:
        """Writes an extra line about `step`."""
        self._line({"step": step, **values})

    def close(self) -> None:
        """Closes the bar and the files."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._bar.close)
            for sink in self._sinks:
                stack.callback(sink.close)
            with contextlib.suppress(OSError):  # a failed write has already been reported
                self._file.close()

    def _write(self, step: int) -> None:
        values = self._values | ({"skipped": self._skipped} if self._skip else {})
        timing = self._timing()
        line = {"step": step, **values, **timing}
        told = warnings(self._history, values)
        if self._skip and self._skipped:
            told.append(f"{self._skipped} updates since the last line were not finite and were skipped")
        if told:
            line["warnings"] = told
            if jax.process_index() == 0:
                tqdm.write("\n".join(f"warning, step {step}: {text}" for text in told))
        self._history.append({name: line[name] for name in SIGNS if name in line})
        self._line(line)
        for sink in self._sinks:
            sink.write(step, values | timing)
        shown = {k: f"{v:.4g}" for k, v in values.items() if "loss" in k}
        shown |= {"skipped": self._skipped} if self._skipped else {}
        shown |= {"ms": f"{1000 * timing['seconds_per_step']:.0f}"}
        if "frames_per_second" in timing:
            shown["frames/s"] = f"{timing['frames_per_second']:.4g}"
        if "model_flop_utilization" in timing:
            shown["MFU"] = f"{timing['model_flop_utilization']:.1%}"
        self._bar.set_postfix(shown)
        self._values, self._skipped = {}, 0

    def _timing(self) -> dict[str, float]:
        """Times since the last line."""
        now = time.perf_counter()
        seconds = max(now - self._since - self._left_out, 1e-9) / max(self._counted, 1)
        self._since, self._counted, self._left_out = now, 0, 0.0
        found = {"seconds_per_step": round(seconds, 4)}
        if self._frames:
            found["frames_per_second"] = round(self._frames / seconds, 2)
        if self.flops_per_step and self.flops_per_second_peak:
            found["model_flop_utilization"] = round(self.flops_per_step / seconds / self.flops_per_second_peak, 4)
        return found

    def _line(self, values: dict) -> None:
        if jax.process_index():
            return
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"cannot write {self._path} ({error.strerror}): make room, then run the same command"
            ) from error


def _is_verdict(name: str) -> bool:
    """Whether a metric says that all numbers of an update were finite."""
    return name.endswith("finite") and not name.endswith("nonfinite")


def _faults(metrics: Mapping[str, np.ndarray], leaf_names: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of what is not finite in the metrics of a step: gradient tensors first, then scalars."""
    found, scalars = [], []
    for name, value in metrics.items():
        prefix = name.removesuffix("nonfinite")
        if name.endswith("nonfinite"):
            names = leaf_names.get(prefix) or [f"tensor {i}" for i in range(np.size(value))]
            bad = [f"{leaf} ({count} values)" for leaf, count in zip(names, np.ravel(value), strict=True) if count]
            found += [f"the {prefix.replace('_', ' ')}gradient of {leaf}" for leaf in bad]
        elif not _is_verdict(name) and not np.all(np.isfinite(value)):
            scalars.append(name)
    return found + scalars


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _read_lines(path: pathlib.Path) -> list[tuple[str, dict]]:
    """The valid lines of a log, as text and parsed; a file with invalid lines is copied aside and reported."""
    if not path.exists():
        return []
    if not path.is_file():
        raise ValueError(f"{path} is no file: the log is written there, move it or use another workdir")
    texts = path.read_bytes().split(b"\n")
    lines, damaged = [], 0
    for number, text in enumerate(texts, 1):
        try:
            line = strict_json.parse(text, finite=False)
            if not _is_number(line.get("step")):
                raise ValueError("it has no step")
        except ValueError:
            # A last line without a newline was cut off by a kill and counts as never written.
            damaged += bool(text.strip()) and number < len(texts)
            continue
        lines.append((text.decode("utf-8-sig"), line))
    if damaged:
        aside = next(
            name
            for i in range(10_000)
            if not (name := path.with_name(f"{path.name}.damaged{f'.{i}' * (i > 0)}")).exists()
        )
        shutil.copyfile(path, aside)  # the valid lines replace the log when they are written
        print(
            f"{path} is damaged, {damaged} of its lines are none of a log: kept as {aside}, {len(lines)} go on",
            flush=True,
        )
    return lines
