"""The training loop: prepare or resume, update, log, checkpoint, export."""

import contextlib
import dataclasses
import operator
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sf_jax.config import TrainConfig
from sf_jax.distributed import by_first, check_shared
from sf_jax.files import check_writable, locked, remove_leftovers
from sf_jax.training import sharding
from sf_jax.training.checkpoint import Checkpoints, SaveError, one_line_errors
from sf_jax.training.lora import resolved
from sf_jax.training.metrics import Log, measured_flops, peak_flops
from sf_jax.training.programs import Program, compile_all, countable, jit_updates, model_flops, rate
from sf_jax.training.samples import WriteSamples, sampler
from sf_jax.training.sinks import check_packages, open_sinks
from sf_jax.training.stages import RECORDS, Stage, open_stage, package_of, updates_of
from sf_jax.training.state import TrainState
from sf_jax.training.step import leaf_names, new_state, student_params, whole_params
from sf_jax.training.stop import StopRequest, stop_on_signals
from sf_jax.weights import cards
from sf_jax.weights.package import Package, save_package

# Shorter runs skip the FLOP count and the peak measurement on devices of unknown peak.
_WORTH_MEASURING = 100


def train(
    config: TrainConfig, workdir: Path | str, write: WriteSamples | None = None, allow_config_change: bool = False
) -> Path:
    """Runs a stage to its end, resuming from the newest intact checkpoint in `workdir`.

    SIGTERM and Ctrl-C end it after the current step, with a checkpoint.

    Args:
      config: the run's configuration.
      workdir: folder of checkpoints, log and exported weights.
      write: writes sample videos; needed if `config.log.sample_every` is set.
      allow_config_change: resume even if fields of the config differ from the checkpoint's.

    Returns:
      The exported weights, `workdir/teacher.safetensors`, `causal.safetensors` or `student.safetensors`.

    Raises:
      ValueError: for anything that the user must change; nothing in `workdir` is lost.
      FloatingPointError: if a loss or gradient is not finite.
      OSError: if something cannot be written; names the last good checkpoint.
      Stopped: a `SystemExit`: code 0 if SIGTERM came and a checkpoint was saved, 143 if there was nothing to save yet,
        130 after Ctrl-C.
    """
    config = resolved(config)
    workdir = check_writable(workdir, "workdir")
    check_shared(workdir, "workdir")
    check_packages(config)
    if config.log.sample_every and write is None:
        raise ValueError(f"log.sample_every is {config.log.sample_every}: nothing here can write samples, it must be 0")
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_config(config, mesh)
    if sharding.may_hang(mesh):
        print("several processes on CPUs may hang: start one, which uses all cores of its machine", flush=True)
    with _alone(workdir):
        by_first(lambda: remove_leftovers(workdir))
        state, frozen = _to_the_end(config, workdir, mesh, write, allow_config_change)
        params = whole_params(config, student_params(state.model), frozen)
        package = package_of(config, _host(params))
        path = workdir / f"{package.kind}.safetensors"
        # The other processes wait: if one exited, the first would be terminated while it writes.
        by_first(lambda: _write_weights(path, package))
    return path


def _write_weights(path: Path, package: Package) -> None:
    """Writes the weights of a finished run, and their model card unless there is another README.md."""
    save_package(path, package)
    sizes = package.config
    contents = [f"{package.kind} of {sizes.num_layers} layers, dim {sizes.dim}"]
    try:
        run = cards.read_run(path.parent)
        cards.write_card(cards.Card(path.stem, "official", contents, package, run), path.parent, path.stem)
    except OSError as error:  # the weights, which matter, have been written
        print(f"no model card was written: {error}", flush=True)


def _to_the_end(
    config: TrainConfig, workdir: Path, mesh: Mesh, write: WriteSamples | None, allow_config_change: bool
) -> tuple[TrainState, dict]:
    """Starts or resumes a run and runs its remaining iterations; returns the last state and the frozen networks."""
    with stop_on_signals() as request, one_line_errors(), Checkpoints(workdir, config) as checkpoints:
        changed = checkpoints.check_config(allow_config_change)
        for line in changed:
            print(f"config changed: {line}", flush=True)
        stage = open_stage(config, workdir, mesh, fresh=not checkpoints.agreed_steps())
        state, start, carried, others = _start(config, stage, mesh, checkpoints, allow_config_change)
        if start > config.steps:
            raise ValueError(
                f"steps is {config.steps}: {workdir} holds step {start}; use another workdir or more steps"
            )
        changed += others
        stage = dataclasses.replace(stage, params=None, critic=None, adapters={})  # the state has them now
        log = _open_log(config, state, workdir, start, carried)
        if changed:
            log.note(start, config_changed=changed)
        try:
            state = _run(config, stage, mesh, state, start, checkpoints, log, request, workdir, write)
        except FloatingPointError as error:
            advice = "lower a learning rate, or set on_nonfinite to 'skip'"
            raise FloatingPointError(f"{error}; {checkpoints.last_good()}: {advice}") from error
        except SaveError:  # already names the last good checkpoint
            raise
        except OSError as error:
            raise OSError(f"{error}; {checkpoints.last_good()}") from error
        finally:
            log.close()
        checkpoints.wait()
    return state, stage.frozen


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    """Keeps a second run out of the workdir."""
    with contextlib.ExitStack() as held:
        by_first(lambda: held.enter_context(locked(workdir, "workdir")))
        yield


def _start(config: TrainConfig, stage: Stage, mesh, checkpoints: Checkpoints, allow_config_change: bool):
    """The initial or restored state on the mesh, its step, metrics not yet logged, and other changes."""

    def fresh(params, critic, adapters):
        return new_state(config, params, critic, adapters)

    given = (stage.params, stage.critic, stage.adapters)
    shapes = jax.eval_shape(fresh, *given)
    shardings = sharding.tree_shardings(shapes, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    restored = checkpoints.restore(abstract, allow_config_change)
    if restored is None:
        return jax.jit(fresh, out_shardings=shardings)(*given), 0, {}, []
    step, state, about = restored
    others = _changed_inputs(config, about["data"].get("digests"), stage.digests, step, allow_config_change)
    try:
        stage.iterator.set_state(about["data"].get("position"))
    except Exception as error:  # Iterators raise many types for the state of another data pipeline.
        raise ValueError(
            f"the data position of step {step} does not fit the data of this config ({error}): use the old data.*, "
            "batch_size and seed, or another --workdir"
        ) from error
    print(f"resuming from step {step}", flush=True)
    return state, step, about["log"], others


def _changed_inputs(
    config: TrainConfig, saved: dict[str, str] | None, digests: dict[str, str], step: int, allow_changes: bool
) -> list[str]:
    """Data and weights whose hashes differ from those of a checkpoint.

    Raises:
      ValueError: if there are any, and `allow_changes` is not set.
    """
    changed = []
    for field, digest in digests.items() if saved is not None else ():
        if field == RECORDS and field not in saved:  # a checkpoint of an earlier version
            print(f"step {step} was saved without a hash of its records: they are taken to be the same", flush=True)
        elif saved.get(field) != digest:
            changed.append(f"{field}: {saved.get(field)} -> {digest}")
            name = "data.dir" if field == RECORDS else field
            kind = "data" if name == "data.dir" else "weights"
            if not allow_changes:
                raise ValueError(
                    f"{name} is {operator.attrgetter(name)(config)}: step {step} was trained with other {kind}; use "
                    f"the old {kind}, or --allow_config_change to go on with these"
                )
    return changed


def _open_log(config: TrainConfig, state: TrainState, workdir: Path, start: int, carried: dict) -> Log:
    names = {prefix: leaf_names(state.model.params) for prefix in ("", "generator_")}
    names |= {"critic_": leaf_names(state.critic.params)} if state.critic is not None else {}
    return Log(
        workdir / "log.jsonl" if jax.process_index() == 0 else workdir / f"log.{jax.process_index()}.jsonl",
        start,
        config.steps,
        config.log_every,
        config.stage,
        sinks=open_sinks(config, workdir, start),
        leaf_names=names,
        skip=config.on_nonfinite == "skip",
        carried=carried,
        frames=config.batch_size * statistics.mean(config.rollout_frames or (config.data.frames,)),
    )


def compile_updates(stage: Stage, mesh: Mesh, state: TrainState, offload: Sequence[str] = ()) -> list[Program]:
    """The jitted updates of the stage; the host keeps the block kernels of the frozen networks in `offload`."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    frozen = sharding.frozen_shardings(stage.frozen, mesh, offload)
    updates = jit_updates(stage.updates, stage.keys, stage.constants, mesh, shardings, frozen)
    return [Program(update, mesh) for update in updates]


def _run(
    config: TrainConfig,
    stage: Stage,
    mesh: Mesh,
    state: TrainState,
    start: int,
    checkpoints: Checkpoints,
    log: Log,
    request: StopRequest,
    workdir: Path,
    write: WriteSamples | None,
) -> TrainState:
    """Runs all iterations from `start`."""
    programs = compile_updates(stage, mesh, state, config.offload)
    frozen = sharding.put(stage.frozen, sharding.frozen_shardings(stage.frozen, mesh, config.offload))
    constants = sharding.put_whole(stage.constants, mesh)
    sample = sampler(config, stage.source, frozen, mesh, workdir, write)
    began = time.perf_counter()
    for step in range(start, config.steps):
        metrics = {}
        for program in programs:
            if not program.due(step):
                continue
            batch = next(stage.iterator)
            batch = sharding.put_batch({key: batch[key] for key in stage.keys}, mesh) | constants
            if not program.compiled:  # Compiles all needed programs now, so that one that does not fit fails early.
                with log.clock_stopped():
                    needed = [each for each in programs if any(map(each.due, range(step, config.steps)))]
                    compile_all(needed, state, frozen, batch)
                    _tell_speed(config, log, stage, programs, mesh, (state, frozen, batch))
            state, new = program(state, frozen, batch)
            metrics |= new
        request.busy = True
        log.step(step + 1, metrics)
        checkpoints.check()
        stop = request.wanted(step + 1)
        if stop or (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            # `settle` raises if a metric is not finite, so that no good checkpoint is replaced.
            data = {"position": stage.iterator.get_state(), "digests": stage.digests}
            checkpoints.save(step + 1, state, data, log.settle())
        if stop:
            raise request.finish(checkpoints, step + 1, config.grace_seconds)
        with log.clock_stopped():
            sample(step + 1, state)
    checkpoints.wait()
    request.busy = False
    if config.steps > start:
        print(f"{config.stage}: {config.steps - start} steps in {time.perf_counter() - began:.0f} s", flush=True)
    return state


def _tell_speed(config: TrainConfig, log: Log, stage: Stage, programs: list[Program], mesh: Mesh, arguments) -> None:
    """Sets the log's FLOPs and peak for the utilization; the peak is measured if the device's is unknown."""
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    if log.flops_per_step is not None or (peak is None and config.steps < _WORTH_MEASURING):
        return
    plain = countable(config)
    flops = model_flops(updates_of(plain, stage.source.media), arguments)
    if peak is None:
        total = measured_flops(mesh.local_devices, config.model.dtype) * jax.process_count()
    else:
        total = peak * mesh.devices.size
    log.flops_per_step = sum(flops[program.name] * rate(program.due, config.steps) for program in programs)
    log.flops_per_second_peak = total


def _host(params: dict) -> dict:
    """Copies parameters to host memory, including parts on other processes."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(params, tiled=True)
    return jax.device_get(params)
