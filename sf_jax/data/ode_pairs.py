"""A dataset of a teacher's ODE trajectories in ArrayRecord files; generation resumes after an interruption.

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
    """Opens the pairs in a folder, after generating those that are missing.

    Args:
      folder: the folder of the dataset.
      shape: [S, F, H, W, C] of one trajectory.
      count: number of pairs.
      per_shard: pairs per file; a killed run loses its current file.
      recipe: everything that determines the trajectories; a dataset with another recipe raises.
      make: (first, stop) -> the pairs [first, stop), (trajectory float32 `shape`, caption), in order.
      wait: barrier; returns when all processes have called it.
      process_index: index of this process among those that share the folder.
      process_count: number of processes.

    Raises:
      ValueError: If the folder cannot be written, has pairs with another recipe, or has a damaged file.
      OSError: If the disk is full.
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
    if process_count > 1:  # no process may have seen the others' last files
        for shard in shards.missing(plan):
            appears(plan.path(shard))
        if process_index == 0:
            shards.finish(plan)
        wait()
        appears(Path(folder) / shards.INFO)
    return PairSource(shards.open_records(folder, NAME, field="ode.dir"))
