"""Keeps recorded arrays in less space, without loss: `python -m tests.goldens.packed FROM TO`.

A packed file is compressed by LZMA (`xz`). It holds a line of JSON that names the arrays, then their bytes. Bytes of
float32 values are sorted: first all exponents, which repeat, then the fractions, which do not.
"""

import json
import lzma
import pathlib
import sys

import numpy as np
from safetensors import safe_open

SUFFIX = ".xz"
SHIFTS = (24, 16, 8, 0)


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


def main(source: str, target: str) -> None:
    """Packs every `.npz` and `.safetensors` file of a folder into another folder."""
    for path in sorted(pathlib.Path(source).iterdir()):
        if path.suffix in (".npz", ".safetensors"):
            packed_path(pathlib.Path(target) / path.name).write_bytes(pack(*read(path)))


if __name__ == "__main__":
    main(*sys.argv[1:])
