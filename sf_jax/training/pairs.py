"""Generates the ODE pairs that stage "init" learns from, on all devices of the mesh."""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sf_jax import many_step
from sf_jax import rollout as ro
from sf_jax.config import TrainConfig
from sf_jax.data import ode_pairs, pipeline
from sf_jax.diffusion.solvers import teacher_trajectory
from sf_jax.models.text import WordEmbedding
from sf_jax.models.wan import WanTransformer
from sf_jax.rng import Purpose, key_for
from sf_jax.training import sharding
from sf_jax.weights.package import Package

PAIR_BATCH = 64


def open_pairs(
    config: TrainConfig,
    workdir: Path,
    teacher: Package,
    captions: tuple[str, ...],
    text: WordEmbedding,
    mesh: Mesh,
) -> ode_pairs.PairSource:
    """The ODE pairs of a config, generated where they are missing.

    Args:
      config: of stage "init".
      workdir: the folder they are kept in if `ode.dir` is None.
      teacher: bidirectional or causal, as `ode.teacher` says.
      captions: prompts, taken in turn.
      text: embeds them.
      mesh: devices that share a batch.

    Raises:
      ValueError: see `ode_pairs.open_pairs`; or the devices cannot share a batch.
    """
    sharding.check_batch(PAIR_BATCH, mesh, "the batch of ODE pairs")
    data, ode = config.data, config.ode
    latent = (data.frames, data.height, data.width, config.model.channels)
    rows = (*(ode.solver_steps * (1000 - s) // 1000 for s in config.rollout.steps), ode.solver_steps)
    model = WanTransformer(config.teacher_model)
    key = key_for(config.seed, 0, Purpose.ODE_PAIRS)
    split = sharding.batch_sharding(mesh)

    @functools.cache
    def params():
        tree = jax.tree.map(jnp.asarray, teacher.params)
        return jax.device_put(tree, sharding.tree_shardings(tree, mesh))

    def make(first: int, stop: int) -> Iterator[tuple[np.ndarray, str]]:
        # always a whole batch: a pair does not depend on how many are made, and one program serves all
        index = np.arange(first, first + PAIR_BATCH)
        chosen = [captions[i % len(captions)] for i in index]
        noise = ro.example_noise(key, jnp.asarray(index, jnp.int32), (PAIR_BATCH, *latent))
        noise, prompt = jax.device_put((noise, jnp.asarray(text.encode(chosen))), split)
        arguments = (config.rollout.shift, ode.solver_steps, ode.guidance)
        inputs = (params(), noise, prompt, jnp.zeros_like(prompt))
        if ode.teacher == "causal":
            path = many_step.causal_trajectory(model, config.rollout, *arguments, rows, *inputs)
        else:
            path = teacher_trajectory(model, *arguments, *inputs)[np.asarray(rows)]
        path = np.moveaxis(np.asarray(path), 1, 0)
        yield from zip(path[: stop - first], chosen, strict=False)

    recipe = {
        "pairs": ode.pairs,
        "solver_steps": ode.solver_steps,
        "guidance": ode.guidance,
        "shift": config.rollout.shift,
        "steps": list(config.rollout.steps),
        "seed": config.seed,
        "teacher": _fingerprint(teacher.params),
        "kind": ode.teacher,
        "latent": list(latent),
    }
    if ode.teacher == "causal":
        rollout = config.rollout
        recipe["chunks"] = [rollout.chunk, rollout.first_frame_alone, rollout.window, rollout.sink]
    folder = ode.dir or workdir / "ode_pairs"
    return ode_pairs.open_pairs(folder, (len(rows), *latent), ode.pairs, PAIR_BATCH, recipe, make)


def _fingerprint(params: dict) -> str:
    """A short hash of parameters, so that data made by another teacher is not taken for this one's."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def pair_iterator(
    source: ode_pairs.PairSource,
    config: TrainConfig,
    text: pipeline.TextEncoder,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Endless shuffled batches of pairs.

    Args:
      source: the pairs.
      config: its seed determines the order, its batch size is that of all processes.
      text: embeds the captions.
      process_index: which of the processes this is.
      process_count: how many share a batch; each gets, and reads, its own contiguous rows.

    Returns:
      An iterator over dictionaries: trajectory float32 [B, S, F, H, W, C], text float32 [B, L, D].

    Raises:
      ValueError: see `pipeline.row_iterator`.
    """

    def collate(rows):
        pairs = [source[i] for i in rows]
        return {
            "trajectory": np.stack([pair["trajectory"] for pair in pairs]),
            "text": text.encode([pair["caption"] for pair in pairs]),
        }

    processes = {"process_index": process_index, "process_count": process_count}
    return pipeline.row_iterator(
        len(source), collate, batch_size=config.batch_size, seed=config.seed, name="pairs", **processes
    )
