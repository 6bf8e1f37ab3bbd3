"""Sharding of a training run's state and batches, by the table in `parallel/params.py`.

XLA does the partitioning: programs are written for one device and jitted with shardings.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sf_jax.config import MeshConfig, TrainConfig
from sf_jax.models import partition
from sf_jax.parallel.params import names_of, tree_shardings

MESH_AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = partition.AXES["batch"]

HOST_MEMORY = "pinned_host"


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The device mesh `data, fsdp, context, tensor` with automatic axes.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    free = [i for i, size in enumerate(sizes) if size == -1]
    known = math.prod(size for size in sizes if size != -1)
    if len(free) == 1 and known > 0 and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        wanted = ", ".join(f"mesh.{axis}={getattr(config, axis)}" for axis in MESH_AXES)
        raise ValueError(f"{wanted}: the sizes must multiply to the {len(devices)} devices (one may be -1)")
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def frozen_shardings(frozen: dict, mesh: Mesh, offload: Sequence[str] = ()) -> dict:
    """Shardings of frozen networks; those in `offload` keep the kernels of their blocks in host memory."""
    found = tree_shardings(frozen, mesh)
    return found | {name: offloaded(found[name]) for name in offload if name in found}


def offloaded(shardings: dict) -> dict:
    """The shardings of a network with its blocks' kernels, nearly all of its memory, on the host."""

    def leaf(path, target):
        names = names_of(path)
        return target.with_memory_kind(HOST_MEMORY) if names[0] == "blocks" and names[-1] == "kernel" else target

    return jax.tree_util.tree_map_with_path(leaf, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis over all data-parallel devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Replicates on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put(tree, shardings):
    """Places parameters, or a state, with `shardings`; every process must have all of it in host memory."""
    return jax.tree.map(_place, tree, shardings)


def put_whole(tree, mesh: Mesh):
    """Replicates arrays on every device."""
    return jax.tree.map(lambda x: _place(x, replicated(mesh)), tree)


def put_batch(batch: dict, mesh: Mesh) -> dict:
    """Places a batch; every process passes its own rows, the first process the first ones."""
    split, count = batch_sharding(mesh), jax.process_count()
    rows = {name: np.asarray(x) for name, x in batch.items()}
    # Passes the global shape explicitly; JAX would infer a wrong one for meshes that split a process's rows.
    return {
        name: jax.make_array_from_process_local_data(split, x, (len(x) * count, *x.shape[1:]))
        for name, x in rows.items()
    }


def _place(x, target: NamedSharding) -> jax.Array:
    """Places an array on devices of one or several processes; each process places its parts."""
    if jax.process_count() == 1 or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, target)
    return jax.make_array_from_callback(x.shape, target, lambda index: np.asarray(x)[index])


def check_config(config: TrainConfig, mesh: Mesh) -> None:
    """Checks that the mesh divides everything that it splits.

    Raises:
      ValueError: if it does not; names the mesh axes and what they must divide.
    """
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if config.batch_size % (parts * config.accumulate):
        raise ValueError(
            f"batch_size is {config.batch_size}: it must be a multiple of mesh.data x mesh.fsdp x accumulate = "
            f"{parts} x {config.accumulate}"
        )
    context, tensor = mesh.shape["context"], mesh.shape["tensor"]
    if isinstance(mesh, Mesh) and not _rows_are_own(mesh, parts):
        raise ValueError(
            f"mesh.context x mesh.tensor is {context * tensor}: it must divide the number of devices of each process, "
            "which reads rows of the batch of its own"
        )
    rows, columns = config.model.grid(config.data.height, config.data.width)
    if rows * columns % context:
        raise ValueError(f"mesh.context is {context}: it must divide the {rows * columns} tokens of a frame")
    for name, model in (("model", config.model), ("teacher", config.teacher_model), ("critic", config.critic_model)):
        if model.num_heads % (context * tensor):
            raise ValueError(
                f"mesh.context x mesh.tensor is {context * tensor}: it must divide {name}.num_heads, {model.num_heads}"
            )


def _rows_are_own(mesh: Mesh, parts: int) -> bool:
    """Whether, of a batch in `parts` parts, process i of P holds exactly the i-th of P equal shares."""
    processes = sorted({device.process_index for device in mesh.devices.flat})
    share = parts // len(processes)
    if share * len(processes) != parts:
        return False
    places = batch_sharding(mesh).devices_indices_map((parts,))
    return all(processes[(index[0].start or 0) // share] == device.process_index for device, index in places.items())


def may_hang(mesh: Mesh) -> bool:
    """Whether processes may run their collectives in different orders, and wait for each other forever.

    XLA's CPU backend may start a collective while an earlier, independent loop that contains collectives still runs.
    """
    processes = {device.process_index for device in mesh.devices.flat}
    return len(processes) > 1 and mesh.devices.flat[0].platform == "cpu"


def check_batch(batch_size: int, mesh: Mesh, name: str = "batch_size") -> None:
    """Checks that a batch can be split evenly."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % parts:
        raise ValueError(f"{name} is {batch_size}: it must be a multiple of mesh.data x mesh.fsdp = {parts}")
