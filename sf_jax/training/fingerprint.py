"""Fingerprints of the arrays of a state: shape, type, a checksum of all bits, and the number of nonfinite values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.training.sharding import HOST_MEMORY


class Leaf(NamedTuple):
    """One array of a state.

    Attributes:
      shape: its shape.
      dtype: its type.
      checksum: checksum of all bits, independent of the sharding.
      nonfinite: number of values that are NaN or infinite.
    """

    shape: list[int]
    dtype: str
    checksum: int
    nonfinite: int


def _checksum(x: jax.Array) -> jax.Array:
    """Sum of all words times different odd numbers, modulo 2**32; any single-bit change alters it."""
    words = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    place, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(words.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)


def _nonfinite(x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros((), jnp.int32)
    return jnp.sum(~jnp.isfinite(x), dtype=jnp.int32)


@jax.jit
def _measure(leaves):
    return jnp.stack([_checksum(x) for x in leaves]), jnp.stack([_nonfinite(x) for x in leaves])


def shapes_of(tree) -> dict[str, tuple[list[int], str]]:
    """Shape and type by path for a tree of arrays or `ShapeDtypeStruct`s."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        names = (str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", "")))) for part in path)
        found["/".join(names)] = ([*x.shape], str(np.dtype(x.dtype)))
    return found


def measure(tree) -> dict[str, Leaf]:
    """Measures every array of a tree on its own devices.

    Args:
      tree: arrays with elements of at most 4 bytes.

    Returns:
      path -> `Leaf`.
    """
    leaves = jax.tree.leaves(tree)
    hosted = (isinstance(x, jax.Array) and x.sharding.memory_kind == HOST_MEMORY for x in leaves)
    if any(hosted):  # one at a time, as they may not all fit on the devices
        near = (jax.device_put(x, x.sharding.with_memory_kind("device")) for x in leaves)
        checksums, counts = np.concatenate([jax.device_get(_measure([x])) for x in near], axis=1)
    else:
        checksums, counts = jax.device_get(_measure(leaves))
    measured = zip(shapes_of(tree).items(), checksums, counts, strict=True)
    return {path: Leaf(*shape, int(checksum), int(count)) for (path, shape), checksum, count in measured}
