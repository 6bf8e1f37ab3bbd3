"""Keeps recorded arrays in less space: `python -m tests.goldens.packed FROM TO [--thin]`.

A packed file is compressed by LZMA (`xz`), without loss. It holds a line of JSON that names the arrays, then their
bytes. Bytes of float32 values are sorted: first all exponents, which repeat, then the fractions, which do not.

With `--thin`, NaN replaces seven eighths of every large output (never an input), which the comparison skips. What is
left has values of every frame.
"""

import json
import lzma
import pathlib
import re
import sys

import numpy as np
from safetensors import safe_open

SUFFIX = ".xz"
SHIFTS = (24, 16, 8, 0)
KEPT = 8  # of thinned outputs, one of so many
# Names of outputs, with the axis along which they are thinned: channels, tokens of a cache, rows of pixels.
OUTPUTS = {
    r".*(_flow|_x0|_x0_pred|x_gen|output|_latents)": -3,
    r".*_cache_[kv]_layer\d+": 1,
    r"decode.*": -2,
}


def to_planes(values: np.ndarray) -> bytes:
    """The bytes of float32 values [n], sorted by significance, the signs last."""
    bits = values.view(np.uint32)
    bits = (bits << 1) | (bits >> 31)
    return b"".join((bits >> shift).astype(np.uint8).tobytes() for shift in SHIFTS)


def from_planes(data: bytes) -> np.ndarray:
    """The float32 values [n] of sorted bytes."""
    planes = np.frombuffer(data, np.uint8).reshape(len(SHIFTS), -1)
    bits = sum(plane.astype(np.uint32) << shift for plane, shift in zip(planes, SHIFTS, strict=True))
    return ((bits >> 1) | (bits << 31)).view(np.float32)


def packed_path(path: pathlib.Path) -> pathlib.Path:
    """Where the packed form of a file lies."""
    return path.with_name(path.name + SUFFIX)


def read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a `.npz` or `.safetensors` file, or its packed form if only that exists.

    Returns:
      The arrays, and a safetensors file's metadata (empty for others).
    """
    path = pathlib.Path(path)
    if not path.exists():
        return unpack(packed_path(path).read_bytes())
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as stored:
            return {key: stored.get_tensor(key) for key in stored.keys()}, stored.metadata() or {}  # noqa: SIM118
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files}, {}


def pack(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """The packed form of a file's content; equal input gives equal bytes.

    Raises:
      ValueError: if an array has a type that numpy does not have itself, such as bfloat16.
    """
    foreign = [key for key, array in arrays.items() if array.dtype.kind not in "biufU"]
    if foreign:
        raise ValueError(f"{foreign[0]} is {arrays[foreign[0]].dtype}: convert it to float32 first")
    header = {key: (array.dtype.str, array.shape) for key, array in arrays.items()}
    wide = {key: array for key, array in arrays.items() if array.dtype == np.float32}
    flat = np.concatenate([np.zeros(0, np.float32), *(array.ravel() for array in wide.values())])
    rest = b"".join(array.tobytes() for key, array in arrays.items() if key not in wide)
    line = json.dumps({"arrays": header, "metadata": metadata}).encode() + b"\n"
    return lzma.compress(line + rest + to_planes(flat), preset=9)


def unpack(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What `pack` was given."""
    line, _, data = lzma.decompress(data).partition(b"\n")
    header = json.loads(line)
    shapes = {key: (np.dtype(dtype), tuple(shape)) for key, (dtype, shape) in header["arrays"].items()}
    sizes = {key: int(np.prod(shape)) for key, (_, shape) in shapes.items()}
    start = sum(sizes[key] * dtype.itemsize for key, (dtype, _) in shapes.items() if dtype != np.float32)
    flat, arrays, offset, taken = from_planes(data[start:]), {}, 0, 0
    for key, (dtype, shape) in shapes.items():
        if dtype == np.float32:
            arrays[key] = flat[taken : taken + sizes[key]].reshape(shape)
            taken += sizes[key]
        else:
            arrays[key] = np.frombuffer(data, dtype, sizes[key], offset).reshape(shape)
            offset += sizes[key] * dtype.itemsize
    return arrays, header["metadata"]


def thin(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Replaces seven of eight channels, tokens or rows of every output by NaN, in each output other ones."""
    thinned = dict(arrays)
    for number, (key, array) in enumerate(arrays.items()):
        axes = [axis for pattern, axis in OUTPUTS.items() if re.fullmatch(pattern, key)]
        if axes and array.dtype == np.float32 and array.ndim >= 4 and array.shape[axes[0]] >= 2 * KEPT:
            kept = np.arange(array.shape[axes[0]]) % KEPT == number % KEPT
            kept = np.expand_dims(kept, [axis for axis in range(array.ndim) if axis != axes[0] % array.ndim])
            thinned[key] = np.where(kept, array, np.float32(np.nan))
    return thinned


def main(source: str, target: str, *options: str) -> None:
    """Packs every `.npz` and `.safetensors` file of a folder, packed or not, into another folder."""
    for path in sorted(pathlib.Path(source).iterdir()):
        path = path.with_name(path.name.removesuffix(SUFFIX))
        if path.suffix in (".npz", ".safetensors"):
            arrays, metadata = read(path)
            arrays = thin(arrays) if "--thin" in options and path.suffix == ".npz" else arrays
            packed_path(pathlib.Path(target) / path.name).write_bytes(pack(arrays, metadata))


if __name__ == "__main__":
    main(*sys.argv[1:])
