"""The report of `--dry_run`: what a run needs, computed without running or compiling it."""

import math
from collections.abc import Iterator

import jax
import numpy as np

from sf_jax.config import TrainConfig
from sf_jax.training import sharding
from sf_jax.training.abstract import AbstractRun, abstract_run, bytes_per_device
from sf_jax.training.programs import countable, model_flops, rate
from sf_jax.training.stages import updates_of


def flops_of(run: AbstractRun, recompute: bool = False) -> dict[str, float]:
    """FLOPs of one call of every update, over all devices, by name; see `countable` for `recompute`."""
    plain = countable(run.config, recompute)
    return model_flops(updates_of(plain, run.media), run.arguments)


def describe(config: TrainConfig, devices: list | None = None) -> Iterator[str]:
    """Lines of `--dry_run`: networks, memory, FLOPs and the sharding of every array.

    If all sizes of the mesh are given, its devices need not be attached.
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
