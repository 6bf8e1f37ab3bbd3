"""The device mesh of generation: axes `data` (videos), `context` (tokens of a frame) and `tensor` (heads, features)."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sf_jax.models.wan import WanConfig

AXES = ("data", "context", "tensor")
EXAMPLE = "tensor:2,context:2"
MAX_SIZE = 1 << 16


def mesh_sizes(mesh: str | Mapping[str, int]) -> dict[str, int]:
    """Devices per axis, from a string such as "tensor:2,context:2" or a mapping; only the axes named there.

    Raises:
      ValueError: if an axis is unknown or repeated, or a size is not an integer from 1 to `MAX_SIZE`.
    """
    pairs = list(mesh.items()) if isinstance(mesh, Mapping) else None
    if isinstance(mesh, str):
        pairs = [tuple(part.strip() for part in item.split(":")) for item in mesh.split(",")]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"mesh is {mesh!r}: give axes with their sizes, such as {EXAMPLE}")
    sizes = {}
    for axis, size in pairs:
        if axis not in AXES:
            raise ValueError(f"mesh is {mesh!r}: its axes are {', '.join(AXES)}, such as {EXAMPLE}")
        if axis in sizes:
            raise ValueError(f"mesh is {mesh!r}: {axis} comes twice")
        number = size if isinstance(size, (int, np.integer)) and not isinstance(size, bool) else None
        if isinstance(size, str) and size.isascii() and size.isdecimal() and len(size) < 6:
            number = int(size)
        if number is None or not 1 <= number <= MAX_SIZE:
            raise ValueError(f"mesh is {mesh!r}: the size of {axis} must be a whole number from 1 on")
        sizes[axis] = int(number)
    return sizes


def video_devices(sizes: Mapping[str, int]) -> int:
    """Number of devices that share one video."""
    return sizes.get("context", 1) * sizes.get("tensor", 1)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with automatic axes.

    Args:
      sizes: sizes of the axes other than 1, from `mesh_sizes`.
      devices: the devices, all of which are used; if `sizes` has no `data`, that axis takes the rest of them. None
        takes as many of this process's devices as the sizes need, with `data` 1 by default.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    here = list(jax.local_devices() if devices is None else devices)
    shared = video_devices(sizes)
    data = sizes.get("data", 1 if devices is None else max(1, len(here) // shared))
    count = data * shared
    if count > len(here) or (devices is not None and count != len(here)):
        text = ",".join(f"{axis}:{size}" for axis, size in sizes.items())
        wanted = "leave data out, or give sizes that multiply to this number"
        raise ValueError(f"mesh is {text}: its sizes multiply to {count}, the devices are {len(here)}: {wanted}")
    # Leaves out axes of size 1, with which XLA would describe equal shardings in different ways.
    shape = {"data": data} | {axis: sizes[axis] for axis in AXES[1:] if sizes.get(axis, 1) > 1}
    devices = np.asarray(here[:count]).reshape(tuple(shape.values()))
    return Mesh(devices, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def videos_apart(mesh: Mesh | None) -> int:
    """The number of parts into which a mesh splits the videos of a batch."""
    return 1 if mesh is None else mesh.shape["data"]


def describe(mesh: Mesh) -> str:
    """The axes larger than 1, such as "tensor 2, context 2"."""
    return ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)


def check_mesh(mesh: Mesh | Mapping[str, int], config: WanConfig) -> None:
    """Checks that a network can be split over a mesh.

    Args:
      mesh: a mesh, or the sizes of its axes.
      config: the network's sizes.

    Raises:
      ValueError: if it cannot; names the axis, its size and valid sizes.
    """
    sizes = mesh.shape if isinstance(mesh, Mesh) else mesh
    if isinstance(mesh, Mesh):
        others = set(mesh.axis_names) - set(AXES)
        if others or "data" not in mesh.axis_names:
            axes = ", ".join(mesh.axis_names)
            raise ValueError(f"mesh has the axes {axes}: it must have data, and may have context and tensor")
        if set(mesh.axis_types) != {AxisType.Auto}:
            raise ValueError("mesh has axes that are not automatic: make it with axis_types=(AxisType.Auto,) * axes")
    tensor = sizes.get("tensor", 1)
    common = math.gcd(config.num_heads, config.ffn_dim)
    if common % tensor:
        fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise ValueError(
            f"mesh.tensor is {tensor}: it must divide the {config.num_heads} heads and the {config.ffn_dim} hidden "
            f"channels of the network, as {fitting} do"
        )


def check_tokens(mesh: Mesh | Mapping[str, int] | None, rows: int, columns: int) -> None:
    """Checks that a latent frame of `rows` x `columns` tokens can be split over a mesh.

    Raises:
      ValueError: if it cannot; names the axis, its size and valid sizes.
    """
    sizes = {} if mesh is None else mesh.shape if isinstance(mesh, Mesh) else mesh
    context, tokens = sizes.get("context", 1), rows * columns
    if tokens % context:
        fitting = ", ".join(str(n) for n in range(1, 17) if tokens % n == 0)
        raise ValueError(
            f"mesh.context is {context}: it must divide the {tokens} tokens of a latent frame, as {fitting} do"
        )
