"""Where activations live on a device mesh: named axes, resolved by one table. Without a mesh nothing happens.

The residual stream is split over batch and over the tokens of each frame. Self-attention needs all tokens: meanwhile
the heads are split instead, which XLA does by an all-to-all (arXiv 2309.14509); where they are too few,
`context` splits the queries and every device has all keys of its heads. Cross-attention leaves the tokens
split, as the prompt is on every device.
"""

import math
from collections.abc import Iterable

import jax
from jax.sharding import PartitionSpec

# name of an array's axis -> mesh axes
AXES = {
    "batch": ("data", "fsdp"),
    "tokens": ("context",),
    "heads": ("tensor", "context"),
    "features": ("tensor",),
    "embed": ("fsdp", "context"),
    "columns": ("context", "tensor"),
}
_WHOLE_OTHERWISE = ("batch", "columns")


def platform() -> str:
    """What the program is for, "cpu", "gpu" or "tpu": the devices of the mesh of `jax.set_mesh`, else the backend.

    Devices that are compiled for need not be there.
    """
    backend = jax.default_backend()
    return getattr(jax.sharding.get_abstract_mesh().abstract_device, "platform", backend)


def mesh_axes(name: str | None, size: int) -> tuple[str, ...] | None:
    """Mesh axes (of the mesh of `jax.set_mesh`) that split an axis of `size`; None if nothing does.

    A batch (a prompt on its own) or columns of a picture that do not divide are not split, and heads that `tensor`
    alone divides are split over that alone.

    Raises:
      ValueError: if another axis does not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in AXES.get(name, ()) if mesh.shape.get(axis, 1) > 1)
    split = math.prod(mesh.shape[axis] for axis in axes)
    if size % split == 0:
        return axes or None
    if name in _WHOLE_OTHERWISE:
        return None
    if name == "heads" and size % mesh.shape.get("tensor", 1) == 0:
        return mesh_axes("features", size)
    wanted = " x ".join(f"mesh.{axis}" for axis in axes)
    raise ValueError(f"{wanted} is {split}: it must divide the {size} {name}")


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Tells XLA how `x` is split: a name of `AXES`, or None for whole, for each of its axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, *names))


def spec(shape: tuple[int, ...], *names: str | None) -> PartitionSpec:
    """How the mesh of `jax.set_mesh` splits an array whose axes have these names."""
    return shortest_spec(mesh_axes(name, size) for name, size in zip(names, shape, strict=True))


def shortest_spec(axes: Iterable[str | tuple[str, ...] | None]) -> PartitionSpec:
    """A spec without trailing None, as XLA gives it: in other words the same place would be another program's."""
    axes = list(axes)
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def _splits_queries(heads: int) -> bool:
    """Whether `context` splits the queries of self-attention, because it does not divide the heads."""
    mesh = jax.sharding.get_abstract_mesh()
    context, tensor = (mesh.shape.get(axis, 1) for axis in ("context", "tensor"))
    return context > 1 and heads % (context * tensor) != 0


def own_queries(q: jax.Array, groups: int) -> jax.Array:
    """Queries [B, T, N, D] of self-attention as its kernel takes them, split over `context` where the heads are not.

    Raises:
      ValueError: if that would split several groups of queries, which see different keys.
    """
    if not _splits_queries(q.shape[2]):
        return q
    if groups > 1:
        mesh = jax.sharding.get_abstract_mesh()
        split = mesh.shape["context"] * mesh.shape.get("tensor", 1)
        raise ValueError(f"mesh.tensor x mesh.context is {split}: it must divide the {q.shape[2]} heads")
    return constrain(q, "batch", "tokens", "heads", None)


def all_queries(y: jax.Array) -> jax.Array:
    """What attention gave for `own_queries`, whole in its tokens."""
    return constrain(y, "batch", None, "heads", None) if _splits_queries(y.shape[2]) else y


def attention_axes(split: str, queries: int, heads: int) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Mesh axes of a kernel's queries and heads; what `context` splits is `split`, see `attention.attend`."""
    if split == "none":
        return None, None
    if split == "tokens" or _splits_queries(heads):
        return mesh_axes("tokens", queries), mesh_axes("features", heads)
    return None, mesh_axes("heads", heads)


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
