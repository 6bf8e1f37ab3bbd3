"""A data set of a teacher's ODE trajectories in ArrayRecord files, which a killed run goes on writing.

Source: CausVid (arXiv 2412.07772); official `scripts/generate_ode_pairs.py`.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from sf_jax.data import shards
from sf_jax.distributed import appears

NAME = "ode_pairs"


@dataclasses.dataclass(frozen=True)
class PairSource:
    """Random access to pairs: trajectory float32 [S, F, H, W, C], caption str."""

    records: Any

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.records[index]
        return {"trajectory": example["trajectory"], "caption": example["caption"].decode()}


def open_pairs(
    folder: str | Path,
    shape: tuple[int, ...],
    count: int,
    per_shard: int,
    recipe: dict[str, Any],
    make: Callable[[int, int], Iterable[tuple[np.ndarray, str]]],
    wait: Callable[[], None] = lambda: None,
    process_index: int = 0,
    process_count: int = 1,
) -> PairSource:
    """Opens the pairs in a folder, generating those that are missing.

    Args:
      folder: where they are kept.
      shape: [S, F, H, W, C] of one trajectory.
      count: how many there are.
      per_shard: pairs of a file; a run that is killed loses the file it was at.
      recipe: everything that determines the trajectories; a set made by another recipe is refused.
      make: (first, stop) -> the pairs [first, stop), (trajectory float32 `shape`, caption), in order.
      wait: returns when all processes have called it.
      process_index: which of the processes that share the folder this is.
      process_count: how many there are.

    Raises:
      ValueError: The folder cannot be written, holds pairs made by another recipe, or a damaged file.
      OSError: The disk is full.
    """
    features = tfds.features.FeaturesDict(
        {
            "trajectory": tfds.features.Tensor(shape=shape, dtype=np.float32, encoding=tfds.features.Encoding.BYTES),
            "caption": tfds.features.Text(),
        }
    )
    plan = shards.Plan(Path(folder), NAME, features, recipe, {"train": count}, per_shard, "ode.dir")

    def examples(shard):
        for trajectory, caption in make(shard.start, shard.stop):
            yield {"trajectory": trajectory, "caption": caption}

    shards.write(plan, examples, process_index, process_count)
    wait()
    if process_count > 1:  # none may have seen the others' last files
        for shard in shards.missing(plan):
            appears(plan.path(shard))
        if process_index == 0:
            shards.finish(plan)
        wait()
        appears(Path(folder) / shards.INFO)
    return PairSource(shards.open_records(folder, NAME, field="ode.dir"))
