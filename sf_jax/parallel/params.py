"""Sharding of parameters for training and generation: named logical axes, resolved by one table.

A parameter without logical axes, or a logical axis without a rule, is an error; nothing is silently replicated.
"""

import math
import re
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sf_jax.models.partition import shortest_spec

# logical axis of a parameter -> mesh axes, or None if not split
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
    "vocab": ("tensor",),
}
# For generation, `context` does not split weights, as every call would have to gather all of them.
GENERATION = RULES | {"embed": None}

_ATTENTION = {
    **{(name, "kernel"): ("layers", "embed", "heads") for name in ("q", "k", "v", "qkv")},
    **{(name, "bias"): ("layers", "heads") for name in ("q", "k", "v", "qkv")},
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
    # the text encoder; its feed-forward layers have the names above
    **{("blocks", name, "kernel"): ("layers", "embed", "heads") for name in "qkv"},
    ("blocks", "o", "kernel"): ("layers", "heads", "embed"),
    ("blocks", "gate", "kernel"): ("layers", "embed", "mlp"),
    **{("blocks", name, "scale"): ("layers", "embed") for name in ("norm1", "norm2")},
    ("blocks", "position_bias"): ("layers", "part", "part"),
    ("embedding",): ("vocab", "embed"),
    ("norm", "scale"): ("embed",),
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
_LAYER = re.compile(r"blocks_\d+")


def logical_axes(path: tuple[str, ...], rank: int) -> tuple[str, ...]:
    """Logical axes of a leaf of the state: those of the parameter whose path is a suffix of its own; scalars have none.

    Unstacked layers (see `WanConfig.scan_layers`) have the axes of stacked ones without the first.

    Raises:
      ValueError: if no parameter in the table matches the path and rank.
    """
    if rank == 0:
        return ()
    apart = any(_LAYER.fullmatch(name) for name in path)
    names = tuple(_LAYER.sub("blocks", name) for name in path)
    for start in range(len(path)):
        axes = AXES.get(names[start:])
        axes = axes[1:] if apart and axes is not None and axes[0] == "layers" else axes
        if axes is not None and len(axes) == rank:
            return axes
    raise ValueError(f"no sharding rule for {'/'.join(path)} of rank {rank}: add its logical axes to params.AXES")


def names_of(path) -> tuple[str, ...]:
    """The names in a leaf's path of `jax.tree_util`."""
    return tuple(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", "")))) for part in path)


def tree_shardings(tree, mesh: Mesh, rules: Mapping[str, tuple[str, ...] | None] = RULES):
    """A `NamedSharding` for every leaf of a tree of parameters, or of a state made of such trees.

    Args:
      tree: arrays or their shapes.
      mesh: the devices; axes in the rules that the mesh lacks are ignored.
      rules: `RULES`, or `GENERATION`.

    Raises:
      ValueError: if a leaf has no rule, or a mesh axis does not divide it.
    """

    def leaf(path, value):
        names, spec = names_of(path), []
        if names[0] in WHOLE:
            return NamedSharding(mesh, PartitionSpec())
        # `eight_bit.Scaled`: its numbers [..., out, in], or their scales [..., out, 1]
        eight_bit = names[-2:] in (("kernel", "values"), ("kernel", "scale"))
        axes = logical_axes(names[:-1] if eight_bit else names, len(value.shape))
        axes = (*axes[:-2], axes[-1], axes[-2]) if eight_bit else axes
        for axis, size in zip(axes, value.shape, strict=True):
            if axis not in rules:
                raise ValueError(f"logical axis {axis!r} of {'/'.join(names)} has no rule in params.RULES")
            split = () if eight_bit and size == 1 else rules[axis] or ()
            target = tuple(name for name in split if name in mesh.shape)
            parts = math.prod(mesh.shape[name] for name in target)
            if size % parts:
                wanted = " x ".join(f"mesh.{name}" for name in target)
                raise ValueError(f"{wanted} is {parts}: it must divide {size}, axis {axis!r} of {'/'.join(names)}")
            spec.append(target if len(target) > 1 else target[0] if target else None)
        return NamedSharding(mesh, shortest_spec(spec))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def held_bytes(tree) -> int:
    """Bytes of a tree of arrays, or of their shapes, on one device; leaves without a sharding count in full."""

    def leaf(x):
        place = getattr(x, "sharding", None)
        shape = x.shape if place is None else place.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(leaf, jax.tree.leaves(tree)))
