"""The paper's Table 2 on the moving digits: training on own rollouts against training on real clips.

  python -m benchmarks.table2                  # everything; hours on 2 cores, and goes on where it was stopped
  python -m benchmarks.table2 --quick          # three rows, one seed, one length
  python -m benchmarks.table2 --rows="SF+DMD;TF+DMD" --seeds=0,1 --chunks=3
  python -m benchmarks.table2 --report         # only writes docs/results/table2.md and its figure from the results
  python -m benchmarks.table2 --captions=undirected  # harder: no prompt says where the digit goes
  python -m benchmarks.table2 --ablations --seeds=0,1,2 --chunks=3    # one change at a time, docs/results/ablations.md

Ablations are measured at 4 times the training length, with and without the controls; what the gradient into the cache
alone changes is the row "SF+DMD, write" of the table.

All few-step rows start from one few-step start and get the same number of student updates. `--tune` is the same small
search for every row, on seeds that no row of the table has. Where the best rate is the lowest or highest, it goes on by
two steps at most; docs/lab_notebook.md says for which rows it did, and for which one row, a baseline, seeds of the
table chose between two rates.

A row is trained and measured per seed: at 1, 4 and 16 times the training length, and at 4 times with real clips as the
context of every chunk. That control has no exposure to own outputs: what a row loses there, it does not lose to
exposure. A second control starts from one real chunk and continues alone: it separates errors that add up from those of
a first chunk without context.

Each result is a line of docs/results/table2.jsonl with its seed, length, commit and versions; a line that is there is
not made again. Runs lie in runs/table2. Two of these commands with different seeds may share the files once the
starts are there. Seeds 0 to 4 and those of the search share the few-step start, seeds 5 to 9 have another one, and so
on: with five seeds, intervals leave the start's own variation out. Without runs/table2 a start is trained anew, and
another CPU rounds it differently, so newer lines have its digest.

With `--captions=undirected` a video has to keep the direction in which it began: its direction is right where it does.
These rows are run frame by frame, have a teacher of their own, which is trained first, and start from a student that
DF+DMD has trained for as long as they are. Their runs lie in runs/table2/undirected, their results in
docs/results/undirected.jsonl.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import jax
from tqdm import tqdm

from benchmarks import table2_report as report
from benchmarks.table2_measure import Measure
from configs import digits
from sf_jax import compilation
from sf_jax.config import TrainConfig, from_dict
from sf_jax.evaluation import metrics
from sf_jax.inference.load import load_pipeline
from sf_jax.options import CAPTIONS
from sf_jax.training import loop

RESULTS, ABLATION_RESULTS = Path("docs/results/table2.jsonl"), Path("docs/results/ablations.jsonl")
UNDIRECTED_RESULTS = Path("docs/results/undirected.jsonl")
RUNS = Path("runs/table2")
LENGTHS = (9, 36, 144)
CONTROL_LENGTH = 36
CONTROLS = (False, True, "first")  # its own video alone, real frames behind every chunk, a real first chunk
REAL = "real clips"
# Of `metrics.Figures`: what a line says elsewhere or has in common with all others, and what no page shows.
NOT_KEPT = (
    "frames",
    "samples",
    "digit_per_frame",
    "direction_per_frame",
    "brightness_per_quarter",
    "motion_per_quarter",
)
TUNING_SEEDS = (100,)
SEEDS_PER_START = 5
RATES = (3e-5, 1e-4, 3e-4)
# What the search tries next if the best rate is the lowest or highest that it has.
LOWER_AND_HIGHER = {3e-5: 1e-5, 1e-5: 3e-6, 3e-4: 1e-3, 1e-3: 3e-3}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
      name: what the table calls it.
      variant: of configs/digits.py.
      changes: fields that differ from it.
      rate: learning rate of a few-step student, from the search (`--tune`) unless a comment says otherwise.
      updates: of the student, where it is a few-step one.
      start: what it starts from: the common start ("init"), "consistency", or the finished student of the row "TF+DMD"
        or of UNDIRECTED_START.
      framewise_rate: learning rate frame-wise, where another one is best there.
      chunks: sizes of chunk with which it is run.
      run_updates: updates of the whole run, for the rows of a run that is measured several times.
      captions: as `data.captions`.
    """

    name: str
    variant: str
    changes: dict = dataclasses.field(default_factory=dict)
    rate: float | None = None
    updates: int = report.UPDATES
    start: str = "init"
    framewise_rate: float | None = None
    chunks: tuple[int, ...] = (3, 1)
    run_updates: int | None = None
    captions: str = "full"

    @property
    def runs(self) -> Path:
        """The folder of the runs with its captions."""
        return RUNS if self.captions == "full" else RUNS / self.captions

    def rate_of(self, chunk: int) -> float | None:
        """Learning rate with chunks of this size."""
        return self.framewise_rate if chunk == 1 and self.framewise_rate else self.rate

    @property
    def few_step(self) -> bool:
        """Whether it is distilled from the common start."""
        return self.variant not in ("causal", "diffusion_forcing")


def with_stops(row: Row, *counts: int) -> tuple[Row, ...]:
    """A row, behind the same run measured at smaller numbers of updates."""
    return tuple(dataclasses.replace(row, updates=n, run_updates=row.updates) for n in (*counts, row.updates))


# As in the paper: past the training length, no row sees its first frames.
_WITHOUT_SINK = {"sink": 0, "positions": "absolute"}
_WRITE = {"cache_gradient": "write"}
_IN_PARTS = {"accumulate": 4}  # the same update, in a fifth less time on one core
# TF+DMD, chunk-wise: 1e-3 is best on the seed of the search, 3e-4 on the five seeds of the second start.
ROWS = (
    Row("many-step TF", "causal", _IN_PARTS),
    Row("many-step DF", "diffusion_forcing", _IN_PARTS),
    Row("TF+DMD", "tf_dmd", rate=3e-4, framewise_rate=3e-5),
    Row("DF+DMD", "causvid", rate=3e-4, framewise_rate=1e-3),
    Row("SF+DMD", "distill", rate=3e-4),
    Row("SF+DMD, write", "distill", _WRITE, 3e-4, framewise_rate=1e-4),
    Row("SF+SiD", "sid", rate=3e-4),
    Row("SF+SiD, write", "sid", _WRITE, 3e-4, framewise_rate=1e-4),
    Row("SF+GAN", "gan", rate=1e-4),
    Row("SF+GAN, write", "gan", _WRITE, 1e-4),
)
# Frame by frame with captions that do not say where a digit goes. The rates of SF+DMD and DF+DMD are the best of their
# searches; TF+DMD and `write` have those of full captions, until `--tune` has searched theirs. The few-step start's own
# videos fade there, and Self Forcing from it fades, too. So all rows start from one student of DF+DMD, at the best rate
# of a search from the few-step start (whose results have that start's digest).
UNDIRECTED_START = Row("DF+DMD start", "causvid", rate=1e-3, chunks=(1,), captions="undirected")
UNDIRECTED_RATES = {"TF+DMD": 3e-5, "DF+DMD": 1e-4, "SF+DMD": 1e-4, "SF+DMD, write": 1e-4}
UNDIRECTED_ROWS = tuple(
    dataclasses.replace(
        row, captions="undirected", rate=rate, framewise_rate=None, chunks=(1,), start=UNDIRECTED_START.name
    )
    for row in ROWS
    for rate in [UNDIRECTED_RATES.get(row.name)]
    if rate
)
QUICK = ("TF+DMD", "DF+DMD", "SF+DMD")
_SHIFTED = digits.VARIANTS["distill"]()["score"] | {"time_shift": 3.0}
_NOISY = digits.VARIANTS["distill"]()["rollout"] | {"context": "noisy"}
_GIVEN = digits.VARIANTS["distill"]()["rollout"] | {"first_frame_alone": True}
ABLATIONS = (
    *with_stops(Row("SF+DMD", "distill", rate=3e-4, updates=720), 20, 60, 180, 360),
    Row("straight_through", "distill", {"cache_gradient": "straight_through"}, 3e-4),
    Row("noisy context", "distill", {"rollout": _NOISY}, 3e-4),
    Row("noisy context, write", "distill", {"rollout": _NOISY, **_WRITE}, 3e-4),
    Row("exits per chunk", "distill", {"exits": "per_chunk"}, 3e-4),
    Row("exits last", "distill", {"exits": "last"}, 3e-4),
    Row("rate 1e-4", "distill", rate=1e-4),
    Row("rate 1e-4, write", "distill", _WRITE, 1e-4),
    Row("rate 6e-4", "distill", rate=6e-4),
    Row("rate 6e-4, write", "distill", _WRITE, 6e-4),
    Row("score times shifted by 3", "distill", {"score": _SHIFTED}, 3e-4),
    Row("guidance 1.5", "distill", {"score": digits.VARIANTS["distill"]()["score"] | {"guidance": 1.5}}, 3e-4),
    Row("regression 0.1", "distill", {"regression_weight": 0.1}, 3e-4),
    Row("from TF+DMD", "distill", rate=3e-4, start="TF+DMD"),
    # measured every 40 iterations
    *with_stops(Row("after consistency, 6e-4", "distill", rate=6e-4, start="consistency"), 20, 40),
    *with_stops(Row("after consistency, 1e-4", "distill", rate=1e-4, start="consistency"), 20, 40),
    *with_stops(Row("after consistency, 3e-5", "distill", rate=3e-5, start="consistency"), 20, 40),
    # Nearer to the information that TF+DMD has: no chunk is generated without context. Three frames at a time it
    # learns from 1 + 3 + 3 frames, as the teacher knows at most 9.
    Row("real first frame", "distill", {"image_to_video": True, "rollout": _GIVEN}, 3e-4),
)


def variant_of(row: Row, name: str) -> dict:
    """A variant of configs/digits.py with the row's captions."""
    values = digits.VARIANTS[name]()
    if row.captions != "full":
        values["data"] = values["data"] | {"captions": row.captions}
        shipped = [key for key in ("teacher_weights", "init_weights") if values.get(key) == "shipped"]
        values |= dict.fromkeys(shipped, str(teacher_of(row))) if shipped else {}
    return values


def teacher_of(row: Row) -> Path:
    """The shipped teacher after some training on other captions, unless that is there."""
    path = row.runs / "teacher" / "teacher.safetensors"
    if not path.exists():
        values = digits.VARIANTS["teacher"]() | {"init_weights": "shipped", "steps": 1500}
        values["data"] = values["data"] | {"captions": row.captions}
        values["optimizer"], values["ema"] = values["optimizer"] | {"lr": 4e-3}, values["ema"] | {"decay": 0.997}
        loop.train(from_dict(values), path.parent)
    return path


def configured(row: Row, seed: int, chunk: int, rate: float | None = None) -> TrainConfig:
    """The configuration of a row."""
    values = variant_of(row, row.variant) | row.changes | {"seed": seed}
    values["rollout"] = values["rollout"] | _WITHOUT_SINK | {"chunk": chunk}
    if values["rollout"].get("first_frame_alone"):
        frames = values["data"]["frames"]
        values["data"] = values["data"] | {"frames": frames - (frames - 1) % chunk}
    if row.few_step:
        rates = {"lr": rate or row.rate_of(chunk), "decay": "constant"}
        values |= {
            "steps": row.updates * values["generator_every"],
            "init_weights": str(start_of(row, seed, chunk)),
            "optimizer": values["optimizer"] | rates,
        }
    return from_dict(values)


def start_of(row: Row, seed: int, chunk: int) -> Path:
    """The weights that a few-step row starts from; trains them unless they are there."""
    if row.start == "TF+DMD":
        return weights_of(next(r for r in ROWS if r.name == "TF+DMD"), seed, chunk)
    if row.start == UNDIRECTED_START.name:
        return weights_of(UNDIRECTED_START, TUNING_SEEDS[0], chunk)
    start_seed = 0 if seed in TUNING_SEEDS else seed // SEEDS_PER_START
    folder = f"start-{row.start}-chunk{chunk}" + (f"-seed{start_seed}" if start_seed else "")
    path = row.runs / folder / "student.safetensors"
    if not path.exists():
        values = variant_of(row, row.start) | {"seed": start_seed}
        values["rollout"] = values["rollout"] | _WITHOUT_SINK | {"chunk": chunk}
        if row.start == "consistency":
            values["teacher_weights"] = str(weights_of(ROWS[0], 0, chunk))
            values["consistency"] = values["consistency"] | {"guidance": 2.0, "later_guidance": 1.5}  # of 1000 steps
        loop.train(from_dict(values), path.parent)
    return path


def start_digest(row: Row, seed: int, chunk: int) -> str:
    """Identifies the weights that a few-step row starts from."""
    return hashlib.sha256(start_of(row, seed, chunk).read_bytes()).hexdigest()[:12]


def weights_of(row: Row, seed: int, chunk: int, rate: float | None = None) -> Path:
    """Trains a row, unless its weights are there."""
    config = configured(row, seed, chunk, rate)
    name = "".join(c if c.isalnum() else "_" for c in row.name.replace("+", "_"))
    folder = row.runs / f"{name}-chunk{chunk}-seed{seed}"
    if row.few_step:
        folder /= f"rate{rate or row.rate_of(chunk):g}-updates{row.run_updates or row.updates}"
    path = folder / ("student.safetensors" if row.few_step else "causal.safetensors")
    if row.run_updates not in (None, row.updates):
        path = folder / f"updates{row.updates}.safetensors"
    if not path.exists():
        # the number of steps differs between the stops of a run, and nothing depends on it
        loop.train(config, folder, allow_config_change=row.run_updates is not None).rename(path)
        (folder / "commit").write_text(commit())
    return path


def commit() -> str:
    """The commit of the checkout, with a + where files differ from it; empty outside of one."""
    run = {"capture_output": True, "text": True, "check": False}
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **run).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "--", "sf_jax", "configs", "benchmarks"], **run).stdout
    return head + "+" * bool(changed.strip())


def read(path: Path) -> list[dict]:
    """The results so far; a line that a kill has cut is left out."""
    results = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            results.append(json.loads(line))
    return results


def write(path: Path, result: dict) -> None:
    """Appends a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(result, separators=(",", ":")) + "\n")


def figures_of(figures: metrics.Figures) -> dict:
    """What of the figures is kept."""
    kept = dataclasses.asdict(figures)
    for name in NOT_KEPT:
        del kept[name]
    rounded = {k: [round(x, 3) for x in v] if isinstance(v, tuple) else round(v, 4) for k, v in kept.items()}
    return {k: None if v != v else v for k, v in rounded.items()}  # NaN is no JSON


def run_row(row: Row, seed: int, chunk: int, lengths: list[tuple], measure: Measure, results: Path) -> None:
    """Trains and measures one row with one seed."""
    began = time.time()
    path = weights_of(row, seed, chunk)
    pipe = load_pipeline(path)
    if pipe.rollout.first_frame_alone:  # whose controls and lengths are those of all others
        pipe = dataclasses.replace(pipe, rollout=dataclasses.replace(pipe.rollout, first_frame_alone=False))
    trained = time.time() - began
    for frames, control in lengths:
        figures = measure(pipe, frames, seed, control)
        about = {"row": row.name, "chunk": chunk, "seed": seed, "frames": frames, "control": control}
        where = {
            "rate": row.rate_of(chunk),
            "updates": row.updates if row.few_step else None,
            "start": start_digest(row, seed, chunk) if row.few_step else None,
            "commit": (path.parent / "commit").read_text(),  # of the training
            "jax": jax.__version__,
            "python": platform.python_version(),
            "seconds": round(trained),
        }
        write(results, about | where | {"figures": figures_of(figures)})


def run_real(chunk: int, lengths: list[tuple], measure: Measure, results: Path) -> None:
    """Measures real clips as if a row had made them, which is the most that one can reach; unless that is done."""
    done = {(result["chunk"], result.get("frames")) for result in read(results) if result["row"] == REAL}
    for frames in (frames for frames, control in lengths if not control and (chunk, frames) not in done):
        about = {"row": REAL, "chunk": chunk, "seed": 0, "frames": frames, "control": False}
        where = {"rate": None, "updates": None, "commit": commit(), "jax": jax.__version__}
        figures = measure.real(frames, chunk)
        write(results, about | where | {"python": platform.python_version(), "figures": figures_of(figures)})


def tune(row: Row, seed: int, chunk: int, measure: Measure, results: Path) -> None:
    """Prints the joint score of every rate that has none yet; results without a digest count as of this start."""
    about = {"row": row.name, "chunk": chunk, "seed": seed, "start": start_digest(row, seed, chunk)}
    scores = {
        result["rate"]: result["figures"]["joint"]
        for result in read(results)
        if result.get("tuning")
        and about.items() <= ({"start": about["start"]} | result).items()  # older ones have none
    }
    rates = RATES
    while rates:
        for rate in (rate for rate in rates if rate not in scores):
            figures = measure(load_pipeline(weights_of(row, seed, chunk, rate)), CONTROL_LENGTH, seed)
            kept = {name: value for name, value in figures_of(figures).items() if name in report.TUNING_FIGURES}
            write(results, about | {"rate": rate, "tuning": True, "commit": commit(), "figures": kept})
            print(f"{row.name}, chunk {chunk}, rate {rate:g}, seed {seed}: joint {figures.joint:.3f}", flush=True)
            scores[rate] = figures.joint
        best = max(scores, key=scores.get)
        rates = (LOWER_AND_HIGHER[best],) if best in LOWER_AND_HIGHER and LOWER_AND_HIGHER[best] not in scores else ()


def plan(rows: list[Row], seeds, chunks, lengths, results: list[dict]) -> list[tuple]:
    """(row, seed, chunk, lengths that are missing) of everything that is not done, seed by seed."""
    keys = ("row", "chunk", "seed", "frames", "control", "rate", "updates")
    done = {tuple(result[key] for key in keys) for result in results if "frames" in result}
    work = []
    for chunk in chunks:
        for seed in seeds:
            for row in (row for row in rows if chunk in row.chunks):
                updates = row.updates if row.few_step else None
                noisy = row.changes.get("rollout", {}).get("context") == "noisy"
                wanted = [(frames, control) for frames, control in lengths if not (control and noisy)]
                left = [x for x in wanted if (row.name, chunk, seed, *x, row.rate_of(chunk), updates) not in done]
                work += [(row, seed, chunk, left)] if left else []
    return work


def main(arguments: list[str]) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rows, one seed, 4 times the training length")
    parser.add_argument("--rows", default="", help="names of rows, separated by semicolons")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--chunks", default="", help="3 is chunk-wise, 1 frame-wise; all that the rows have")
    parser.add_argument("--tune", action="store_true", help="try the rates instead, on other seeds")
    parser.add_argument("--report", action="store_true", help="only write the table and the figure")
    parser.add_argument("--captions", default="full", choices=CAPTIONS, help="as data.captions")
    parser.add_argument("--ablations", action="store_true", help="rows that change one thing of SF+DMD each")
    args = parser.parse_args(arguments)
    compilation.keep_compiled()
    if args.captions != "full" and (args.ablations or args.quick):
        parser.error(f"--captions={args.captions} has neither --ablations nor --quick: leave them out")
    rows, results = list(ABLATIONS if args.ablations else ROWS), ABLATION_RESULTS if args.ablations else RESULTS
    if args.captions == "undirected":
        rows, results = list(UNDIRECTED_ROWS), UNDIRECTED_RESULTS
    if args.rows:
        names, known = args.rows.split(";"), dict.fromkeys(row.name for row in rows)
        unknown = set(names) - set(known)
        if unknown:
            parser.error(f"--rows has {', '.join(unknown)}: rows are {'; '.join(known)}")
        rows = [row for row in rows if row.name in names]
    seeds, known = [int(x) for x in args.seeds.split(",")], {chunk for row in rows for chunk in row.chunks}
    chunks = [int(x) for x in args.chunks.split(",")] if args.chunks else sorted(known, reverse=True)
    if set(chunks) - known:
        parser.error(f"--chunks has {', '.join(map(str, sorted(set(chunks) - known)))}: no row is run with it")
    lengths = [(frames, False) for frames in LENGTHS] + [(CONTROL_LENGTH, control) for control in CONTROLS[1:]]
    if args.ablations:
        lengths = [(CONTROL_LENGTH, control) for control in CONTROLS]
    if args.quick and (args.rows or args.ablations or args.tune):
        parser.error("--quick has rows, seed and length of its own: leave out --rows, --ablations and --tune")
    if args.quick:
        rows, seeds, chunks = [row for row in ROWS if row.name in QUICK], [0], [3]
        lengths = [(CONTROL_LENGTH, control) for control in CONTROLS]
    if not args.report:
        work = plan(rows, TUNING_SEEDS if args.tune else seeds, chunks, lengths, read(results))
        measure = Measure(args.captions)
        if args.captions == "undirected" and not args.tune:
            for chunk in chunks:
                run_real(chunk, lengths, measure, results)
        bar = tqdm(work, desc="table2", unit="run")
        for row, seed, chunk, left in bar:
            bar.set_postfix_str(f"{row.name}, chunk {chunk}, seed {seed}")
            if args.tune and row.few_step:
                tune(row, seed, chunk, measure, results)
            elif not args.tune:
                run_row(row, seed, chunk, left, measure, results)
                report.write(read(results), results.with_suffix(".md"))
    for path in report.write(read(results), results.with_suffix(".md")):
        print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
