"""Loads weight files into device arrays and converts them back, tensor by tensor."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sf_jax.models.eight_bit import DTYPES
from sf_jax.weights import mapping, vae
from sf_jax.weights.eight_bit import Quantizer
from sf_jax.weights.mapping import Entry
from sf_jax.weights.names import bare_names
from sf_jax.weights.recognize import recognize
from sf_jax.weights.tensors import TensorFile, empty_aligned, is_float8

# Rows and columns of the tiles for transposing matrices; 6 times as fast as numpy's copy of the whole matrix.
_TILE = 128
BFLOAT16 = np.dtype(jnp.bfloat16)


def normalized(tensors: TensorFile, names: Iterable[str]) -> TensorFile:
    """The same tensors without wrappers in their names; a prefix is removed only if all names have it.

    If all of `names` belong to a decoder (the tiny VAE), the file's encoder is dropped.

    Raises:
      ValueError: if two names become equal.
    """
    bare, found = bare_names(tensors), {}
    if all(name.startswith("decoder.") for name in names):
        bare = {name: text for name, text in bare.items() if not text.startswith(vae.TINY_UNUSED)}
    for name, text in bare.items():
        if text in found:
            raise ValueError(f"{tensors.path}: {found[text]} and {name} are both {text}")
        found[text] = name
    return tensors.renamed(found)


def check(entries: Sequence[Entry], tensors: TensorFile, like: dict, what: str) -> None:
    """Checks a file's names and shapes against the map, before reading any tensor.

    Args:
      entries: the map.
      tensors: the file, with normalized names.
      like: a tree with our structure and shapes.
      what: the network that needs the weights, for the message.

    Raises:
      ValueError: listing the missing, unexpected and misshaped tensors, and a guess at what the file is.
    """
    expected, found = mapping.file_shapes(entries, like), set(tensors)
    there = {(entry.path, entry.layer) for entry in entries if entry.name in found}
    missing = sorted(entry.name for entry in entries if (entry.path, entry.layer) not in there)
    unexpected = sorted(found - set(expected))
    shapes = tensors.shapes
    wrong = [name for name in expected if name in found and shapes[name] != expected[name]]
    faults = []
    for name in unexpected:
        inner = next((text for text in missing if name.endswith(f".{text}")), None)
        if inner is not None:
            prefix = name.removesuffix(inner)
            faults.append(
                f"{sum(text.startswith(prefix) for text in found)} names begin with {prefix!r}, others do not"
            )
            break
    if missing:
        faults.append(f"{len(missing)} tensors missing {missing[:4]}")
    if unexpected:
        faults.append(f"{len(unexpected)} unexpected {unexpected[:4]}")
    if wrong:
        some = ", ".join(f"{name} is {shapes[name]}, must be {expected[name]}" for name in wrong[:4])
        faults.append(f"{len(wrong)} of the wrong shape: {some}")
    if faults:
        guess = recognize(shapes, tensors.metadata)
        seems = guess.description
        if unexpected and not missing and not wrong and guess.kind != "unknown":
            seems = f"another network, which has all that this {what} has and more"
        raise ValueError(
            f"{tensors.path}: these are not the weights of this {what}: {'; '.join(faults)}. It seems to be: {seems}"
        )


def load_params(
    entries: Sequence[Entry],
    tensors: TensorFile,
    like: dict,
    what: str,
    dtype=None,
    shardings: dict | None = None,
    quantizer: Quantizer | None = None,
) -> dict:
    """Loads a file into device arrays; host memory holds one leaf at a time, and only this process's shards of it.

    On the CPU the host buffer of a leaf becomes the device buffer without a copy.

    Args:
      entries: the map.
      tensors: the file; wrappers and prefixes in its names are allowed. Each tensor is read once.
      like: a tree with our structure and shapes (arrays or `ShapeDtypeStruct`).
      what: the network the weights belong to, for messages.
      dtype: type of the parameters; None keeps the file's (the promoted type if the layers of a leaf differ; bfloat16
        for float8).
      shardings: a tree of shardings like `like`; None uses the default device.
      quantizer: quantizes kernels, each before the next one is loaded. Kernels that the file stores in the same float8
        type, unscaled or with a scale per output channel, are used unchanged with their scales.

    Returns:
      A tree like `like` of `jax.Array`; quantized kernels are `eight_bit.Scaled`.

    Raises:
      ValueError: naming the tensors that are missing, unexpected or misshaped, or because the file is damaged.
    """
    tensors = normalized(tensors, (entry.name for entry in entries))
    check(entries, tensors, like, what)
    leaves = mapping.by_leaf(entries, tensors)

    def leaf(path, shape, sharding=None):
        path = tuple(part.key for part in path)
        found = leaves[path]
        quantized = quantizer is not None and quantizer.wants(path)
        narrow = DTYPES[quantizer.name] if quantized else None
        if quantized and all(_is_stored(tensors, entry.name, narrow) for entry in found):
            return quantizer.keep(path, *_load_stored(found, tensors, tuple(shape.shape), narrow, sharding))
        # float8 cannot be computed with; bfloat16 represents all its values exactly.
        kept = [BFLOAT16 if is_float8(tensors.dtypes[entry.name]) else tensors.dtypes[entry.name] for entry in found]
        kept = functools.reduce(jnp.promote_types, kept)
        loaded = _load_leaf(found, tensors, tuple(shape.shape), np.dtype(dtype or kept), sharding)
        return quantizer.quantize(path, loaded) if quantized else loaded

    return jax.tree_util.tree_map_with_path(leaf, like, *(() if shardings is None else (shardings,)))


def _is_stored(tensors: TensorFile, name: str, dtype: np.dtype) -> bool:
    """Whether a file stores a matrix in this 8-bit type, so that it needs no conversion."""
    if name in tensors.float8:
        return tensors.float8[name].dtype == dtype
    return tensors.dtypes[name] == dtype


def _load_stored(found, tensors, shape, dtype, sharding) -> tuple[jax.Array, jax.Array]:
    """The 8-bit values [..., out, in] and scales [..., out, 1] of a leaf [..., in, out]."""
    found = [dataclasses.replace(entry, layout=mapping.SAME) for entry in found]
    names, (*stack, inputs, outputs) = [entry.name for entry in found], shape

    def scale(name):
        return tensors.float8[name].scale() if name in tensors.float8 else np.ones((outputs, 1), np.float32)

    def values(name):
        return tensors.float8[name].read() if name in tensors.float8 else tensors[name]

    def load(read, width, dtype):
        file = TensorFile(tensors.path, dict.fromkeys(names, (outputs, width)), dict.fromkeys(names, dtype), read)
        placed = _turned(sharding, len(shape), split=width > 1)
        return _load_leaf(found, file, (*stack, outputs, width), np.dtype(dtype), placed)

    return load(values, inputs, dtype), load(scale, 1, np.float32)


def _turned(sharding: jax.sharding.Sharding | None, axes: int, split: bool) -> jax.sharding.Sharding | None:
    """The sharding of [..., out, in] given that of its kernel [..., in, out]; inputs are sharded only with `split`."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    *stack, inputs, outputs = [*sharding.spec, *[None] * (axes - len(sharding.spec))]
    return NamedSharding(sharding.mesh, PartitionSpec(*stack, outputs, inputs if split else None))


def _load_leaf(found, tensors, shape, dtype, sharding) -> jax.Array:
    """Loads one leaf: fills its shards tensor by tensor and puts each on its devices."""
    if sharding is None:
        placed = {None: tuple((0, size) for size in shape)}
    else:
        indices = sharding.addressable_devices_indices_map(shape)
        placed = {device: _bounds(index, shape) for device, index in indices.items()}
    buffers = _fill(found, tensors, dtype, set(placed.values()))
    if sharding is None:
        (buffer,) = buffers.values()
        return jax.block_until_ready(jax.device_put(buffer, may_alias=True))
    shards = [jax.device_put(buffers[bounds], device, may_alias=True) for device, bounds in placed.items()]
    # Waiting bounds host memory: this leaf's buffers are freed before the next leaf's are allocated.
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(shape, sharding, shards))


def _bounds(index, shape) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _fill(found, tensors, dtype, shards) -> dict[tuple, np.ndarray]:
    """Host arrays of the given shards of a leaf, keyed by their bounds along each axis."""
    buffers = {}
    for entry in found:
        wanted = [bounds for bounds in shards if entry.layer is None or bounds[0][0] <= entry.layer < bounds[0][1]]
        if not wanted:
            continue
        value = entry.layout.ours(tensors[entry.name])
        for bounds in wanted:
            part = value[tuple(slice(*ends) for ends in (bounds if entry.layer is None else bounds[1:]))]
            if entry.layer is None and part.size == value.size and value.dtype == dtype and value.flags.c_contiguous:
                buffers[bounds] = value
                continue
            if bounds not in buffers:
                buffers[bounds] = empty_aligned(tuple(stop - start for start, stop in bounds), dtype)
            _copy(part, buffers[bounds] if entry.layer is None else buffers[bounds][entry.layer - bounds[0][0]])
    return buffers


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """`target[...] = source`, fast for transposed matrices."""
    if source.dtype == target.dtype and source.dtype.kind == "V":
        # numpy copies ml_dtypes elements one by one, but integers in blocks.
        integers = np.dtype(f"u{source.dtype.itemsize}")
        source, target = source.view(integers), target.view(integers)
    if source.ndim != 2 or source.flags.c_contiguous:
        target[...] = source
        return
    for row in range(0, source.shape[0], _TILE):
        for column in range(0, source.shape[1], _TILE):
            tile = np.s_[row : row + _TILE, column : column + _TILE]
            target[tile] = source[tile]


def file_tensors(entries: Sequence[Entry], params: dict) -> TensorFile:
    """A file's tensors from our parameter tree, for the writers; each is converted when it is read."""
    by_name = {entry.name: entry for entry in entries}

    def read(name):
        entry = by_name[name]
        leaf = mapping.leaf_at(params, entry.path)
        if entry.layer is not None and isinstance(leaf, jax.Array):
            # leaf[layer] would compile a program for every layer.
            leaf = jax.lax.dynamic_index_in_dim(leaf, np.int32(entry.layer), keepdims=False)
        elif entry.layer is not None:
            leaf = leaf[entry.layer]
        return entry.layout.theirs(np.asarray(leaf))

    dtypes = {name: np.dtype(mapping.leaf_at(params, entry.path).dtype) for name, entry in by_name.items()}
    return TensorFile("parameters", mapping.file_shapes(entries, params), dtypes, read)


def translated(source: Sequence[Entry], target: Sequence[Entry], tensors: TensorFile) -> TensorFile:
    """The same network's tensors with the names and layouts of another map; values are unchanged.

    Args:
      source: the map of `tensors`.
      target: the map to write.
      tensors: the file, with normalized and checked names.
    """
    there = {(entry.path, entry.layer): entry for entry in reversed(source) if entry.name in tensors}
    pairs = {entry.name: (entry, there[entry.path, entry.layer]) for entry in target}

    def turned(name, value):
        entry, stored = pairs[name]
        return value if entry.layout is stored.layout else entry.layout.theirs(stored.layout.ours(value))

    shapes: Mapping[str, tuple] = {
        name: turned(name, np.broadcast_to(np.int8(0), tensors.shapes[stored.name])).shape
        for name, (_, stored) in pairs.items()
    }
    return TensorFile(
        tensors.path,
        shapes,
        {name: tensors.dtypes[stored.name] for name, (_, stored) in pairs.items()},
        lambda name: turned(name, tensors[pairs[name][1].name]),
        tensors.metadata,
        tensors.part,
        tensors.close,
    )
