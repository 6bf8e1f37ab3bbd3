"""Networks from the weight files of others: what a file is, its sizes and its parameters on the devices."""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sf_jax.weights import adapters, mapping
from sf_jax.weights.adapter_list import Lora
from sf_jax.weights.files import open_tensors
from sf_jax.weights.load import check, load_params, normalised
from sf_jax.weights.recognise import NAMINGS, entries_of, param_shapes_of, recognise

_SMALL = 1 << 14  # numbers


def check_network(path: Path | str, kind: str, config: Any = None, part: str | None = None) -> None:
    """Refuses what `load_network` would refuse by the names and shapes alone; nothing else is read."""
    with open_tensors(path, part) as tensors:
        config, entries, like = _mapped(path, tensors, kind, config)
        check(entries, normalised(tensors, (entry.name for entry in entries)), like, kind)


def identify(path: Path | str, kind: str) -> tuple[Any, str]:
    """Tells a network from others of its kind by its small tensors (norms, biases), whatever file they are in.

    Args:
      path: see `load_network`.
      kind: see `load_network`.

    Returns:
      The sizes and a short hash; other names, containers or wider numbers do not change it.

    Raises:
      ValueError: see `check_network`.
    """
    digest = hashlib.sha256()
    with open_tensors(path) as tensors:
        config, entries, like = _mapped(path, tensors, kind, None)
        tensors = normalised(tensors, (entry.name for entry in entries))
        check(entries, tensors, like, kind)
        for _, found in sorted(mapping.by_leaf(entries, tensors).items()):
            for entry in found:
                if math.prod(tensors.shapes[entry.name]) <= _SMALL:
                    value = entry.layout.ours(tensors[entry.name]).astype(np.float32)
                    digest.update(np.ascontiguousarray(value).tobytes())
    return config, digest.hexdigest()[:16]


def load_network(
    path: Path | str,
    kind: str,
    config: Any = None,
    dtype: str | None = None,
    part: str | None = None,
    sharding: jax.sharding.Sharding | Callable[[dict], dict] | None = None,
    loras: Sequence[Lora] = (),
) -> tuple[Any, dict]:
    """Loads a network.

    Args:
      path: a safetensors file, an index or folder of shards, or a `.pt`/`.pth` file (which needs torch).
      kind: "transformer", "vae", "tiny_vae" or "umt5".
      config: its sizes; None takes them from the file.
      dtype: type of the parameters; None keeps the file's.
      part: of a checkpoint with several networks, which (such as "generator_ema").
      sharding: where every parameter goes, or a function from the tree of shapes to a tree of shardings; None is the
        default device.
      loras: adapters to merge into a transformer.

    Returns:
      The sizes and the parameters.

    Raises:
      ValueError: if the file is damaged or not that of such a network; the message says what it seems to be.
    """
    with open_tensors(path, part) as tensors:
        config, entries, like = _mapped(path, tensors, kind, config)
        shardings = sharding(like) if callable(sharding) else sharding and jax.tree.map(lambda _: sharding, like)
        with adapters.merged(tensors, loras, config, wide=dtype is not None) as tensors:
            return config, load_params(entries, tensors, like, kind, dtype, shardings)


def _mapped(path, tensors, kind, config):
    """Sizes of the network, its name map and our shapes."""
    guess = recognise(tensors.shapes, tensors.metadata)
    if config is None:
        if guess.kind != kind:
            raise ValueError(f"{path}: a {kind} is needed; this seems to be: {guess.description}")
        config = guess.config
    naming = guess.naming if guess.naming in NAMINGS[kind] else NAMINGS[kind][0]
    return config, entries_of(kind, config, naming), param_shapes_of(kind, config)
