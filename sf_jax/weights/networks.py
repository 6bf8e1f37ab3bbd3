"""Networks from the weight files of others: what a file is, its sizes and its parameters on the devices."""

from pathlib import Path
from typing import Any

import jax

from sf_jax.weights.files import open_tensors
from sf_jax.weights.load import check, load_params, normalised
from sf_jax.weights.recognise import NAMINGS, entries_of, param_shapes_of, recognise


def check_network(path: Path | str, kind: str, config: Any = None, part: str | None = None) -> None:
    """Refuses what `load_network` would refuse by the names and shapes alone; nothing else is read."""
    with open_tensors(path, part) as tensors:
        config, entries, like = _mapped(path, tensors, kind, config)
        check(entries, normalised(tensors, (entry.name for entry in entries)), like, kind)


def load_network(
    path: Path | str,
    kind: str,
    config: Any = None,
    dtype: str | None = None,
    part: str | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> tuple[Any, dict]:
    """Loads a network.

    Args:
      path: a safetensors file, an index or folder of shards, or a `.pt`/`.pth` file (which needs torch).
      kind: "transformer", "vae", "tiny_vae" or "umt5".
      config: its sizes; None takes them from the file.
      dtype: type of the parameters; None keeps the file's.
      part: of a checkpoint with several networks, which (such as "generator_ema").
      sharding: where every parameter goes; None is the default device.

    Returns:
      The sizes and the parameters.

    Raises:
      ValueError: if the file is damaged or not that of such a network; the message says what it seems to be.
    """
    with open_tensors(path, part) as tensors:
        config, entries, like = _mapped(path, tensors, kind, config)
        shardings = None if sharding is None else jax.tree.map(lambda _: sharding, like)
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
