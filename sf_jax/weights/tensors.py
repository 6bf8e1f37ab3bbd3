"""Lazily read named tensors: the interface between readers and writers."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

# XLA's CPU backend can alias arrays with this alignment without a copy.
_ALIGNMENT = 64
# Limits on what a file may declare, far above any existing network. Names appear in messages.
MAX_TENSORS, MAX_NAME, MAX_AXES = 100_000, 250, 32


@dataclasses.dataclass(frozen=True)
class Float8:
    """A scaled matrix as stored in a file.

    Attributes:
      dtype: its float8 type.
      read: returns the stored values [out, in].
      scale: returns their scales, float32 [out, 1].
    """

    dtype: np.dtype
    read: Callable[[], np.ndarray]
    scale: Callable[[], np.ndarray]


class TensorFile(Mapping):
    """Tensors by name; every access reads the tensor from the file again.

    Attributes:
      path: the file or folder, for messages.
      shapes: name -> shape, known without reading the tensors.
      dtypes: name -> numpy type.
      metadata: the strings of a safetensors header.
      part: which of a checkpoint's state dicts this is; None if the file is a single one.
      float8: for scaled float8, the stored matrices by name.
    """

    def __init__(
        self,
        path: Path | str,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, np.dtype],
        read: Callable[[str], np.ndarray],
        metadata: Mapping[str, str] | None = None,
        part: str | None = None,
        close: Callable[[], None] = lambda: None,
        float8: Mapping[str, Float8] | None = None,
    ):
        self.path = Path(path)
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.dtypes = {name: np.dtype(dtypes[name]) for name in shapes}
        self.metadata = dict(metadata or {})
        self.part = part
        self.float8 = dict(float8 or {})
        self._read, self._close = read, close

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; tensors already read stay valid."""
        self._close()

    def renamed(self, names: Mapping[str, str]) -> "TensorFile":
        """The same tensors with other names; `names` maps new -> old, and tensors not in it are dropped."""
        return TensorFile(
            self.path,
            {new: self.shapes[old] for new, old in names.items()},
            {new: self.dtypes[old] for new, old in names.items()},
            lambda new: self._read(names[new]),
            self.metadata,
            self.part,
            self._close,
            {new: self.float8[old] for new, old in names.items() if old in self.float8},
        )

    def without(self, prefix: str) -> "TensorFile":
        """The tensors whose names do not start with `prefix`."""
        return self.renamed({name: name for name in self if not name.startswith(prefix)})

    def astype(self, dtype) -> "TensorFile":
        """The same tensors with floating-point ones cast to one type; reading raises if a value overflows it."""
        dtype = np.dtype(dtype)
        dtypes = {name: dtype if is_float(old) else old for name, old in self.dtypes.items()}
        return TensorFile(
            self.path,
            self.shapes,
            dtypes,
            lambda name: cast(self._read(name), dtypes[name], f"{self.path}: {name}"),
            self.metadata,
            self.part,
            self._close,
        )


def check_announced(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Limits the number of tensors, axes and the length of names, before anything is allocated from them.

    Raises:
      ValueError: naming the limit.
    """
    if len(shapes) > MAX_TENSORS:
        raise ValueError(f"it announces {len(shapes)} tensors, at most {MAX_TENSORS} are read")
    for name, shape in shapes.items():
        if len(name) > MAX_NAME:
            raise ValueError(f"the name of a tensor has {len(name)} characters, at most {MAX_NAME} are read")
        if len(shape) > MAX_AXES:
            raise ValueError(f"{name!r} has {len(shape)} axes, at most {MAX_AXES} are read")


def is_float(dtype) -> bool:
    """Whether a numpy type is a floating-point type, including those of `ml_dtypes`."""
    dtype = np.dtype(dtype)
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def cast(value: np.ndarray, dtype, title: str) -> np.ndarray:
    """Casts an array to another floating-point type.

    Args:
      value: the array.
      dtype: the type.
      title: the array's name in errors.

    Raises:
      ValueError: if a finite value overflows the type.
    """
    dtype = np.dtype(dtype)
    if value.dtype == dtype or not is_float(dtype):
        return value.astype(dtype, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        result = value.astype(dtype)
    lost = ~np.isfinite(result)
    if lost.any():
        largest = np.abs(value[lost].astype(np.float64))
        largest = largest[np.isfinite(largest)]
        if largest.size:
            limit = float(ml_dtypes.finfo(dtype).max)
            raise ValueError(
                f"{title} holds {largest.max():g}, {dtype} ends at {limit:g}: give another dtype, such as float32"
            )
    return result


def is_float8(dtype) -> bool:
    """Whether a numpy type is one of the 8-bit floating-point types."""
    return np.dtype(dtype).name.startswith("float8")


def empty_aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An uninitialized array that XLA's CPU backend can alias without a copy."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def checked_tensor(tensors: TensorFile, name: str) -> np.ndarray:
    """A tensor in C order, as writers need it.

    Raises:
      ValueError: if it does not have the shape and type that `tensors` declares.
    """
    value = np.asarray(tensors[name], order="C")
    if value.shape != tensors.shapes[name] or value.dtype != tensors.dtypes[name]:
        described = f"{tensors.shapes[name]} of {tensors.dtypes[name]}"
        raise ValueError(f"{name} is {value.shape} of {value.dtype}, announced as {described}")
    return value
