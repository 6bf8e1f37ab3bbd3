"""Writes the results for people (a table, a plot, contact sheets) and for programs (results.json)."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sf_jax import files
from sf_jax.evaluation.judge import WINDOW
from sf_jax.evaluation.metrics import QUARTERS, Figures
from sf_jax.io import video as video_io

RESULTS, TABLE, PLOT = "results.json", "table.md", "plot.png"
_SHEET_ROWS, _SHEET_FRAMES = 12, 16


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of an evaluation.

    Attributes:
      settings: Settings of the evaluation, JSON-serializable.
      figures: Metrics by model name; real clips come last.
      train_frames: Length the models were trained on, in frames; None if unknown.
      borders: Frames at which a new chunk begins, for marks in the plot.
    """

    settings: Mapping[str, Any]
    figures: Mapping[str, Figures]
    train_frames: int | None = None
    borders: Sequence[int] = ()


def rows(figures: Figures) -> dict[str, str]:
    """Returns one column of the table: names of the metrics, and their values as text."""
    quarters = range(QUARTERS)
    return {
        "frames": str(figures.frames),
        "videos": str(figures.samples),
        "digit right": f"{figures.digit:.3f}",
        "direction right": f"{figures.direction:.3f}",
        "both right (joint)": f"{figures.joint:.3f}",
        "joint, inside chunks": _number(figures.joint_inside, 3),
        "joint, across borders": _number(figures.joint_across, 3),
        "jump at borders, pixels": _number(figures.border_jump, 2),
        "jump inside chunks, pixels": _number(figures.inside_jump, 2),
        **{f"joint, quarter {i + 1}": f"{figures.joint_per_quarter[i]:.3f}" for i in quarters},
        **{f"Frechet distance, quarter {i + 1}": f"{figures.frechet_per_quarter[i]:.3f}" for i in quarters},
        "diversity / real": f"{figures.diversity:.2f}",
        "diversity / real, quarter 1": f"{figures.diversity_per_quarter[0]:.2f}",
        "diversity / real, last quarter": f"{figures.diversity_per_quarter[-1]:.2f}",
        "diversity / real, by spectra": f"{figures.style_diversity:.2f}",
        "shape kept over 5 frames": _number(figures.identity, 2),
        "motion / real": f"{figures.motion:.2f}",
        "motion / real, last quarter": f"{figures.motion_per_quarter[-1]:.2f}",
        "brightness / real": f"{figures.brightness:.2f}",
        "brightness / real, last quarter": f"{figures.brightness_per_quarter[-1]:.2f}",
        "pixels at 255": f"{figures.saturation:.2%}",
    }


def _number(value: float, digits: int) -> str:
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def table(report: Report) -> str:
    """Returns the metrics as a Markdown table that is also readable as plain text."""
    columns = [rows(figures) for figures in report.figures.values()]
    names = list(columns[0])
    cells = [["", *report.figures], *([name, *(column[name] for column in columns)] for name in names)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for row in cells:
        texts = [row[0].ljust(widths[0]), *(x.rjust(width) for x, width in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(texts)} |")
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


def plot(report: Report) -> Figure:
    """Plots joint accuracy over the frames, and the Frechet distance per quarter."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)  # Used directly, so that pyplot and its global backend stay untouched.
    left, right = figure.subplots(1, 2)
    share = 0.8 / len(report.figures)
    for i, (name, figures) in enumerate(report.figures.items()):
        # Plotted at a window's last frame, so that everything left of the training length was trained on.
        left.plot(range(WINDOW - 1, figures.frames), figures.joint_per_frame, label=name)
        places = np.arange(QUARTERS) + (i + 0.5) * share - 0.4
        right.bar(places, figures.frechet_per_quarter, width=share, label=name)
    longest = max(figures.frames for figures in report.figures.values())
    if report.train_frames and report.train_frames <= longest:
        left.axvline(report.train_frames - 0.5, color="0.5", linestyle="--", label="training length")
    for i, border in enumerate(report.borders):
        label = "borders of chunks" if i == 0 else None
        left.axvline(border - 0.5, ymax=0.03, color="0.3", linewidth=1, label=label)
    left.set(xlabel="frame", ylabel="digit and direction right", ylim=(0, 1.03), xlim=(0, longest - 1))
    right.set(xlabel="quarter of the video", ylabel="Frechet distance to real clips")
    right.set_xticks(range(QUARTERS), [str(i + 1) for i in range(QUARTERS)])
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(loc="lower left")
    return figure


def sheet_name(name: str) -> str:
    """Returns the file name of a model's contact sheet."""
    return f"samples_{''.join(c if c.isalnum() else '_' for c in name)}.png"


def write_sheet(folder: str | Path, name: str, videos: np.ndarray, captions: Sequence[str]) -> Path:
    """Writes a contact sheet of a model's first videos.

    Args:
      folder: Output folder.
      name: The model's name.
      videos: uint8 [N, F, h, w, c].
      captions: N captions.

    Returns:
      The path written.
    """
    every = max(1, videos.shape[1] // _SHEET_FRAMES)
    path = Path(folder) / sheet_name(name)
    sheet = video_io.contact_sheet(videos[:_SHEET_ROWS], every=every, labels=captions[:_SHEET_ROWS])
    video_io.write_png(path, sheet)
    return path


def write_report(folder: str | Path, report: Report) -> list[Path]:
    """Writes results.json, the table and the plot.

    Args:
      folder: Output folder; created if missing.
      report: The result.

    Returns:
      The paths written.

    Raises:
      ValueError: The folder is not writable.
    """
    folder = files.check_writable(folder)
    content = {
        "settings": dict(report.settings),
        "train_frames": report.train_frames,
        "figures": {name: dataclasses.asdict(figures) for name, figures in report.figures.items()},
    }
    paths = [folder / name for name in (RESULTS, TABLE, PLOT)]
    with files.replacing(paths[0]) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with files.replacing(paths[1]) as temporary:
        temporary.write_text(table(report) + "\n", encoding="utf-8")
    with files.replacing(paths[2]) as temporary:
        plot(report).savefig(temporary, format="png", dpi=120)
    return paths


def _finite(value):
    """Replaces NaN and infinity by None: they are not valid JSON."""
    if isinstance(value, Mapping):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
