"""Generates the ODE pairs for stage "init" on all devices of the mesh."""

from collections.abc import Callable, Iterator
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sf_jax import many_step
from sf_jax import rollout as ro
from sf_jax.config import MeshConfig, TrainConfig
from sf_jax.data import ode_pairs, pipeline
from sf_jax.diffusion.solvers import teacher_trajectory
from sf_jax.models.wan import WanTransformer
from sf_jax.rng import Purpose, key_for
from sf_jax.training import sharding
from sf_jax.training.fingerprint import measure
from sf_jax.training.sources import Source, digest_of


def open_pairs(
    config: TrainConfig,
    workdir: Path,
    load_teacher: Callable[[Mesh], dict],
    source: Source,
    mesh: Mesh,
) -> ode_pairs.PairSource:
    """Opens the ODE pairs of a config; generates those that are missing.

    A single process generates them on the whole mesh; several divide the files, each using its own devices.

    Args:
      config: the configuration of stage "init".
      workdir: the folder that contains them if `ode.dir` is None.
      load_teacher: mesh -> parameters on it, of a bidirectional or causal network, depending on `ode.teacher`.
      source: source of the prompts or, with a causal teacher, of the captioned videos, which are used in turn.
      mesh: devices that share a batch.

    Raises:
      ValueError: see `ode_pairs.open_pairs`; also if pairs are missing and the devices cannot share a batch.
    """
    if jax.process_count() > 1:
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1), jax.local_devices())
    data, ode = config.data, config.ode
    latent = (data.frames, data.height, data.width, config.model.channels)
    causal = ode.teacher == "causal"
    rows = (*(ode.solver_steps * (1000 - s) // 1000 for s in config.rollout.steps), ode.solver_steps)
    model = WanTransformer(config.teacher_model)
    key = key_for(config.seed, 0, Purpose.ODE_PAIRS)
    split = sharding.batch_sharding(mesh)
    params = load_teacher(mesh)

    def make(first: int, stop: int) -> Iterator[tuple[np.ndarray, str]]:
        sharding.check_batch(ode.batch_size, mesh, "ode.batch_size")
        # Always a whole batch: a pair does not depend on how many are generated, and one program serves all.
        index = np.arange(first, first + ode.batch_size)
        chosen = [(source.clip if causal else source.prompt)(int(i)) for i in index]
        with jax.set_mesh(mesh):
            noise = ro.example_noise(key, jnp.asarray(index, jnp.int32), (len(index), *latent))
            noise, text = jax.device_put((noise, np.stack([entry[1] for entry in chosen])), split)
            negative = jnp.broadcast_to(jnp.asarray(source.negative), text.shape)
            arguments = (config.rollout.shift, ode.solver_steps, ode.guidance)
            if causal:
                clips = jax.device_put({source.video_key: np.stack([entry[2] for entry in chosen])}, split)
                clean = source.media.clean(clips)
                inputs = (params, noise, clean, text, negative)
                path = many_step.forced_trajectory(model, config.rollout, *arguments, rows, *inputs)
                path = jnp.concatenate([path, clean[None]])  # the student's context
            else:
                path = teacher_trajectory(model, *arguments, params, noise, text, negative)[np.asarray(rows)]
        path = np.moveaxis(np.asarray(path), 1, 0)
        yield from zip(path[: stop - first], (entry[0] for entry in chosen), strict=False)

    recipe = _recipe(config, params, source, latent)
    folder = ode.dir or workdir / "ode_pairs"
    shape = (len(rows) + causal, *latent)
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    return ode_pairs.open_pairs(folder, shape, ode.pairs, ode.batch_size, recipe, make, _wait, **share)


def _recipe(config: TrainConfig, params: dict, source: Source, latent: tuple[int, ...]) -> dict:
    """Everything that determines the pairs."""
    ode = config.ode
    checksums = {name: leaf.checksum for name, leaf in measure(params).items()}
    recipe = {
        "pairs": ode.pairs,
        "solver_steps": ode.solver_steps,
        "guidance": ode.guidance,
        "shift": config.rollout.shift,
        "steps": list(config.rollout.steps),
        "seed": config.seed,
        "teacher": digest_of(checksums),
        "prompts": source.digest,
        "kind": ode.teacher,
        "dtype": config.teacher_model.dtype,
        "latent": list(latent),
    }
    if ode.teacher == "causal":
        rollout = config.rollout
        recipe["context"] = "real videos"
        recipe["videos"] = source.records
        recipe["chunks"] = [rollout.chunk, rollout.first_frame_alone, rollout.window, rollout.sink, rollout.positions]
    return recipe


def _wait() -> None:
    """Waits for the other processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("ODE pairs made")


def pair_iterator(
    source: ode_pairs.PairSource,
    config: TrainConfig,
    prompts: Source,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Endless shuffled batches of pairs.

    Args:
      source: the pairs.
      config: the configuration; its seed determines the order, its batch size counts all processes.
      prompts: source of the texts (and videos), the same as for `open_pairs`.
      process_index: index of this process.
      process_count: number of processes that share a batch; each reads only its own contiguous rows.

    Returns:
      An iterator over dictionaries: trajectory float32 [B, S, F, H, W, C], text float32 [B, L, D] and, with a causal
      teacher, context float32 [B, F, H, W, C], the real videos.

    Raises:
      ValueError: see `pipeline.row_iterator`.
    """
    causal = config.ode.teacher == "causal"

    def collate(rows):
        trajectory = np.stack([source[i]["trajectory"] for i in rows])
        entry = prompts.clip if causal else prompts.prompt
        batch = {"text": np.stack([entry(int(i))[1] for i in rows])}
        if causal:
            return batch | {"trajectory": trajectory[:, :-1], "context": trajectory[:, -1]}
        return batch | {"trajectory": trajectory}

    processes = {"process_index": process_index, "process_count": process_count}
    return pipeline.row_iterator(
        len(source), collate, batch_size=config.batch_size, seed=config.seed, name="pairs", **processes
    )
