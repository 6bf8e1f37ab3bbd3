"""Named tensors that are read when they are asked for: what every reader gives and every writer takes."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

# XLA's CPU backend takes over an array without a copy if it is aligned so.
_ALIGNMENT = 64
# What a file may announce: far above every network that there is. Names are quoted in messages.
MAX_TENSORS, MAX_NAME, MAX_AXES = 100_000, 250, 32


@dataclasses.dataclass(frozen=True)
class Float8:
    """A scaled matrix as a file has it.

    Attributes:
      dtype: its float8 type.
      read: gives the stored numbers [out, in].
      scale: gives their scales, float32 [out, 1].
    """

    dtype: np.dtype
    read: Callable[[], np.ndarray]
    scale: Callable[[], np.ndarray]


class TensorFile(Mapping):
    """Tensors by name, each of which is read when it is asked for (and read again when asked for again).

    Attributes:
      path: the file or folder, for messages.
      shapes: name -> shape, known without reading the tensors.
      dtypes: name -> numpy type.
      metadata: the strings of a safetensors header.
      part: which of a checkpoint's state dicts these are, None for a file that is one.
      float8: of scaled float8, the matrices by name as they are stored.
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
        """Closes the file; tensors that were read stay."""
        self._close()

    def renamed(self, names: Mapping[str, str]) -> "TensorFile":
        """The same tensors under other names: `names` is new -> old; what it does not have is left out."""
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
        """The same tensors with all floating numbers of one type; those that it cannot hold are refused when read."""
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
    """Refuses more tensors, longer names and more axes than any network has, before something is built from them.

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
    """Whether a numpy type is a floating type, those of `ml_dtypes` included."""
    dtype = np.dtype(dtype)
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def cast(value: np.ndarray, dtype, title: str) -> np.ndarray:
    """An array in another floating type.

    Args:
      value: the array.
      dtype: the type.
      title: names the array in errors.

    Raises:
      ValueError: if a finite number is above what the type holds.
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
    """Whether a numpy type is one of the floating types of a byte."""
    return np.dtype(dtype).name.startswith("float8")


def empty_aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An uninitialized array that XLA's CPU backend can take over without a copy."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def checked_tensor(tensors: TensorFile, name: str) -> np.ndarray:
    """A tensor in C order, as a writer needs it.

    Raises:
      ValueError: if it is not of the shape and type that `tensors` announced.
    """
    value = np.asarray(tensors[name], order="C")
    if value.shape != tensors.shapes[name] or value.dtype != tensors.dtypes[name]:
        described = f"{tensors.shapes[name]} of {tensors.dtypes[name]}"
        raise ValueError(f"{name} is {value.shape} of {value.dtype}, announced as {described}")
    return value
