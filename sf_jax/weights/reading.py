"""How the tensors of a file are read: with a bar that shows how far, or not at all."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
from tqdm import tqdm

from sf_jax.weights.tensors import Float8, TensorFile, empty_aligned

_TITLES = {"umt5": "text encoder", "vae": "VAE", "tiny_vae": "tiny VAE"}
_Read = Callable[[str], np.ndarray]
_LONG = 100_000_000  # bytes: what is read at once needs no bar


@contextlib.contextmanager
def shown(tensors: TensorFile, kind: str) -> Iterator[TensorFile]:
    """The same tensors, whose reading moves a bar with bytes, rate and the time left, on a terminal.

    Args:
      tensors: the file; each of its tensors is read once.
      kind: of network, the bar's title.
    """
    total = sum(math.prod(tensors.shapes[name]) * tensors.dtypes[name].itemsize for name in tensors)
    options = {"unit": "B", "unit_scale": True, "dynamic_ncols": True}
    # None is for terminals alone
    with tqdm(total=total, desc=_TITLES.get(kind, kind), disable=None if total >= _LONG else True, **options) as bar:

        def read(name, how=tensors.__getitem__):
            value = how(name)
            bar.update(math.prod(tensors.shapes[name]) * tensors.dtypes[name].itemsize)
            return value

        def stored(name):
            return read(name, lambda name: tensors.float8[name].read())

        yield _with(tensors, read, stored, lambda name: tensors.float8[name].scale())
        bar.update(total - bar.n)  # what was not asked for


@contextlib.contextmanager
def zeros(tensors: TensorFile) -> Iterator[TensorFile]:
    """Tensors of the same names, shapes and types that are zeros; nothing is read."""

    def zeros(shape, dtype):
        value = empty_aligned(shape, np.dtype(dtype))
        value.reshape(-1).view(np.uint8)[...] = 0
        return value

    yield _with(
        tensors,
        lambda name: zeros(tensors.shapes[name], tensors.dtypes[name]),
        lambda name: zeros(tensors.shapes[name], tensors.float8[name].dtype),
        lambda name: zeros((tensors.shapes[name][0], 1), np.float32),
    )


def _with(tensors: TensorFile, read: _Read, stored: _Read, scale: _Read) -> TensorFile:
    """The same names, read in another way; `stored` and `scale` read what the file has of scaled float8."""
    float8 = {
        name: Float8(matrix.dtype, functools.partial(stored, name), functools.partial(scale, name))
        for name, matrix in tensors.float8.items()
    }
    about = (tensors.metadata, tensors.part, tensors.close)
    return TensorFile(tensors.path, tensors.shapes, tensors.dtypes, read, *about, float8)
