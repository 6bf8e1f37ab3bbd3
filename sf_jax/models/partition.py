"""Sharding of activations on a device mesh: named axes, resolved by one table. Without a mesh it has no effect.

The residual stream is sharded over the batch and over the tokens of each frame. Self-attention needs all tokens, so it
shards the heads instead; XLA switches by an all-to-all (arXiv 2309.14509). If there are too few heads, `context` splits
the queries, and every device has all keys of its heads. Cross-attention leaves the tokens split, as every device has
the prompt.
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
    """The platform being compiled for, "cpu", "gpu" or "tpu": that of the mesh of `jax.set_mesh`, else the backend's.

    The mesh's devices need not be attached.
    """
    default = jax.config.jax_default_device
    backend = jax.default_backend() if default is None else getattr(default, "platform", default)
    return getattr(jax.sharding.get_abstract_mesh().abstract_device, "platform", backend)


def compute_capability(device: jax.Device) -> float:
    """The compute capability of an NVIDIA GPU, such as 9.0; 0 for other devices."""
    try:
        return float(getattr(device, "compute_capability", None) or 0)
    except ValueError:  # AMD's GPUs have names such as gfx942
        return 0.0


def mesh_axes(name: str | None, size: int) -> tuple[str, ...] | None:
    """Axes of the mesh of `jax.set_mesh` that split an array axis of `size`; None if none does.

    If the mesh axes do not divide it, a batch (such as a single prompt) or the columns of an image stay whole, and
    heads are split over `tensor` only.

    Raises:
      ValueError: if they do not divide an axis of another kind, or `tensor` does not divide the heads.
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
    """Constrains the sharding of `x`: a name in `AXES` for each axis, or None for an unsplit one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, *names))


def spec(shape: tuple[int, ...], *names: str | None) -> PartitionSpec:
    """The partition spec on the mesh of `jax.set_mesh` of an array whose axes have these names."""
    return shortest_spec(mesh_axes(name, size) for name, size in zip(names, shape, strict=True))


def shortest_spec(axes: Iterable[str | tuple[str, ...] | None]) -> PartitionSpec:
    """A spec without trailing None, as XLA returns it: otherwise an equal sharding would cause a recompilation."""
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
    """Shards the queries [B, T, N, D] of self-attention over `context` if the heads are not split over it.

    Raises:
      ValueError: if this would split several groups of queries, which see different keys.
    """
    if not _splits_queries(q.shape[2]):
        return q
    if groups > 1:
        mesh = jax.sharding.get_abstract_mesh()
        split = mesh.shape["context"] * mesh.shape.get("tensor", 1)
        raise ValueError(f"mesh.tensor x mesh.context is {split}: it must divide the {q.shape[2]} heads")
    return constrain(q, "batch", "tokens", "heads", None)


def all_queries(y: jax.Array) -> jax.Array:
    """Gathers the tokens of the attention output of `own_queries`."""
    return constrain(y, "batch", None, "heads", None) if _splits_queries(y.shape[2]) else y


def attention_axes(split: str, queries: int, heads: int) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Mesh axes that split a kernel's queries and heads; for `split` see `attention.attend`."""
    if split == "none":
        return None, None
    if split == "tokens" or _splits_queries(heads):
        return mesh_axes("tokens", queries), mesh_axes("features", heads)
    return None, mesh_axes("heads", heads)


def fetch(param: jax.Array) -> jax.Array:
    """Moves a parameter to device memory if it is in host memory."""
    if jax.typeof(param).memory_space == jax.memory.Space.Host:
        return jax.device_put(param, jax.memory.Space.Device)
    return param


def gather(kernel: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Gathers a parameter along "embed" for use; otherwise XLA would split the matmul into many thin ones."""
    return constrain(kernel, *(None if name == "embed" else name for name in names))


def scatter(grad: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Reduces the gradient of a gathered parameter over devices and shards it like the parameter."""
    return constrain(gather(grad, names), *names)


def _tokens_are_split() -> bool:
    return jax.sharding.get_abstract_mesh().shape.get("context", 1) > 1


def merge_tokens(x: jax.Array) -> jax.Array:
    """[B, F, P, ...] to [B, F*P, ...] without moving tokens between devices: if they are split, P comes first."""
    if _tokens_are_split():
        x = x.swapaxes(1, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def split_tokens(x: jax.Array, frames: int) -> jax.Array:
    """The inverse of `merge_tokens`."""
    if _tokens_are_split():
        return x.reshape(x.shape[0], -1, frames, *x.shape[2:]).swapaxes(1, 2)
    return x.reshape(x.shape[0], frames, -1, *x.shape[2:])
