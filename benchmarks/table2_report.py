"""Draws the pages and figures of docs/results from the lines that `benchmarks.table2` wrote."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import scipy.stats
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

TRAIN_FRAMES = 9
STYLES = ("-", "--", ":")
BAND_SEEDS = 3  # the interval of fewer seeds fills the panel
UPDATES = 60  # of the student, where a row's name says nothing
BEHIND = {False: "", True: ", every chunk after real frames", "first": ", after one real chunk and its own frames"}
TUNING_FIGURES = ("joint", "frechet_per_quarter", "diversity", "brightness", "motion")  # kept of the search
BASELINES, OWN_ROLLOUTS = ("DF+DMD", "TF+DMD"), "SF+"  # what differences are taken of
COLUMNS = {
    "joint": "joint",
    "joint_inside": "joint inside chunks",
    "digit": "digit",
    "direction": "direction",
    "border_jump": "border jump",
    "frechet": "Frechet, quarters 1 to 4",
    "diversity": "diversity",
    "brightness": "brightness",
    "motion": "motion",
}
TITLES = {
    "table2": "Table 2 on the moving digits",
    "ablations": "One change of SF+DMD at a time",
    "undirected": "Table 2 on the moving digits, directions untold",
}
_STARTS = (
    "Seeds 0 to 4 share a few-step start, seeds 5 to 9 another one; intervals take seeds as independent. Of several",
    "results of a row and seed, such as those at other rates, the last counts.",
    "",
)
_UNDIRECTED = (
    "No prompt says where the digit goes: only the frames so far can keep it. The direction is right where it is that",
    "in which the video began, the most frequent one of its first seven windows, which favors those; with real frames",
    "after every chunk it is that of the clip. A video that stands still keeps its direction, too: see the motion.",
    "",
)
OPTIONS = {"table2": "", "ablations": " --ablations", "undirected": " --captions=undirected"}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t); NaN with one value."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half)


def _text(values: list[float | None], digits: int) -> str:
    values = [float("nan") if value is None else value for value in values]
    mean, half = interval(values)
    if np.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" if np.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def _cell(column: str, figures: list[dict]) -> str:
    if column == "frechet":
        return ", ".join(_text([f["frechet_per_quarter"][q] for f in figures], 1) for q in range(4))
    return _text([f[column] for f in figures], 2 if column in ("border_jump", "diversity") else 3)


def label(result: dict) -> str:
    """The name of a result's row, and the number of updates where that is not the usual one."""
    return result["row"] + (f", {result['updates']} updates" if result["updates"] not in (None, UPDATES) else "")


def grouped(results: list[dict]) -> dict[tuple, dict[str, list[dict]]]:
    """(chunk, frames, control) -> label -> results of its seeds; of several of a seed, the last that was made."""
    newest = {}
    for result in results:
        if "frames" in result:
            group = tuple(result[key] for key in ("chunk", "frames", "control"))
            newest[*group, label(result), result["seed"]] = result
    groups: dict[tuple, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for (*group, name, _), result in newest.items():
        groups[tuple(group)][name].append(result)
    return {group: dict(sorted(rows.items())) for group, rows in groups.items()}


def table(rows: dict[str, list[dict]]) -> str:
    """One Markdown table."""
    lines = [f"| row | seeds | rate | {' | '.join(COLUMNS.values())} |", f"|---|---|---|{'---|' * len(COLUMNS)}"]
    for name, results in rows.items():
        figures = [result["figures"] for result in results]
        cells = " | ".join(_cell(column, figures) for column in COLUMNS)
        rates = ", ".join(sorted({f"{r['rate']:g}" for r in results if r["rate"]})) or "-"
        lines.append(f"| {name} | {len(results)} | {rates} | {cells} |")
    return "\n".join(lines)


def differences(results: list[dict], chunk: int) -> str:
    """A Markdown table: joint score and Frechet distance of training on own rollouts, less those of the baselines.

    Rows are compared seed by seed, as a seed gives them the same start, prompts and noise, over the seeds that have all
    lengths. Frechet distances are means over the quarters.
    """
    figures: dict[tuple, dict[int, tuple]] = {}
    for (size, frames, control), rows in grouped(results).items():
        if size == chunk and not control:
            for name, seeds in rows.items():
                figures[name, frames] = {
                    r["seed"]: (r["figures"]["joint"], np.mean(r["figures"]["frechet_per_quarter"])) for r in seeds
                }
    names, lengths = dict.fromkeys(name for name, _ in figures), sorted({frames for _, frames in figures})
    pairs = [(name, other) for other in BASELINES if other in names for name in names if name.startswith(OWN_ROLLOUTS)]
    if not pairs:
        return ""
    heads = [f"{figure}, {frames} frames" for figure in ("joint", "Frechet") for frames in lengths]
    lines = [f"| rows | seeds | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    for name, other in pairs:
        ours, theirs = ([figures.get((row, frames), {}) for frames in lengths] for row in (name, other))
        seeds = sorted(set.intersection(*(set(column) for column in (*ours, *theirs))))
        if seeds:
            cells = [
                _difference([a[seed][i] - b[seed][i] for seed in seeds], digits)
                for i, digits in enumerate((3, 1))
                for a, b in zip(ours, theirs, strict=True)
            ]
            lines.append(f"| {name}, less {other} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _difference(values: list[float], digits: int) -> str:
    mean, half = interval(values)
    mean = round(mean, digits) + 0.0  # no -0.000
    return f"{mean:+.{digits}f}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}")


def draw(results: list[dict], path: Path) -> None:
    """Draws the joint accuracy over the frames of the longest videos, and after real clips."""
    groups = grouped(results)
    chunks = sorted({chunk for chunk, _, _ in groups}, reverse=True)
    names = sorted({name for rows in groups.values() for name in rows})
    styles = {name: (f"C{i % 10}", STYLES[i // 10 % len(STYLES)]) for i, name in enumerate(names)}  # in all panels
    figure = Figure(figsize=(13, 4.2 * len(chunks)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, chunk in zip(figure.subplots(len(chunks), 2, squeeze=False), chunks, strict=True):
        longest = max(frames for c, frames, control in groups if c == chunk and not control)
        controls = [frames for c, frames, control in groups if c == chunk and control is True]
        shown = [(longest, False, "after its own frames")] + [(x, True, "after real frames") for x in controls[:1]]
        for ax in axes[len(shown) :]:
            ax.set_visible(False)
        for ax, (frames, control, title) in zip(axes, shown, strict=False):
            lowest = 1.0
            for name, rows in groups[chunk, frames, control].items():
                curves = np.array([r["figures"]["joint_per_frame"] for r in rows])
                first = frames - curves.shape[1]  # the frame that the first window ends with
                # a running mean over six windows: two chunks, so that the borders' period does not hide the drift
                width = min(6, curves.shape[1])
                curves = np.array([np.convolve(curve, np.ones(width) / width, "valid") for curve in curves])
                places = np.arange(curves.shape[1]) + first + (width - 1) / 2
                stats = np.array([interval(list(column)) for column in curves.T])
                (line,) = ax.plot(
                    places, stats[:, 0], label=f"{name} ({len(rows)})", c=styles[name][0], ls=styles[name][1]
                )
                if len(rows) >= BAND_SEEDS:
                    low, high = (stats[:, 0] + sign * stats[:, 1] for sign in (-1, 1))
                    ax.fill_between(places, low, high, alpha=0.15, color=line.get_color())
                lowest = min(lowest, stats[:, 0].min())
            ax.axvline(TRAIN_FRAMES - 0.5, color="0.5", linestyle="--")
            kind = "chunk-wise" if chunk > 1 else "frame-wise"
            bottom = max(0.0, np.floor(10 * lowest - 0.5) / 10)  # where lines lie close together, they fill the panel
            ax.set(title=f"{kind}, {title}", xlabel="frame", ylabel="digit and direction right", ylim=(bottom, 1.01))
            ax.grid(alpha=0.3)
        ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path, dpi=100)
    # A sixth of the bytes. Other methods give several lines one color.
    palette = Image.open(path).convert("RGB").quantize(48, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    palette.save(path, optimize=True)


def write(results: list[dict], page: Path) -> list[Path]:
    """Writes a page and its figure; returns their paths."""
    if not any("frames" in result for result in results):
        return []
    page.parent.mkdir(parents=True, exist_ok=True)
    picture = page.with_suffix(".png")
    draw(results, picture)
    lines = [
        f"# {TITLES[page.stem]}",
        "",
        f"Written by `python -m benchmarks.table2{OPTIONS[page.stem]} --report` from `{page.with_suffix('.jsonl')}`,",
        "where each line has its seed, commit and versions. Mean over the seeds and its 95 % interval (Student's t).",
        "What the rows are: `benchmarks/table2.py`. The dashed line is the training length, 9 frames; curves are means",
        "over 6 windows. Behind real frames, windows across a border are judged with the real frames before it.",
        "",
        *({"table2": _STARTS, "undirected": _UNDIRECTED}.get(page.stem, ())),
        f"![Drift curves]({picture.name})",
        "",
    ]
    order = list(BEHIND)
    groups = sorted(grouped(results).items(), key=lambda item: (-item[0][0], order.index(item[0][2]), item[0][1]))
    for (chunk, frames, control), rows in groups:
        kind = "Chunk-wise" if chunk > 1 else "Frame-wise"
        heading = f"## {kind}, {frames} frames ({frames // TRAIN_FRAMES} x training){BEHIND[control]}"
        lines += [heading, "", table(rows), ""]
    for chunk in dict.fromkeys(chunk for (chunk, _, _), _ in groups):
        compared = differences(results, chunk)
        if compared:
            kind = "Chunk-wise" if chunk > 1 else "Frame-wise"
            lines += [f"## {kind}, differences, seed by seed", "", compared, ""]
    commits = sorted({result["commit"] for result in results if "frames" in result})
    versions = sorted({f"Python {r['python']}, JAX {r['jax']}" for r in results if "frames" in r})
    lines += [f"Commits: {', '.join(commits)}. {'; '.join(versions)}.", ""]
    tuning = [result for result in results if result.get("tuning")]
    if tuning:
        lines += [
            "## Rates",
            "",
            "At 36 frames, on seeds that the table does not have (one exception, in Table 2:",
            "docs/lab_notebook.md, section 9). Frechet: mean over the quarters.",
            "",
        ]
        lines += ["| row | chunk | rate | seed | start | joint | Frechet |", "|---|---|---|---|---|---|---|"]
        for r in tuning:
            cells = (
                r["row"],
                r["chunk"],
                f"{r['rate']:g}",
                r["seed"],
                r.get("start", ""),
                f"{r['figures']['joint']:.3f}",
                f"{np.mean(r['figures']['frechet_per_quarter']):.1f}",
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    page.write_text("\n".join(lines))
    return [page, picture]
