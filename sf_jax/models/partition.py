"""Where activations live on a device mesh: named axes, resolved by one table. Without a mesh nothing happens.

The residual stream is split over batch and over the tokens of each frame. Self-attention needs all tokens: meanwhile
the heads are split instead, which XLA does by an all-to-all (arXiv 2309.14509). Cross-attention leaves the tokens
split, as the prompt is on every device.
"""

import math

import jax
from jax.sharding import PartitionSpec

# name of an array's axis -> mesh axes
AXES = {
    "batch": ("data", "fsdp"),
    "tokens": ("context",),
    "heads": ("tensor", "context"),
    "features": ("tensor",),
    "embed": ("fsdp", "context"),
}


def platform() -> str:
    """What the program is for, "cpu", "gpu" or "tpu": the devices of the mesh of `jax.set_mesh`, else the backend.

    Devices that are compiled for need not be there.
    """
    backend = jax.default_backend()
    return getattr(jax.sharding.get_abstract_mesh().abstract_device, "platform", backend)


def mesh_axes(name: str | None, size: int) -> tuple[str, ...] | None:
    """Mesh axes (of the mesh of `jax.set_mesh`) that split an axis of `size`; None if nothing does.

    A batch that does not divide (a prompt on its own) is not split.

    Raises:
      ValueError: if another axis does not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in AXES.get(name, ()) if mesh.shape.get(axis, 1) > 1)
    split = math.prod(mesh.shape[axis] for axis in axes)
    if size % split == 0:
        return axes or None
    if name == "batch":
        return None
    wanted = " x ".join(f"mesh.{axis}" for axis in axes)
    raise ValueError(f"{wanted} is {split}: it must divide the {size} {name}")


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Tells XLA how `x` is split: a name of `AXES`, or None for whole, for each of its axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = PartitionSpec(*(mesh_axes(name, size) for name, size in zip(names, x.shape, strict=True)))
    return jax.lax.with_sharding_constraint(x, spec)


def fetch(param: jax.Array) -> jax.Array:
    """A parameter in the memory of the device, also where the host keeps it."""
    if jax.typeof(param).memory_space == jax.memory.Space.Host:
        return jax.device_put(param, jax.memory.Space.Device)
    return param


def gather(kernel: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """A parameter for its use, whole in "embed": left to itself, XLA moves windows of it into many thin products."""
    return constrain(kernel, *(None if name == "embed" else name for name in names))


def scatter(grad: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """The gradient of a parameter that `gather` gave: summed over the devices that it is then split over."""
    return constrain(gather(grad, names), *names)


def _tokens_are_split() -> bool:
    return jax.sharding.get_abstract_mesh().shape.get("context", 1) > 1


def merge_tokens(x: jax.Array) -> jax.Array:
    """[B, F, P, ...] to [B, F*P, ...] without moving tokens between devices: where they are split, P comes first."""
    if _tokens_are_split():
        x = x.swapaxes(1, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def split_tokens(x: jax.Array, frames: int) -> jax.Array:
    """The inverse of `merge_tokens`."""
    if _tokens_are_split():
        return x.reshape(x.shape[0], -1, frames, *x.shape[2:]).swapaxes(1, 2)
    return x.reshape(x.shape[0], frames, -1, *x.shape[2:])
