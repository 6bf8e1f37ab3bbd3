"""Wrappers of tensor files: one shows a progress bar, one returns zeros without reading."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
from tqdm import tqdm

from sf_jax.weights.tensors import Float8, TensorFile, empty_aligned

_TITLES = {"umt5": "text encoder", "vae": "VAE", "tiny_vae": "tiny VAE"}
_Read = Callable[[str], np.ndarray]
_LONG = 100_000_000  # bytes; smaller files need no progress bar


@contextlib.contextmanager
def shown(tensors: TensorFile, kind: str) -> Iterator[TensorFile]:
    """The same tensors; reading them updates a progress bar (bytes, rate, remaining time) on a terminal.

    Args:
      tensors: the file; each of its tensors is read once.
      kind: the kind of network, shown as the bar's title.
    """
    total = sum(math.prod(tensors.shapes[name]) * tensors.dtypes[name].itemsize for name in tensors)
    options = {"unit": "B", "unit_scale": True, "dynamic_ncols": True}
    # `disable=None` shows the bar only on a terminal.
    with tqdm(total=total, desc=_TITLES.get(kind, kind), disable=None if total >= _LONG else True, **options) as bar:

        def read(name, how=tensors.__getitem__):
            value = how(name)
            bar.update(math.prod(tensors.shapes[name]) * tensors.dtypes[name].itemsize)
            return value

        def stored(name):
            return read(name, lambda name: tensors.float8[name].read())

        yield _with(tensors, read, stored, lambda name: tensors.float8[name].scale())
        bar.update(total - bar.n)  # tensors that were not read


@contextlib.contextmanager
def zeros(tensors: TensorFile) -> Iterator[TensorFile]:
    """Zeros with the same names, shapes and types; reads nothing."""

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
    """The same names with other readers; `stored` and `scale` read the numbers and scales of scaled float8 tensors."""
    float8 = {
        name: Float8(matrix.dtype, functools.partial(stored, name), functools.partial(scale, name))
        for name, matrix in tensors.float8.items()
    }
    about = (tensors.metadata, tensors.part, tensors.close)
    return TensorFile(tensors.path, tensors.shapes, tensors.dtypes, read, *about, float8)
