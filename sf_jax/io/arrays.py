"""Writes .npy files piece by piece, so that the whole array is never in memory."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from sf_jax import files


@contextlib.contextmanager
def npy_writer(path: str | Path) -> Iterator[Callable[[np.ndarray], None]]:
    """Opens a .npy file that grows along its first axis; it appears under its name when the block ends.

    Args:
      path: The file.

    Yields:
      A function that appends a numpy array of numbers [n, ...]; all have the shape and dtype of the first but for n.

    Raises:
      ValueError: The folder is not writable, the path is a folder, an array does not fit, or nothing was appended.
      OSError: The disk is full.
    """
    length, kind = 0, None
    with files.replacing(path) as unfinished, open(unfinished, "wb") as file:

        def append(array: np.ndarray) -> None:
            nonlocal length, kind
            if kind is None:
                if array.ndim < 1 or array.dtype.kind not in "biufc":
                    raise ValueError(f"array: got {array.dtype} {array.shape}, allowed: numbers [n, ...]")
                kind = array.shape[1:], array.dtype
                _write_header(file, 0, *kind)
            elif kind != (array.shape[1:], array.dtype):
                raise ValueError(f"array: got {array.dtype} {array.shape}, allowed: {kind[1]} [n, *{kind[0]}]")
            file.write(np.ascontiguousarray(array).data)
            length += len(array)

        yield append
        if kind is None:
            raise ValueError(f"{path} has no entries: append at least one")
        file.seek(0)
        _write_header(file, length, *kind)  # numpy pads it so that the first axis can grow


def _write_header(file, length: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length, *shape)}
    np.lib.format.write_array_header_1_0(file, header)
