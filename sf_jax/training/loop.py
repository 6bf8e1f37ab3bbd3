"""The training loop: prepare or resume, update, log, checkpoint, export."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp

from sf_jax.config import TrainConfig
from sf_jax.files import check_writable
from sf_jax.training import checkpoint, sharding
from sf_jax.training.metrics import Log
from sf_jax.training.stages import Stage, open_stage, package_of
from sf_jax.training.state import TrainState
from sf_jax.training.step import leaf_names, new_state, student_params
from sf_jax.weights.package import save_package


def train(config: TrainConfig, workdir: Path | str) -> Path:
    """Runs a stage to its end, continuing from the newest checkpoint in `workdir`.

    Args:
      config: what to run.
      workdir: folder of checkpoints, log and exported weights.

    Returns:
      The exported weights, `workdir/teacher.safetensors` or `workdir/student.safetensors`.

    Raises:
      ValueError: on anything that the user must change; nothing in `workdir` is lost.
      FloatingPointError: if a loss or gradient is not finite.
    """
    workdir = check_writable(workdir, "workdir")
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch_size, mesh)
    manager = checkpoint.open_manager(workdir, config)
    try:
        stage = open_stage(config, workdir, mesh, fresh=manager.latest_step() is None)
        state, start = _start(config, stage, mesh, manager)
        state = _run(config, stage, mesh, manager, state, start, workdir)
    finally:
        manager.close()
    package = package_of(config, student_params(state.model), stage.frozen)
    path = workdir / f"{package.kind}.safetensors"
    save_package(path, package)
    return path


def _start(config: TrainConfig, stage: Stage, mesh, manager) -> tuple[TrainState, int]:
    """The state to go on from, placed on the mesh, and its step."""

    def fresh(params, critic):
        return new_state(config, params, critic)

    given = (stage.params, stage.critic)
    shapes = jax.eval_shape(fresh, *given)
    shardings = sharding.tree_shardings(shapes, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    restored = checkpoint.restore(manager, abstract, config)
    if restored is None:
        given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), given)
        return jax.jit(fresh, out_shardings=shardings)(*given), 0
    step, state, data_state = restored
    stage.iterator.set_state(data_state)
    print(f"resuming from step {step}", flush=True)
    return state, step


def compile_updates(stage: Stage, mesh, state: TrainState) -> list:
    """(name, jitted update with donated state, whether an iteration runs it) of the stage."""
    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    frozen_shardings = sharding.tree_shardings(stage.frozen, mesh)
    everywhere, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    batch_shardings = dict.fromkeys(stage.keys, split) | dict.fromkeys(stage.constants, everywhere)
    return [
        (
            name,
            jax.jit(
                update,
                in_shardings=(state_shardings, frozen_shardings, batch_shardings),
                out_shardings=(state_shardings, everywhere),
                donate_argnums=0,
            ),
            due,
        )
        for name, update, due in stage.updates
    ]


def _run(config: TrainConfig, stage: Stage, mesh, manager, state: TrainState, start: int, workdir: Path) -> TrainState:
    """All iterations from `start`."""
    updates = compile_updates(stage, mesh, state)
    frozen = jax.device_put(stage.frozen, sharding.tree_shardings(stage.frozen, mesh))
    constants = jax.device_put(stage.constants, sharding.replicated(mesh))
    split = sharding.batch_sharding(mesh)
    names = {prefix: leaf_names(state.model.params) for prefix in ("", "generator_")}
    names |= {"critic_": leaf_names(state.critic.params)} if state.critic is not None else {}
    skip = config.on_nonfinite == "skip"
    log = Log(workdir / "log.jsonl", start, config.steps, config.log_every, config.stage, skip, names)
    began = time.perf_counter()
    try:
        for step in range(start, config.steps):
            metrics = {}
            for _, update, runs in updates:
                if not runs(step):
                    continue
                batch = next(stage.iterator)
                batch = {key: jax.device_put(batch[key], split) for key in stage.keys}
                state, new = update(state, frozen, batch | constants)
                metrics |= new
            due = (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps
            log.step(step + 1, metrics, due)  # before the save: what is not finite must not replace a good checkpoint
            if due:
                checkpoint.save(manager, step + 1, state, stage.iterator.get_state(), config)
    except FloatingPointError as error:
        manager.wait_until_finished()
        newest = manager.latest_step()
        kept = "there is no checkpoint yet" if newest is None else f"checkpoint {newest} in {workdir} is good"
        raise FloatingPointError(f"{error}; {kept}. Lower a learning rate, or set on_nonfinite to 'skip'") from None
    finally:
        log.close()
    manager.wait_until_finished()
    if config.steps > start:
        print(f"{config.stage}: {config.steps - start} steps in {time.perf_counter() - began:.0f} s", flush=True)
    return state
