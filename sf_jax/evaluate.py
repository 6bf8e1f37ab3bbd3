"""Compares models of moving digits with each other and with real clips.

  python -m sf_jax.evaluate --checkpoint=before.safetensors,after.safetensors --names=before,after --out=DIR

Without --checkpoint it evaluates the shipped student. With --train_judge=FILE it only trains a new judge.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from absl import flags

from sf_jax import command, files
from sf_jax.evaluation import judge as judging
from sf_jax.evaluation import metrics, report
from sf_jax.weights import hub

REAL = "real clips"
MAX_BATCH, MAX_FRAMES = 4096, 2**22  # videos generated at once; frames of one model's videos, which are all in memory
GROUPS = {
    "Models": ("checkpoint", "names", "guidance"),
    "Videos": ("frames", "train_frames", "num_samples", "batch_size", "seed"),
    "Files": ("out", "train_judge"),
}


class Pipe(Protocol):
    """A model to evaluate. Attribute `only_frames`: the only length it generates, or None for any."""

    only_frames: int | None

    def chunk_starts(self, frames: int) -> tuple[int, ...]:
        """First frame of each chunk of a video."""

    def __call__(self, prompts: list[str], *, frames: int, seed: int, first_index: int = 0) -> np.ndarray:
        """Generates the videos of B prompts, uint8 [B, frames, 24, 24, 1]."""


def generate(pipe: Pipe, name: str, prompts: Sequence[str], frames: int, seed: int, batch: int) -> np.ndarray:
    """Generates all videos in batches of one size, so that a model compiles only once; prints the progress."""
    videos, begun = [], time.monotonic()
    for first in range(0, len(prompts), batch):
        part = list(prompts[first : first + batch])
        padded = part + [prompts[0]] * (batch - len(part))
        videos.append(pipe(padded, frames=frames, seed=seed, first_index=first)[: len(part)])
        done, spent = first + len(part), time.monotonic() - begun
        left = math.ceil(spent / done * (len(prompts) - done))
        print(f"{name}: {done}/{len(prompts)} videos of {frames} frames, {left} s left", flush=True)
    return np.concatenate(videos)


def evaluate(
    pipes: Mapping[str, Pipe],
    out: str | Path,
    *,
    frames: int = 36,
    train_frames: int | None = 9,
    num_samples: int = 256,
    seed: int = 0,
    batch_size: int = 64,
) -> tuple[report.Report, list[Path]]:
    """Evaluates models on the same prompts and writes the report.

    Args:
      pipes: The models by name.
      out: Folder for the report.
      frames: Length of the videos; a pipe with `only_frames` generates that many instead.
      train_frames: Length the models were trained on, for the plot.
      num_samples: Videos per model.
      seed: Seed of the models' noise and of the real clips.
      batch_size: Videos generated at once.

    Returns:
      The report and the paths written.

    Raises:
      ValueError: If an argument is out of range, or a model knows other captions.
    """
    check_amounts(frames, train_frames, num_samples, batch_size)
    check_captions(pipes)
    out, judge = files.check_writable(out), judging.load()
    files.remove_leftovers(out)
    prompts, kinds, targets = metrics.choose_prompts(num_samples)
    lengths = {name: pipe.only_frames or frames for name, pipe in pipes.items()}
    lengths[REAL] = max(lengths.values(), default=frames)
    for length in lengths.values():
        metrics.quarters(length)  # Rejects short videos before any slow work.
    if (out / report.RESULTS).exists():
        print(f"{out / report.RESULTS} is there already: this report replaces it", flush=True)
    # The reference and the row of real clips are different draws, or the distance of that row would be zero.
    real, ceiling = (metrics.real_clips(kinds, lengths[REAL], 2 * seed + i) for i in range(2))
    references, figures, paths = {}, {}, []
    starts = {name: pipe.chunk_starts(lengths[name]) for name, pipe in pipes.items()}
    # Real clips have no chunks; measured at a model's chunk borders, they show the figures of perfect borders.
    starts[REAL] = max((starts[name] for name in pipes if lengths[name] == lengths[REAL]), key=len, default=(0,))
    for name, length in lengths.items():
        if length not in references:
            references[length] = metrics.reference(real[:, :length], targets, judge)
        if name == REAL:
            videos = ceiling[:, :length]
        else:
            videos = generate(pipes[name], name, prompts, length, seed, min(batch_size, num_samples))
        figures[name] = metrics.measure(videos, targets, judge, references[length], starts[name])
        paths.append(report.write_sheet(out, name, videos, prompts))
    settings = {"num_samples": num_samples, "seed": seed}
    outcome = report.Report(settings, figures, train_frames, starts[REAL][1:])
    return outcome, [*report.write_report(out, outcome), *paths]


def check_captions(pipes: Mapping[str, Pipe]) -> None:
    """Rejects models that were not trained on prompts that tell a direction.

    Raises:
      ValueError: if a model knows other captions; names it.
    """
    for name, pipe in pipes.items():
        captions = getattr(pipe, "captions", None) or "full"
        if captions != "full":
            raise ValueError(
                f"checkpoint: {name} knows captions {captions!r}, allowed: 'full', as all prompts here tell a "
                f"direction (`python -m benchmarks.table2 --captions={captions}` measures it)"
            )


def check_amounts(frames: int, train_frames: int | None, num_samples: int, batch_size: int) -> None:
    """Rejects more than fits in memory, before anything is built.

    Raises:
      ValueError: if an amount is out of range; names the limits.
    """
    if not 1 <= batch_size <= MAX_BATCH:
        raise ValueError(f"batch_size: got {batch_size}, allowed: 1 to {MAX_BATCH}")
    if frames * num_samples > MAX_FRAMES:
        raise ValueError(
            f"num_samples: got {num_samples}, with {frames} frames each, allowed: at most {MAX_FRAMES} frames in all"
        )
    if train_frames is not None and not 1 <= train_frames <= MAX_FRAMES:
        raise ValueError(f"train_frames: got {train_frames}, allowed: 1 to {MAX_FRAMES}")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the command line; not on import, as the flags would clash with those of other commands."""
    number = flags.DEFINE_integer
    flags.DEFINE_list(
        "checkpoint", [], "Weights, or student, init, consistency or teacher (shipped)", flag_values=values
    )
    flags.DEFINE_list("names", [], "Names of the checkpoints in the report", flag_values=values)
    number("frames", 36, "Frames of each video; a teacher makes its own number", flag_values=values)
    number("train_frames", 9, "Frames trained on, marked in the plot", flag_values=values)
    number("num_samples", 256, "Videos of each model", flag_values=values)
    number("batch_size", 64, "Videos made at once", flag_values=values)
    number("seed", 0, "Seed of the noise and of the real clips", 0, 2**32 - 1, flag_values=values)
    flags.DEFINE_float("guidance", None, "Guidance scale of the teachers", flag_values=values)
    command.define_path("out", "evaluation", "Folder for the report", flag_values=values)
    command.define_path("train_judge", None, "Only train a judge and write it here", flag_values=values)


def load_pipes(values: flags.FlagValues) -> dict[str, Pipe]:
    """Loads the checkpoints on the command line, by name."""
    from sf_jax.inference.load import load_digits  # Training a judge needs no models.

    paths = [hub.weights_path(path) for path in values.checkpoint] or ["student"]
    names = values.names or [Path(path).stem for path in paths]
    if len(names) != len(paths) or len({*names, REAL}) <= len(names):
        raise ValueError(f"names: got {', '.join(names)}, allowed: {len(paths)} different names, not {REAL!r}")
    sheets = {report.sheet_name(name).casefold() for name in (*names, REAL)}
    if len(sheets) <= len(names):
        raise ValueError(
            f"names: got {', '.join(names)}, allowed: names that differ in letters or digits, not {REAL!r}"
        )
    pipes = {name: load_digits(path) for name, path in zip(names, paths, strict=True)}
    if values.guidance is not None and all(pipe.kind == "student" for pipe in pipes.values()):
        raise ValueError(f"guidance is {values.guidance}: a student has none (it was distilled from a guided teacher)")
    for name, pipe in pipes.items():
        pipe.check_frames(pipe.only_frames or values.frames)
        if values.guidance is not None and pipe.kind != "student":  # Only many-step networks use it.
            pipes[name] = pipe.with_sampling(guidance=values.guidance)
    return pipes


def run(values: flags.FlagValues) -> list[Path]:
    """Runs the command; returns the paths written."""
    if values.train_judge is not None:
        return [judging.make(values.train_judge, values.seed)]
    numbers = ("frames", "train_frames", "num_samples", "batch_size", "seed")
    check_amounts(values.frames, values.train_frames, values.num_samples, values.batch_size)
    outcome, paths = evaluate(load_pipes(values), values.out, **{name: values[name].value for name in numbers})
    print(report.table(outcome))
    return paths


def main() -> None:
    """Command line: see the module's docstring."""
    print("wrote", *run(flags.FLAGS), sep="\n  ")


if __name__ == "__main__":
    define_flags()
    command.run(main, groups=GROUPS)
