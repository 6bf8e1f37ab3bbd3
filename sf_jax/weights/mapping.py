"""Name maps between the tensors of a weight file and our parameter trees, and the conversions in both directions.

A map is a list of `Entry`. Files use PyTorch's layouts (linear weights [out, in], convolutions [out, in, ...]) and one
tensor per block. Our trees have [in, out] kernels and, for scanned blocks, all blocks stacked along the first axis.
Conversions only move values, so a round trip gives the same bytes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """How to convert a tensor: `ours(theirs(x)) == x`."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(lambda x: x.T, lambda x: x.T)
# A convolution: theirs [out, in, *window], ours [*window, in, out].
CONV = Layout(lambda x: np.moveaxis(x, (0, 1), (-1, -2)), lambda x: np.moveaxis(x, (-1, -2), (0, 1)))


def vector(dims: int) -> Layout:
    """A vector [C] that the file stores as [C, 1, ...] with `dims` axes."""
    return Layout(lambda x: x.reshape(-1), lambda x: x.reshape(-1, *(1,) * (dims - 1)))


@dataclasses.dataclass(frozen=True)
class Entry:
    """Maps one tensor of a weight file to our parameter tree.

    Attributes:
      name: the file's name for it.
      path: path of our leaf in the parameter tree.
      layer: index along our leaf's first axis; None if the leaf is not stacked.
      layout: how to convert the tensor.

    Several entries with the same path and layer name a tied tensor: a file may contain any of them; all are written.
    """

    name: str
    path: tuple[str, ...]
    layer: int | None = None
    layout: Layout = SAME


def check_names(entries: Sequence[Entry], names: Iterable[str], what: str) -> None:
    """Checks that a file has exactly the names of the map.

    Raises:
      ValueError: listing the missing and the unexpected names.
    """
    names = set(names)
    found = {(entry.path, entry.layer) for entry in entries if entry.name in names}
    missing = sorted(entry.name for entry in entries if (entry.path, entry.layer) not in found)
    unexpected = sorted(names - {entry.name for entry in entries})
    if missing or unexpected:
        raise ValueError(
            f"these are not the weights of this {what}: {len(missing)} tensors missing {missing[:4]}, "
            f"{len(unexpected)} unexpected {unexpected[:4]}"
        )


def by_leaf(entries: Sequence[Entry], names: Iterable[str] | None = None) -> dict[tuple[str, ...], list[Entry]]:
    """The entries of each leaf in layer order; of tied entries, the first whose name is in `names`."""
    names = None if names is None else set(names)
    leaves: dict[tuple[str, ...], dict] = {}
    for entry in entries:
        if names is None or entry.name in names:
            leaves.setdefault(entry.path, {}).setdefault(entry.layer, entry)
    return {path: [layers[i] for i in sorted(layers, key=lambda i: i or 0)] for path, layers in leaves.items()}


def file_shapes(entries: Sequence[Entry], like: dict) -> dict[str, tuple[int, ...]]:
    """The file's name -> the tensor's shape in the file, for a tree with our structure and shapes."""
    shapes = {}
    for entry in entries:
        leaf = leaf_at(like, entry.path)
        # A broadcast scalar, since only the shape is needed.
        ours = np.broadcast_to(np.int8(0), leaf.shape if entry.layer is None else leaf.shape[1:])
        shapes[entry.name] = entry.layout.theirs(ours).shape
    return shapes


def leaf_at(tree: dict, path: Sequence[str]):
    """The leaf at a path of a tree of dicts."""
    for part in path:
        tree = tree[part]
    return tree


def to_params(entries: Sequence[Entry], tensors: Mapping[str, np.ndarray], like: dict, what: str, dtype=None) -> dict:
    """Our parameter tree from a file's tensors.

    Args:
      entries: the map.
      tensors: name -> array; may be lazy, as each tensor is read once.
      like: a tree with our structure and shapes (arrays or `ShapeDtypeStruct`).
      what: the network the weights belong to, for messages.
      dtype: type of the result; None keeps the file's (the promoted type if the layers of a leaf differ).

    Returns:
      A tree like `like` of numpy arrays.

    Raises:
      ValueError: listing the missing, unexpected or misshaped tensors.
    """
    check_names(entries, tensors, what)
    leaves, wrong = by_leaf(entries, tensors), []

    def leaf(path, shape):
        found = leaves[tuple(part.key for part in path)]
        out = None
        for i, entry in enumerate(found):
            value = entry.layout.ours(np.asarray(tensors[entry.name]))
            expected = tuple(shape.shape if entry.layer is None else shape.shape[1:])
            if value.shape != expected:
                theirs = entry.layout.theirs(np.broadcast_to(np.int8(0), expected)).shape
                wrong.append(f"{entry.name} is {np.shape(tensors[entry.name])}, must be {theirs}")
                continue
            if entry.layer is None:
                return np.ascontiguousarray(value, dtype or value.dtype)
            if out is None:
                out = np.empty(shape.shape, dtype or value.dtype)
            if dtype is None and value.dtype != out.dtype:
                out = out.astype(jnp.promote_types(out.dtype, value.dtype), copy=False)
            out[i] = value
        return out

    params = jax.tree_util.tree_map_with_path(leaf, like)
    if wrong:
        raise ValueError(f"{len(wrong)} tensors have the wrong shape: {'; '.join(wrong[:4])}")
    return params


def to_tensors(entries: Sequence[Entry], params: dict, convert: Callable = np.asarray) -> dict[str, np.ndarray]:
    """A file's tensors from our parameter tree (or a tree of gradients); `convert` turns a leaf into a numpy array."""
    leaves: dict[tuple[str, ...], np.ndarray] = {}
    out = {}
    for entry in entries:
        if entry.path not in leaves:
            leaves[entry.path] = convert(leaf_at(params, entry.path))
        leaf = leaves[entry.path]
        out[entry.name] = np.ascontiguousarray(entry.layout.theirs(leaf if entry.layer is None else leaf[entry.layer]))
    return out
