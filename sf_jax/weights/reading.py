"""How the tensors of a file are read: with a bar that shows how far, or not at all."""

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
from tqdm import tqdm

from sf_jax.weights.tensors import TensorFile, empty_aligned

_TITLES = {"umt5": "text encoder", "vae": "VAE", "tiny_vae": "tiny VAE"}
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

        def read(name):
            value = tensors[name]
            bar.update(math.prod(tensors.shapes[name]) * tensors.dtypes[name].itemsize)
            return value

        yield _with(tensors, read)
        bar.update(total - bar.n)  # what was not asked for


@contextlib.contextmanager
def zeros(tensors: TensorFile) -> Iterator[TensorFile]:
    """Tensors of the same names, shapes and types that are zeros; nothing is read."""

    def read(name):
        value = empty_aligned(tensors.shapes[name], tensors.dtypes[name])
        value.reshape(-1).view(np.uint8)[...] = 0
        return value

    yield _with(tensors, read)


def _with(tensors: TensorFile, read: Callable[[str], np.ndarray]) -> TensorFile:
    """The same names, read in another way."""
    return TensorFile(tensors.path, tensors.shapes, tensors.dtypes, read, tensors.metadata, tensors.part, tensors.close)
