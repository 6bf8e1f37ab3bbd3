"""Reads and writes safetensors files, one tensor at a time.

Files are not memory-mapped, since the mapped pages would count as resident memory in addition to the arrays made from
them.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from sf_jax import strict_json
from sf_jax.files import replacing
from sf_jax.messages import quoted, shortened
from sf_jax.weights.tensors import MAX_TENSORS, TensorFile, check_announced, checked_tensor, empty_aligned

# The format's names for number types.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000


def _read_into(file, offset: int, array: np.ndarray, path: Path) -> np.ndarray:
    """Fills an array with the bytes at an offset in a file."""
    view = memoryview(array.reshape(-1).view(np.uint8))
    file.seek(offset)
    while len(view):
        count = file.readinto(view)
        if not count:
            raise ValueError(f"{path} has become shorter while it was read")
        view = view[count:]
    return array


def _pairs(pairs):
    """A JSON object; raises on duplicate keys."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name is there twice")
    return table


def open_safetensors(path: Path) -> TensorFile:
    """Opens a safetensors file: header length (8 bytes), header (JSON), data."""
    file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by TensorFile.close)
    try:
        size = os.fstat(file.fileno()).st_size
        header, start = _header(file, size)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its __metadata__ is no table of strings")
        tensors = {name: _described(name, entry) for name, entry in header.items()}
        check_announced({name: shape for name, (shape, *_) in tensors.items()})
        _check_offsets(tensors, size - start)
    except ValueError as error:
        file.close()
        raise ValueError(f"{path} is a damaged safetensors file: {error}") from error

    def read(name):
        shape, dtype, offset, _ = tensors[name]
        return _read_into(file, start + offset, empty_aligned(shape, dtype), path)

    shapes = {name: value[0] for name, value in tensors.items()}
    return TensorFile(
        path, shapes, {name: value[1] for name, value in tensors.items()}, read, metadata, None, file.close
    )


def _header(file, size: int) -> tuple[dict, int]:
    """The header and the offset of the data."""
    length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0
    if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
        raise ValueError(f"a header of {length} bytes does not fit in its {size} bytes; perhaps an unfinished download")
    text = file.read(length)
    if text.count(b"data_offsets") > MAX_TENSORS:  # checked first, as parsing takes ten times its memory
        raise ValueError(f"its header announces more than {MAX_TENSORS} tensors, the most that are read")
    try:
        return strict_json.parse(text, pairs=_pairs), 8 + length
    except ValueError as error:
        raise ValueError(f"its header is no JSON object with an entry for each tensor: {error}") from error


def _described(name: str, entry) -> tuple[tuple[int, ...], np.dtype, int, int]:
    """Shape, type, start and end offset of a tensor from its entry in the header."""

    def sizes(values):
        return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

    if not isinstance(entry, dict) or not sizes(entry.get("shape")) or not sizes(entry.get("data_offsets")):
        raise ValueError(f"the entry of {quoted(name)} has no shape and data_offsets of whole numbers")
    dtype = DTYPES.get(entry.get("dtype")) if isinstance(entry.get("dtype"), str) else None
    if dtype is None:
        raise ValueError(f"{quoted(name)} has the type {quoted(entry.get('dtype'))}, allowed: {', '.join(DTYPES)}")
    shape, offsets = tuple(entry["shape"]), entry["data_offsets"]
    needed = math.prod(shape) * dtype.itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != needed:
        raise ValueError(
            f"{quoted(name)} {shortened(str(shape))} of {entry['dtype']} needs {quoted(needed)} bytes, its "
            f"data_offsets are {quoted(offsets)}"
        )
    return shape, dtype, *offsets


def _check_offsets(tensors: dict, size: int) -> None:
    """Checks that the tensors neither overlap nor leave gaps, and that the last one ends the file."""
    end = 0
    for name, (_, _, start, stop) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if start != end:
            fault = "overlaps the tensor before it" if start < end else "leaves a gap before it"
            raise ValueError(f"{quoted(name)} {fault} (data_offsets {start}, {stop}; expected to start at {end})")
        end = stop
    if end != size:
        fault = "perhaps an unfinished download" if size < end else "too many"
        raise ValueError(f"its header describes {end} bytes of numbers, the file has {size}: {fault}")


def write_safetensors(path: Path | str, tensors: TensorFile, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file with only one tensor in memory at a time.

    The bytes depend only on the tensors and equal those of the `safetensors` library: wide types first, then by name.

    Args:
      path: the file, which appears under its name only when it is complete.
      tensors: the tensors to write; each is read once.
      metadata: strings for the header.

    Raises:
      ValueError: if the path cannot be written, or the format does not support a number type.
    """
    order = sorted(tensors, key=lambda name: (-tensors.dtypes[name].itemsize, name))
    header, offset = {}, 0
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    for name in order:
        if tensors.dtypes[name] not in _NAMES:
            raise ValueError(f"{name} is of {tensors.dtypes[name]}, safetensors files hold {', '.join(DTYPES)}")
        size = math.prod(tensors.shapes[name]) * tensors.dtypes[name].itemsize
        header[name] = {
            "dtype": _NAMES[tensors.dtypes[name]],
            "shape": list(tensors.shapes[name]),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as unfinished, open(unfinished, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            value = checked_tensor(tensors, name)
            file.write(memoryview(value.reshape(-1).view(np.uint8)))
