"""What a run will need, found without running it: `--dry_run` counts, `--compile_only` compiles for a TPU slice."""

import dataclasses
import math
import time
from collections.abc import Iterator

import jax
import numpy as np

from sf_jax.config import TrainConfig
from sf_jax.topology import Chip, chip_of, tpu_devices
from sf_jax.training import hlo, sharding
from sf_jax.training.abstract import AbstractRun, abstract_run, bytes_per_device
from sf_jax.training.programs import Program, countable, model_flops, rate, rollout_trips
from sf_jax.training.stages import updates_of

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Compiled:
    """An update compiled for one topology; all figures are those of a chip and one call.

    Attributes:
      name: of the update.
      rate: how often an iteration runs it.
      arguments: bytes of state, frozen networks and batch.
      temporary: bytes that it needs meanwhile.
      flops: arithmetic of the model, recomputation left out.
      work: arithmetic with what `remat` recomputes.
      links: bytes sent to other chips, by operation.
      traffic: bytes read from and written to memory.
      seconds: how long compiling took.
      host: bytes of the arguments in the host's memory.
    """

    name: str
    rate: float
    arguments: int
    temporary: int
    flops: float
    work: float
    links: dict[str, float]
    traffic: float
    seconds: float
    host: int = 0

    @property
    def memory(self) -> int:
        """Bytes of a chip while it runs."""
        return self.arguments + self.temporary

    @property
    def sent(self) -> float:
        """Bytes sent to other chips."""
        return sum(self.links.values())

    def bounds(self, chip: Chip) -> dict[str, float]:
        """Seconds that arithmetic, memory and links take, each at its peak."""
        return {
            "arithmetic": self.work / chip.flops,
            "memory": self.traffic / chip.bandwidth,
            "links": self.sent / chip.links,
        }


def for_tpu(config: TrainConfig) -> TrainConfig:
    """The config with the attention that "auto" is on TPUs; there is none here to ask."""
    models = {name: getattr(config, name) for name in ("model", "teacher", "critic") if getattr(config, name)}
    auto = {name: dataclasses.replace(m, attention="splash") for name, m in models.items() if m.attention == "auto"}
    return dataclasses.replace(config, **auto)


def compile_for(config: TrainConfig, topology: str) -> Iterator[Compiled]:
    """Compiles every update of a run for a TPU slice, one after the other.

    Args:
      config: of the run; its mesh must fit the slice.
      topology: such as "v5p:4x4x4".

    Raises:
      ValueError: if libtpu is missing, does not know the topology, or the mesh does not fit.
    """
    chip_of(topology)
    mesh = sharding.make_mesh(config.mesh, list(tpu_devices(topology)))
    run = abstract_run(for_tpu(config), mesh)
    flops, work = flops_of(run), flops_of(run, recompute=True)
    for program in run.programs:
        yield compile_program(program, run, flops[program.name], work[program.name])


def compile_program(program: Program, run: AbstractRun, flops: float, work: float) -> Compiled:
    """Compiles one update and reads what the compiler says; `flops` and `work` are those of all chips together."""
    began = time.perf_counter()
    with jax.set_mesh(run.mesh):
        compiled = program.update.lower(*run.arguments).compile()
    memory = compiled.memory_analysis()
    moved = hlo.traffic(compiled.as_text(), rollout_trips(run.config))
    return Compiled(
        name=program.name,
        rate=rate(program.due, run.config.steps),
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        flops=flops / run.mesh.size,
        work=work / run.mesh.size,
        links=moved.links,
        traffic=moved.memory,
        seconds=time.perf_counter() - began,
        host=memory.host_argument_size_in_bytes,
    )


def flops_of(run: AbstractRun, recompute: bool = False) -> dict[str, float]:
    """Arithmetic of one call of every update, all chips together, by name; see `countable` for `recompute`."""
    plain = countable(run.config, recompute)
    return model_flops(plain, updates_of(plain, run.media), run.arguments)


def step_bounds(rows: list[Compiled], chip: Chip) -> dict[str, float]:
    """Seconds of an iteration by what bounds it, over all updates as often as they run."""
    total: dict[str, float] = {}
    for row in rows:
        for name, seconds in row.bounds(chip).items():
            total[name] = total.get(name, 0.0) + row.rate * seconds
    return total


def compile_report(config: TrainConfig, topology: str) -> Iterator[str]:
    """Lines of `--compile_only`."""
    chip, rows = chip_of(topology), []
    sizes = ", ".join(f"{axis} {getattr(config.mesh, axis)}" for axis in sharding.MESH_AXES)
    yield f"{topology}, mesh {sizes}; batch {config.batch_size}, accumulate {config.accumulate}"
    titles = ("update", "GiB a chip", "arguments", "temporary", "PFLOP a chip", "and again")
    titles += ("GB sent", "TB of memory", "compiled in")
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    for row in compile_for(config, topology):
        rows.append(row)
        gib = " | ".join(f"{size / GIB:.2f}" for size in (row.memory, row.arguments, row.temporary))
        petaflop = f"{row.flops / 1e15:.3f} | {(row.work - row.flops) / 1e15:.3f}"
        moved = f"{row.sent / 1e9:.1f} | {row.traffic / 1e12:.2f}"
        yield f"| {row.name} | {gib} | {petaflop} | {moved} | {row.seconds:.0f} s |"
    for row in rows:
        sent = ", ".join(f"{kind} {size / 1e9:.1f} GB" for kind, size in sorted(row.links.items()))
        yield f"{row.name} sends: {sent or 'nothing'}"
        if row.host:
            yield f"{row.name} reads {row.host / GIB:.2f} GiB a chip from the host, which the bounds below leave out"
    fits = max(row.memory for row in rows) <= chip.memory
    yield f"memory of a chip: {chip.memory / GIB:.0f} GiB, so it {'fits' if fits else 'does NOT fit'}"
    found = step_bounds(rows, chip)
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.items())
    top = max(found, key=found.get)
    yield f"an iteration at the chip's peaks: {parts}; at least {found[top]:.2f} s, bound by {top}"


def describe(config: TrainConfig, devices: list | None = None) -> Iterator[str]:
    """Lines of `--dry_run`: networks, memory, arithmetic and where every array goes.

    A mesh whose sizes are all given need not be here.
    """
    sizes = [getattr(config.mesh, axis) for axis in sharding.MESH_AXES]
    here = jax.devices() if devices is None else devices
    if min(sizes) > 0 and math.prod(sizes) != len(here):
        auto = (jax.sharding.AxisType.Auto,) * len(sizes)
        mesh = jax.sharding.AbstractMesh(tuple(sizes), sharding.MESH_AXES, axis_types=auto)
        kind = "devices that are not here"
    else:
        mesh, kind = sharding.make_mesh(config.mesh, here), here[0].device_kind
    run = abstract_run(config, mesh)
    yield f"stage {config.stage}, {config.steps} steps of batch {config.batch_size} on {mesh.size} x {kind}"
    yield "mesh " + ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    networks = {"student" if config.stage == "distill" else config.stage: run.state.model.params}
    if run.state.critic is not None:
        networks["critic"] = run.state.critic.params
    networks |= {f"{name} (frozen, {config.frozen_dtype})": tree for name, tree in run.frozen.items()}
    for name, tree in networks.items():
        yield f"{name}: {_count(tree):,} parameters, {_mib(bytes_per_device(tree))} a device"
    parts = {"state": run.state, "frozen": run.frozen, "batch": run.batch}
    told = ", ".join(f"{name} {_mib(bytes_per_device(tree))}" for name, tree in parts.items())
    yield f"memory of a device: {told}, together {_mib(bytes_per_device(run.arguments))}, besides what an update needs"
    if config.offload:
        yield f"memory of the host: {_mib(bytes_per_device(run.frozen, on_host=True))} for each of its devices"
    flops = flops_of(run)
    rates = {program.name: rate(program.due, config.steps) for program in run.programs}
    for name, count in flops.items():
        yield f"update {name}: {count:.4g} FLOP, in {rates[name]:.3g} of the iterations"
    total = sum(flops[name] * rates[name] for name in flops)
    yield f"an iteration: {total:.4g} FLOP, {total / mesh.size:.4g} a device"
    yield "where the parameters go (array, shape, axes of the mesh, part of a device), and with them averages, moments:"
    trees = {"model": run.state.model.params} | run.frozen
    trees |= {"critic": run.state.critic.params} if run.state.critic is not None else {}
    for name, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            where = "/".join((name, *(str(part.key) for part in path)))
            spec = ", ".join(_axes(axis, mesh) for axis in leaf.sharding.spec) or "-"
            yield f"  {where:58s} {_size(leaf.shape):>18s}  {spec:32s} {_size(leaf.sharding.shard_shape(leaf.shape))}"


def _axes(axis, mesh) -> str:
    names = () if axis is None else (axis,) if isinstance(axis, str) else axis
    return "x".join(name for name in names if mesh.shape[name] > 1) or "-"


def _size(shape) -> str:
    return "x".join(str(size) for size in shape) or "1"


def _count(tree) -> int:
    return int(sum(math.prod(x.shape) for x in jax.tree.leaves(tree)))


def _mib(size: float) -> str:
    return f"{np.round(size / 2**20, 1):,} MiB"
