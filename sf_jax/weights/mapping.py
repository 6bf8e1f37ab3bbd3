"""Name maps between the tensors of a weight file and our parameter trees, and the two ways through them.

A map is a list of `Entry`. Files hold PyTorch's layouts (linear weights [out, in], convolutions [out, in, ...]) and a
tensor per block; our trees hold [in, out] kernels and, where the blocks are scanned, all blocks stacked along the first
axis. Every way through a map moves numbers and changes none, so a round trip gives the same bytes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor is turned: `ours(theirs(x)) == x`."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(lambda x: x.T, lambda x: x.T)
# A convolution [out, in, *window] and ours [*window, in, out].
CONV = Layout(lambda x: np.moveaxis(x, (0, 1), (-1, -2)), lambda x: np.moveaxis(x, (-1, -2), (0, 1)))


def vector(dims: int) -> Layout:
    """A vector [C] that the file stores as [C, 1, ...] with `dims` axes."""
    return Layout(lambda x: x.reshape(-1), lambda x: x.reshape(-1, *(1,) * (dims - 1)))


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor of a weight file goes.

    Attributes:
      name: the file's name for it.
      path: path of our leaf in the parameter tree.
      layer: index along our leaf's first axis, None if the leaf is not stacked.
      layout: how the tensor is turned.

    Several entries with one path and layer are names of a tied tensor: a file may hold any of them; all are written.
    """

    name: str
    path: tuple[str, ...]
    layer: int | None = None
    layout: Layout = SAME


def check_names(entries: Sequence[Entry], names: Iterable[str], what: str) -> None:
    """Refuses names that the map does not have, and a lack of those it has.

    Raises:
      ValueError: naming what is missing and what is unexpected.
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
    """Entries of each leaf in the order of its layers; of tied ones the first that is among `names`."""
    names = None if names is None else set(names)
    leaves: dict[tuple[str, ...], dict] = {}
    for entry in entries:
        if names is None or entry.name in names:
            leaves.setdefault(entry.path, {}).setdefault(entry.layer, entry)
    return {path: [layers[i] for i in sorted(layers, key=lambda i: i or 0)] for path, layers in leaves.items()}


def file_shapes(entries: Sequence[Entry], like: dict) -> dict[str, tuple[int, ...]]:
    """The file's name -> the shape that the tensor has there, for a tree of our structure and shapes."""
    shapes = {}
    for entry in entries:
        leaf = leaf_at(like, entry.path)
        # One element, seen as the whole: only the shape is wanted.
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
      tensors: name -> array; may read from a file only when asked, each tensor is asked for once.
      like: a tree of our structure and shapes (arrays or `ShapeDtypeStruct`).
      what: what the weights belong to, for messages.
      dtype: type of the result; None keeps the file's (where the layers of a leaf differ, one that holds all of them).

    Returns:
      A tree like `like` of numpy arrays.

    Raises:
      ValueError: naming the tensors that are missing, unexpected or misshaped.
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
    """A file's tensors from our parameter tree (or from a tree of gradients); `convert` makes numpy of a leaf."""
    leaves: dict[tuple[str, ...], np.ndarray] = {}
    out = {}
    for entry in entries:
        if entry.path not in leaves:
            leaves[entry.path] = convert(leaf_at(params, entry.path))
        leaf = leaves[entry.path]
        out[entry.name] = np.ascontiguousarray(entry.layout.theirs(leaf if entry.layer is None else leaf[entry.layer]))
    return out
