"""Loads networks from any weight file: recognizes the file, finds its sizes and puts its parameters on devices."""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sf_jax.messages import with_article
from sf_jax.models.wan import WanConfig
from sf_jax.weights import adapters, mapping, reading
from sf_jax.weights.adapter_list import Lora
from sf_jax.weights.eight_bit import Quantizer
from sf_jax.weights.experts import refuse_other_transformers
from sf_jax.weights.files import open_tensors
from sf_jax.weights.folders import read_config
from sf_jax.weights.load import check, load_params, normalized
from sf_jax.weights.names import networks_of
from sf_jax.weights.package import read_header
from sf_jax.weights.recognize import HEAD_DIM, NAMINGS, Guess, entries_of, param_shapes_of, recognize
from sf_jax.weights.tensors import TensorFile

_SMALL = 1 << 14  # elements


def check_network(
    path: Path | str, kind: str, config: Any = None, part: str | None = None, scaled: bool = False
) -> Guess:
    """Checks names and shapes as `load_network` does, without reading tensors.

    Returns:
      The recognized network.
    """
    with open_tensors(path, part, scaled=scaled, kind=kind) as tensors:
        tensors, guess, (_, entries, like) = _mapped(tensors, kind, config)
        check(entries, normalized(tensors, (entry.name for entry in entries)), like, kind)
    return guess


def network_kind(path: Path | str, kinds: Sequence[str]) -> str:
    """The kind of network in a file, one of `kinds`.

    Raises:
      ValueError: if it is another kind; the message says what it seems to be.
    """
    guess = describe_network(path, kinds[0])
    if guess.kind not in kinds:
        raise ValueError(f"{path}: a {' or '.join(kinds)} is needed; this seems to be: {guess.description}")
    return guess.kind


def describe_network(path: Path | str, kind: str, part: str | None = None, scaled: bool = False) -> Guess:
    """Recognizes a file, or the network of the given kind in an all-in-one file.

    Raises:
      ValueError: if it cannot be opened, or its network is not supported.
    """
    with open_tensors(path, part, scaled=scaled, kind=kind) as tensors:
        return _recognized(tensors, kind)[1]


def read_sizes(path: Path, part: str | None = None, scaled: bool = False) -> WanConfig:
    """Sizes of a transformer from its header or shapes, or its `config.json` if these do not give the number of heads.

    Args:
      path: its file, or an index or folder of shards.
      part: which network of a checkpoint with several.
      scaled: whether to read scaled float8; see `open_tensors`.

    Raises:
      ValueError: if it is not a transformer, or the number of heads is unknown.
    """
    header = read_header(path)
    if header is not None:
        return header.config
    with open_tensors(path, part, scaled=scaled, kind="transformer") as tensors:
        guess, beside = _recognized(tensors, "transformer")[1], tensors.path.with_name("config.json")
    if guess.kind != "transformer":
        raise ValueError(f"{path}: a transformer is needed; this seems to be: {guess.description}")
    config = guess.config
    if config.dim % HEAD_DIM == 0:
        return config
    if not beside.is_file():
        raise ValueError(
            f"{path} has dim {config.dim}, no multiple of {HEAD_DIM}: its heads are told by a config.json beside it"
        )
    return read_config(beside)


def identify(path: Path | str, kind: str) -> tuple[Any, str]:
    """Identifies a network by a hash of its small tensors (norms, biases), independent of the file format.

    Args:
      path: see `load_network`.
      kind: see `load_network`.

    Returns:
      The sizes and a short hash, which does not depend on names, containers or wider types.

    Raises:
      ValueError: see `check_network`.
    """
    digest = hashlib.sha256()
    with open_tensors(path, scaled=False, kind=kind) as tensors:
        tensors, _, (config, entries, like) = _mapped(tensors, kind, None)
        tensors = normalized(tensors, (entry.name for entry in entries))
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
    scaled: bool = False,
    quantizer: Quantizer | None = None,
    unread: bool = False,
) -> tuple[Any, dict]:
    """Loads a network; on a terminal, shows a progress bar for large files.

    Args:
      path: a safetensors file, an index or folder of shards, or a `.pt`/`.pth` file (which needs torch); from an
        all-in-one file, the network of that kind is loaded.
      kind: "transformer", "vae", "tiny_vae" or "umt5".
      config: its sizes; None takes them from the file.
      dtype: type of the parameters; None keeps the file's.
      part: which network of a checkpoint with several (such as "generator_ema").
      sharding: sharding of every parameter, or a function from the tree of shapes to a tree of shardings; None is the
        default device.
      loras: adapters to merge into a transformer.
      scaled: whether to read scaled float8; see `open_tensors`.
      quantizer: quantizes a transformer's kernels; None does not.
      unread: whether to use zeros instead of reading the file, which is enough for compiling.

    Returns:
      The sizes and the parameters.

    Raises:
      ValueError: if the file is damaged or contains something else; the message says what it seems to be.
    """
    # With adapters, weights are rounded after the merge.
    with open_tensors(path, part, scaled=scaled, kind=kind, dtype=None if loras else dtype) as tensors:
        tensors, _, (config, entries, like) = _mapped(tensors, kind, config)
        shardings = sharding(like) if callable(sharding) else sharding and jax.tree.map(lambda _: sharding, like)
        with (
            adapters.merged(tensors, loras, config, wide=dtype is not None) as tensors,
            reading.zeros(tensors) if unread else reading.shown(tensors, kind) as tensors,
        ):
            return config, load_params(entries, tensors, like, kind, dtype, shardings, quantizer)


def _mapped(tensors: TensorFile, kind: str, config: Any) -> tuple[TensorFile, Guess, tuple]:
    """The tensors of one network, its recognized kind, and its sizes, name map and our shapes."""
    tensors, guess = _recognized(tensors, kind)
    if config is None:
        if guess.kind != kind:
            raise ValueError(f"{tensors.path}: {with_article(kind)} is needed; this seems to be: {guess.description}")
        config = guess.config
    naming = guess.naming if guess.naming in NAMINGS[kind] else NAMINGS[kind][0]
    return tensors, guess, (config, entries_of(kind, config, naming), param_shapes_of(kind, config))


def _recognized(tensors: TensorFile, kind: str) -> tuple[TensorFile, Guess]:
    """The tensors of one network (of the given kind in an all-in-one file) and the recognized network."""
    networks = networks_of(tensors)
    kind_there = "vae" if kind == "tiny_vae" else kind
    if kind_there in networks:
        tensors = tensors.renamed(networks[kind_there])
    guess = recognize(tensors.shapes, tensors.metadata)
    if guess.is_other:
        raise ValueError(f"{tensors.path}: {with_article(kind)} is needed; this is {with_article(guess.title)}")
    if guess.kind == "transformer":
        refuse_other_transformers(tensors.path)
    return tensors, guess
