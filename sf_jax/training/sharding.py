"""How parameters, optimizer state and batches are spread over devices: logical axes, resolved by one table.

Sharding is XLA's: programs are written for one device and jitted with shardings. A parameter without logical axes, or a
logical axis without a rule, is an error, never silently replicated.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sf_jax.config import MeshConfig, TrainConfig
from sf_jax.models import partition

MESH_AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = partition.AXES["batch"]

# logical axis of a parameter -> mesh axes, or None: not split
RULES = {
    "layers": None,
    "embed": ("fsdp", "context"),
    "width": None,
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "patch": None,
    "text": None,
    "time": None,
    "part": None,
    "rank": None,
}

_ATTENTION = {
    **{(name, "kernel"): ("layers", "embed", "heads") for name in "qkv"},
    **{(name, "bias"): ("layers", "heads") for name in "qkv"},
    ("o", "kernel"): ("layers", "heads", "embed"),
    ("o", "bias"): ("layers", "embed"),
    ("norm_q", "scale"): ("layers", "heads"),
    ("norm_k", "scale"): ("layers", "heads"),
}
# parameter path -> logical axes
AXES = {
    **{("blocks", f"{kind}_attn", *path): axes for kind in ("self", "cross") for path, axes in _ATTENTION.items()},
    ("blocks", "ffn_in", "kernel"): ("layers", "embed", "mlp"),
    ("blocks", "ffn_in", "bias"): ("layers", "mlp"),
    ("blocks", "ffn_out", "kernel"): ("layers", "mlp", "embed"),
    ("blocks", "ffn_out", "bias"): ("layers", "embed"),
    ("blocks", "norm3", "scale"): ("layers", "embed"),
    ("blocks", "norm3", "bias"): ("layers", "embed"),
    ("blocks", "modulation"): ("layers", "part", "part", "embed"),
    ("patch_embedding", "kernel"): ("patch", "embed"),
    ("text_in", "kernel"): ("text", "embed"),
    ("time_in", "kernel"): ("time", "embed"),
    ("text_out", "kernel"): ("embed", "width"),
    ("time_out", "kernel"): ("embed", "width"),
    ("time_projection", "kernel"): ("embed", "width"),
    ("head", "kernel"): ("embed", "patch"),
    **{(name, "bias"): ("embed",) for name in ("patch_embedding", "text_in", "time_in")},
    **{(name, "bias"): ("width",) for name in ("text_out", "time_out", "time_projection")},
    ("head", "bias"): ("patch",),
    ("head_modulation",): ("part", "part", "embed"),
    ("ns_coeffs",): ("part",),  # constants of Muon's iteration, part of its state
    # the discriminator's head; its blocks are stacked like layers
    **{("register_blocks", "cross_attn", *path): axes for path, axes in _ATTENTION.items()},
    ("register_blocks", "ffn_in", "kernel"): ("layers", "embed", "mlp"),
    ("register_blocks", "ffn_in", "bias"): ("layers", "mlp"),
    ("register_blocks", "ffn_out", "kernel"): ("layers", "mlp", "embed"),
    ("register_blocks", "ffn_out", "bias"): ("layers", "embed"),
    ("register_blocks", "norm3", "scale"): ("layers", "embed"),
    ("register_blocks", "norm3", "bias"): ("layers", "embed"),
    ("registers",): ("part", "embed"),
    ("register_norm", "scale"): ("embed",),
    ("classifier_norm", "scale"): ("embed",),
    ("classifier_norm", "bias"): ("embed",),
    ("classifier_in", "kernel"): ("embed", "width"),
    ("classifier_in", "bias"): ("width",),
    ("classifier_out", "kernel"): ("embed", "patch"),
    ("classifier_out", "bias"): ("patch",),
}
# adapters of a matrix [layers, in, out]: `down` [layers, in, rank] and `up` [layers, rank, out]
AXES |= {
    (*path, part): (axes[0], axes[1], "rank") if part == "down" else (axes[0], "rank", axes[2])
    for path, axes in list(AXES.items())
    if path[0] == "blocks" and path[-1] == "kernel"
    for part in ("down", "up")
}
# Trees that every device holds whole: Wan's VAE is 0.3 GB in bfloat16.
WHOLE = ("vae",)
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


def logical_axes(path: tuple[str, ...], rank: int) -> tuple[str, ...]:
    """Logical axes of a leaf of the state: that of the parameter whose path ends its own; scalars have none."""
    if rank == 0:
        return ()
    for start in range(len(path)):
        axes = AXES.get(path[start:])
        if axes is not None and len(axes) == rank:
            return axes
    raise ValueError(f"no sharding rule for {'/'.join(path)} of rank {rank}: add its logical axes to sharding.AXES")


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", "")))) for part in path)


def tree_shardings(tree, mesh: Mesh):
    """A `NamedSharding` for every leaf of a tree of parameters, or of a state made of such trees."""

    def leaf(path, value):
        names, spec = _names(path), []
        if names[0] in WHOLE:
            return replicated(mesh)
        for axis, size in zip(logical_axes(names, len(value.shape)), value.shape, strict=True):
            if axis not in RULES:
                raise ValueError(f"logical axis {axis!r} of {'/'.join(names)} has no rule in sharding.RULES")
            target = RULES[axis]
            parts = math.prod(mesh.shape[name] for name in target or ())
            if size % parts:
                wanted = " x ".join(f"mesh.{name}" for name in target)
                raise ValueError(f"{wanted} is {parts}: it must divide {size}, axis {axis!r} of {'/'.join(names)}")
            spec.append(target if target is None or len(target) > 1 else target[0])
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def frozen_shardings(frozen: dict, mesh: Mesh, offload: Sequence[str] = ()) -> dict:
    """Shardings of frozen networks; of those to `offload` the kernels of all blocks are in the host's memory."""
    found = tree_shardings(frozen, mesh)
    return found | {name: offloaded(found[name]) for name in offload if name in found}


def offloaded(shardings: dict) -> dict:
    """The shardings of a network whose blocks' kernels, nearly all of it, are in the host's memory."""

    def leaf(path, target):
        names = _names(path)
        return target.with_memory_kind(HOST_MEMORY) if names[0] == "blocks" and names[-1] == "kernel" else target

    return jax.tree_util.tree_map_with_path(leaf, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over all data-parallel devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put(tree, shardings):
    """Places parameters, or a state, as `shardings` says; every process holds the whole of it in host memory."""
    return jax.tree.map(_place, tree, shardings)


def put_whole(tree, mesh: Mesh):
    """Places arrays whole on every device."""
    return jax.tree.map(lambda x: _place(x, replicated(mesh)), tree)


def put_batch(batch: dict, mesh: Mesh) -> dict:
    """Places a batch: every process gives its own rows, the first process the first ones."""
    split, count = batch_sharding(mesh), jax.process_count()
    rows = {name: np.asarray(x) for name, x in batch.items()}
    # The whole shape is told: inferred from a mesh that `check_config` would refuse, it could be a part of it.
    return {
        name: jax.make_array_from_process_local_data(split, x, (len(x) * count, *x.shape[1:]))
        for name, x in rows.items()
    }


def _place(x, target: NamedSharding) -> jax.Array:
    """An array on devices that may be other processes' too: each process places its parts."""
    if jax.process_count() == 1 or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, target)
    return jax.make_array_from_callback(x.shape, target, lambda index: np.asarray(x)[index])


def check_config(config: TrainConfig, mesh: Mesh) -> None:
    """Refuses meshes that do not divide what the config wants to split.

    Raises:
      ValueError: naming the mesh axes and what they must divide.
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
    """Whether process i of P holds the i-th P-th of a batch in `parts` parts, and no other does."""
    processes = sorted({device.process_index for device in mesh.devices.flat})
    share = parts // len(processes)
    if share * len(processes) != parts:
        return False
    places = batch_sharding(mesh).devices_indices_map((parts,))
    return all(processes[(index[0].start or 0) // share] == device.process_index for device, index in places.items())


def check_batch(batch_size: int, mesh: Mesh, name: str = "batch_size") -> None:
    """Refuses batches that cannot be split evenly."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % parts:
        raise ValueError(f"{name} is {batch_size}: it must be a multiple of mesh.data x mesh.fsdp = {parts}")
